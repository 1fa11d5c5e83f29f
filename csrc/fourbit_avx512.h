// NF4 and FP4 on AVX-512: a bucket of the threshold table by one FMA, the threshold by one permutation, one
// comparison.
//
// Bucket and outcome together index the code in a table of 64 bytes (fourbit_buckets.h).
#pragma once

#include "fourbit_buckets.h"

namespace tw {
namespace {

struct LowBytes {
    alignas(64) uint8_t at[64] = {};
    constexpr LowBytes() {
        for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(4 * (i % 32));
    }
};
constexpr LowBytes kLowBytes;

// The low bytes of four vectors, in order.
inline __m512i low_bytes(const __m512i* v) {
    const __m512i at = _mm512_load_si512(kLowBytes.at);
    return _mm512_mask_blend_epi64(0xF0, _mm512_permutex2var_epi8(v[0], at, v[1]),
                                   _mm512_permutex2var_epi8(v[2], at, v[3]));
}

inline __mmask64 joined(const __mmask16* m) {
    return _mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0]));
}

// The table indices of 64 elements, as bytes.
template <QuantType Q>
inline __m512i search(const __m512* y);

template <>
inline __m512i search<kNf4>(const __m512* y) {
    const __m512 low = _mm512_load_ps(kNf4Search.threshold), high = _mm512_load_ps(kNf4Search.threshold + 16);
    const __m512 magic = _mm512_set1_ps(0x1p23f + Nf4Search::kOffset);
    __m512i bucket[4];
    __mmask16 above[4];
    for (int k = 0; k < 4; ++k) {
        bucket[k] = _mm512_castps_si512(_mm512_fmadd_ps(y[k], _mm512_set1_ps(Nf4Search::kScale), magic));
        above[k] = _mm512_cmp_ps_mask(y[k], _mm512_permutex2var_ps(low, bucket[k], high), _CMP_GT_OQ);
    }
    const __m512i index = low_bytes(bucket);
    return _mm512_mask_add_epi8(index, joined(above), index, _mm512_set1_epi8(32));
}

template <>
inline __m512i search<kFp4>(const __m512* y) {
    const __m512 thresholds = _mm512_load_ps(kFp4Search.threshold);
    __m512i bucket[4];
    __mmask16 above[4], negative[4];
    for (int k = 0; k < 4; ++k) {
        const __m512 size = _mm512_abs_ps(y[k]);
        bucket[k] =
            _mm512_castps_si512(_mm512_fmadd_ps(size, _mm512_set1_ps(Fp4Search::kScale), _mm512_set1_ps(0x1p23f)));
        above[k] = _mm512_cmp_ps_mask(size, _mm512_permutexvar_ps(bucket[k], thresholds), _CMP_GT_OQ);
        negative[k] = _mm512_cmp_ps_mask(y[k], _mm512_setzero_ps(), _CMP_LT_OQ);
    }
    __m512i index = low_bytes(bucket);
    index = _mm512_mask_add_epi8(index, joined(above), index, _mm512_set1_epi8(16));
    return _mm512_mask_add_epi8(index, joined(negative), index, _mm512_set1_epi8(32));
}

// 32 bytes of codes; elements outside `valid` give 0.
template <QuantType Q>
inline __m256i packed_codes(const __m512* y, __mmask64 valid) {
    const __m512i table = _mm512_load_si512(Q == kNf4 ? kNf4Search.code : kFp4Search.code);
    const __m512i codes = _mm512_maskz_permutexvar_epi8(valid, search<Q>(y), table);
    return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110)));
}

constexpr size_t kStep = 64;
using PackedCodes = __m256i;

template <QuantType Q, class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    const __m512 inv = _mm512_set1_ps(inverse);
    const size_t next = bytes_to_next<T>(n);
    __m512 y[4];
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        for (size_t k = 0; k < 4; ++k) {
            if (next) prefetch<kL2>(x + i + 16 * k, next);
            y[k] = _mm512_mul_ps(load(x + i + 16 * k), inv);
        }
        out.put(packed_codes<Q>(y, ~__mmask64{0}));
    }
    if (i == n) return;
    const size_t rest = n - i;
    for (size_t k = 0; k < 4; ++k) y[k] = _mm512_mul_ps(load_group(x + i, rest, k), inv);
    out.put_part(packed_codes<Q>(y, first_bytes(rest)), (rest + 1) / 2);
}

// Eight bytes to sixteen values: each byte in a 64-bit lane, its high nibble shifted down into the first half of the
// lane and its low nibble up into the second; the permutation ignores all but four bits.
inline __m512 code_values(__m128i eight, __m512 table) {
    const __m512i shifts = _mm512_set1_epi64(0x0000000000000004);
    return _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu8_epi64(eight)), table);
}

template <QuantType Q, class T, bool kSaturate, class Sink>
inline void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const __m512 table = _mm512_load_ps(Q == kNf4 ? kNf4Code.value : kFp4Code.value);
    const __m512 s = _mm512_set1_ps(scale);
    size_t i = 0;
    for (; i + 16 <= n; i += 16, codes += 8) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
        out.put(decoded<T, kSaturate>(code_values(eight, table), s));
    }
    if (i == n) return;
    const __m128i rest = _mm_maskz_loadu_epi8(first((n - i + 1) / 2), codes);
    out.put_part(decoded<T, kSaturate>(code_values(rest, table), s), (n - i) * sizeof(T));
}

}  // namespace
}  // namespace tw
