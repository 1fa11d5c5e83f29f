// int8 on AVX2: the look-up of int8_table.h for eight elements at once; decoding looks up one by one.
#pragma once

#include "int8_table.h"

namespace tw {
namespace {

// Eight codes in 32-bit lanes.
inline __m256i codes_of(__m256 y) {
    const auto all = [](uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); };
    const __m256i bits =
        _mm256_min_epi32(_mm256_max_epi32(magnitude(y), all(Int8Buckets::kLowest)), all(Int8Buckets::kHighest));
    const __m256i bucket = _mm256_sub_epi32(_mm256_srli_epi32(bits, Int8Buckets::kShift), all(Int8Buckets::kFirst));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(kInt8Buckets.entry), bucket, 4);
    const __m256i low_bits = _mm256_and_si256(bits, all((1u << Int8Buckets::kShift) - 1));
    const __m256i reached = _mm256_srli_epi32(_mm256_add_epi32(entry, low_bits), Int8Buckets::kShift);
    const __m256i negative = _mm256_srai_epi32(_mm256_castps_si256(y), 31);  // -1 where so
    const __m256i level = _mm256_min_epi32(reached, _mm256_add_epi32(all(128), negative));
    const __m256i signed_level = _mm256_sub_epi32(_mm256_xor_si256(level, negative), negative);
    return _mm256_add_epi32(all(127), signed_level);
}

constexpr size_t kStep = 32;
using PackedCodes = __m256i;

template <class T>
inline __m256i packed_codes(const T* x, __m256 inv) {
    const auto codes = [&](size_t k) { return codes_of(_mm256_mul_ps(load(x + 8 * k), inv)); };
    return in_order(
        _mm256_packus_epi16(_mm256_packs_epi32(codes(0), codes(1)), _mm256_packs_epi32(codes(2), codes(3))));
}

template <class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    const __m256 inv = _mm256_set1_ps(inverse);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) out.put(packed_codes(x + i, inv));
    if (i == n) return;
    T rest[32] = {};
    memcpy(rest, x + i, (n - i) * sizeof(T));
    out.put_part(packed_codes(rest, inv), n - i);
}

template <class T, bool kSaturate, class Sink>
inline void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const __m256 s = _mm256_set1_ps(scale);
    float value[8] = {};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (size_t k = 0; k < 8; ++k) value[k] = kInt8Code.value[codes[i + k]];
        out.put(decoded<T, kSaturate>(_mm256_loadu_ps(value), s));
    }
    if (i == n) return;
    for (size_t k = 0; i + k < n; ++k) value[k] = kInt8Code.value[codes[i + k]];
    out.put_part(decoded<T, kSaturate>(_mm256_loadu_ps(value), s), (n - i) * sizeof(T));
}

}  // namespace
}  // namespace tw
