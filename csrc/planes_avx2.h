// The vectors of bytes that planes.cpp uses, on AVX2, whose packing works within 128-bit halves.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace tw {
namespace {

using Vector = __m256i;

inline Vector load_vector(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store_vector(uint8_t* to, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
inline Vector repeated(uint8_t byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }

// Exchanges the two quarters in the middle.
inline Vector crossed(Vector v) { return _mm256_permute4x64_epi64(v, 0xD8); }

inline Vector even_bytes(Vector a, Vector b) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    return crossed(_mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
}
inline Vector odd_bytes(Vector a, Vector b) {
    return crossed(_mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
}
inline Vector first_pairs(Vector even, Vector odd) { return _mm256_unpacklo_epi8(crossed(even), crossed(odd)); }
inline Vector second_pairs(Vector even, Vector odd) { return _mm256_unpackhi_epi8(crossed(even), crossed(odd)); }

// The upper 16 bits of each element of kWidth bytes, rotated.
template <size_t kWidth>
inline Vector upper_of(Vector v, Vector rotated) {
    constexpr int kUpper = kWidth == 2 ? 0xFF : kWidth == 4 ? 0xAA : 0x88;
    return _mm256_blend_epi16(v, rotated, kUpper);
}
template <size_t kWidth>
inline Vector rotated_left(Vector v) {
    if constexpr (kWidth == 1) return v;
    return upper_of<kWidth>(v, _mm256_or_si256(_mm256_slli_epi16(v, 1), _mm256_srli_epi16(v, 15)));
}
template <size_t kWidth>
inline Vector rotated_right(Vector v) {
    if constexpr (kWidth == 1) return v;
    return upper_of<kWidth>(v, _mm256_or_si256(_mm256_srli_epi16(v, 1), _mm256_slli_epi16(v, 15)));
}

}  // namespace
}  // namespace tw
