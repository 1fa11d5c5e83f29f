// The vector vocabulary of simd.h on sixteen lanes of AVX-512 (F, BW, DQ, VL, VBMI).
#pragma once

#include <immintrin.h>

#include "floats.h"

namespace tw {
namespace {

constexpr size_t kLanes = 16;

using Floats = __m512;
using Words = __m512i;
using Mask = __mmask16;

inline __mmask16 first(size_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Floats widen(__m256i halves, Float16) { return _mm512_cvtph_ps(halves); }
inline Floats widen(__m256i halves, Bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline __m256i narrow(Floats v, Float16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// In integers: VCVTNE2PS2BF16 would flush subnormals.
inline __m256i narrow(Floats v, Bfloat16) {
    const Words bits = _mm512_castps_si512(v);
    const Words top = _mm512_srli_epi32(bits, 16);
    const Words odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    const Words rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
}

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_part(const float* p, size_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void store_part(float* p, Floats v, size_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

template <class Half>
inline Floats load(const Half* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
}
template <class Half>
inline Floats load_part(const Half* p, size_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), Half{});
}
template <class Half>
inline void store(Half* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, Half{}));
}
template <class Half>
inline void store_part(Half* p, Floats v, size_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(v, Half{}));
}

inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}

inline Words no_words() { return _mm512_setzero_si512(); }
inline Words magnitude(Floats v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
}
inline Words max(Words a, Words b) { return _mm512_max_epi32(a, b); }
inline uint32_t max_lane(Words v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
inline Mask within(Words v, uint32_t low, uint32_t high) {
    return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(v, _mm512_set1_epi32(static_cast<int>(low))),
                                   _mm512_set1_epi32(static_cast<int>(high - low)));
}
inline uint32_t count(Mask m) { return static_cast<uint32_t>(_mm_popcnt_u32(m)); }

inline Floats load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_int8_part(const int8_t* p, size_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
inline __m128i rounded_int8(Floats v) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)); }
inline void store_int8(int8_t* p, Floats v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded_int8(v)); }
inline void store_int8_part(int8_t* p, Floats v, size_t n) { _mm_mask_storeu_epi8(p, first(n), rounded_int8(v)); }

inline void stream_line(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace tw
