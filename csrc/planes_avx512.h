// The vectors of bytes that planes.cpp uses, on AVX-512 (BW, VBMI).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace tw {
namespace {

using Vector = __m512i;

inline Vector load_vector(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store_vector(uint8_t* to, Vector v) { _mm512_storeu_si512(to, v); }
inline Vector repeated(uint8_t byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }

struct ByteOrders {
    alignas(64) uint8_t even[64] = {}, odd[64] = {}, first[64] = {}, second[64] = {};
    constexpr ByteOrders() {
        for (int i = 0; i < 64; ++i) {
            even[i] = static_cast<uint8_t>(2 * i);
            odd[i] = static_cast<uint8_t>(2 * i + 1);
            first[i] = static_cast<uint8_t>(i / 2 + i % 2 * 64);
            second[i] = static_cast<uint8_t>(32 + i / 2 + i % 2 * 64);
        }
    }
};
constexpr ByteOrders kByteOrders;

inline Vector of_both(Vector a, const uint8_t* order, Vector b) {
    return _mm512_permutex2var_epi8(a, _mm512_load_si512(order), b);
}
inline Vector even_bytes(Vector a, Vector b) { return of_both(a, kByteOrders.even, b); }
inline Vector odd_bytes(Vector a, Vector b) { return of_both(a, kByteOrders.odd, b); }
inline Vector first_pairs(Vector even, Vector odd) { return of_both(even, kByteOrders.first, odd); }
inline Vector second_pairs(Vector even, Vector odd) { return of_both(even, kByteOrders.second, odd); }

// The upper 16 bits of each element of kWidth bytes, rotated.
template <size_t kWidth>
inline Vector upper_of(Vector v, Vector rotated) {
    constexpr __mmask32 kUpper = kWidth == 2 ? 0xFFFFFFFF : kWidth == 4 ? 0xAAAAAAAA : 0x88888888;
    return _mm512_mask_blend_epi16(kUpper, v, rotated);
}
template <size_t kWidth>
inline Vector rotated_left(Vector v) {
    if constexpr (kWidth == 1) return v;
    return upper_of<kWidth>(v, _mm512_or_si512(_mm512_slli_epi16(v, 1), _mm512_srli_epi16(v, 15)));
}
template <size_t kWidth>
inline Vector rotated_right(Vector v) {
    if constexpr (kWidth == 1) return v;
    return upper_of<kWidth>(v, _mm512_or_si512(_mm512_srli_epi16(v, 1), _mm512_slli_epi16(v, 15)));
}

}  // namespace
}  // namespace tw
