// The vector vocabulary of simd.h on eight lanes of AVX2 (with FMA and F16C).
#pragma once

#include <immintrin.h>

#include "floats.h"

namespace tw {
namespace {

constexpr size_t kLanes = 8;

using Floats = __m256;
using Words = __m256i;
using Mask = __m256i;

inline Floats widen(__m128i halves, Float16) { return _mm256_cvtph_ps(halves); }
inline Floats widen(__m128i halves, Bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline __m128i narrow(Floats v, Float16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m128i narrow(Floats v, Bfloat16) {
    const Words bits = _mm256_castps_si256(v);
    const Words top = _mm256_srli_epi32(bits, 16);
    const Words odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const Words rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const Words quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const Words nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const Words words = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
template <class Half>
inline Floats load(const Half* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
}
template <class Half>
inline void store(Half* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, Half{}));
}
template <class T>
inline Floats load_part(const T* p, size_t n) {
    T lanes[kLanes] = {};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
template <class T>
inline void store_part(T* p, Floats v, size_t n) {
    T lanes[kLanes];
    store(lanes, v);
    memcpy(p, lanes, n * sizeof(T));
}

inline Floats splat(float v) { return _mm256_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats select(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}

inline Words no_words() { return _mm256_setzero_si256(); }
inline Words magnitude(Floats v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
}
inline Words max(Words a, Words b) { return _mm256_max_epi32(a, b); }
inline uint32_t max_lane(Words v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
// Signed comparisons serve: v is a magnitude.
inline Mask within(Words v, uint32_t low, uint32_t high) {
    return _mm256_and_si256(_mm256_cmpgt_epi32(v, _mm256_set1_epi32(static_cast<int>(low - 1))),
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(high)), v));
}
inline uint32_t count(Mask m) {
    return static_cast<uint32_t>(_mm_popcnt_u32(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)))));
}

inline Floats load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_int8_part(const int8_t* p, size_t n) {
    int8_t lanes[kLanes] = {};
    memcpy(lanes, p, n);
    return load_int8(lanes);
}
inline void store_int8(int8_t* p, Floats v) {
    const Words words = _mm256_cvtps_epi32(v);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(pairs, pairs));
}
inline void store_int8_part(int8_t* p, Floats v, size_t n) {
    int8_t lanes[kLanes];
    store_int8(lanes, v);
    memcpy(p, lanes, n);
}

inline void stream_line(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
    _mm256_stream_si256(static_cast<__m256i*>(to) + 1, _mm256_loadu_si256(static_cast<const __m256i*>(from) + 1));
}
inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace tw
