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
inline __m512i narrow(Floats v, float) { return _mm512_castps_si512(v); }
inline __m256i narrow(Floats v, Float16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// In integers: VCVTNE2PS2BF16 would flush subnormals.
inline __m256i narrow(Floats v, Bfloat16) {
    const Words bits = _mm512_castps_si512(v);
    const Words top = _mm512_srli_epi32(bits, 16);
    const Words odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    const Words rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
}

inline void prefetch(const void* p, size_t bytes_ahead) {
    _mm_prefetch(static_cast<const char*>(p) + bytes_ahead, _MM_HINT_T0);
}

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_part(const float* p, size_t n) { return _mm512_maskz_loadu_ps(first(n), p); }

template <class Half>
inline Floats load(const Half* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
}
template <class Half>
inline Floats load_part(const Half* p, size_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), Half{});
}
inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}

inline Words no_words() { return _mm512_setzero_si512(); }
inline Words magnitude(Floats v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)); }
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
using PackedInt8 = __m128i;
inline __m128i rounded_int8(Floats v) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)); }

inline __mmask64 first_bytes(size_t n) { return n < 64 ? (__mmask64{1} << n) - 1 : ~__mmask64{0}; }
inline void store_bytes(uint8_t* to, __m512i v, size_t n) { _mm512_mask_storeu_epi8(to, first_bytes(n), v); }
inline void store_bytes(uint8_t* to, __m256i v, size_t n) {
    _mm256_mask_storeu_epi8(to, static_cast<__mmask32>(first_bytes(n)), v);
}
inline void store_bytes(uint8_t* to, __m128i v, size_t n) { _mm_mask_storeu_epi8(to, first(n), v); }

inline void stream(uint8_t* to, __m512i v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v); }
inline void stream(uint8_t* to, __m256i v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v); }
inline void stream(uint8_t* to, __m128i v) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), v); }

inline __m512i picked(__m512i a, __m512i at, __m512i b) { return _mm512_permutex2var_epi8(a, at, b); }
inline __m256i picked(__m256i a, __m256i at, __m256i b) { return _mm256_permutex2var_epi8(a, at, b); }
inline __m128i picked(__m128i a, __m128i at, __m128i b) { return _mm_permutex2var_epi8(a, at, b); }

// The last `late` bytes of one vector and the first of the next: one permutation of both.
template <class V>
class Joint {
public:
    explicit Joint(size_t late) {
        uint8_t at[sizeof(V)];
        for (size_t i = 0; i < sizeof at; ++i) at[i] = static_cast<uint8_t>(sizeof at - late + i);
        memcpy(&at_, at, sizeof at);
    }
    static bool takes(size_t) { return true; }
    V operator()(V last, V next) const { return picked(last, at_, next); }

private:
    V at_;
};

}  // namespace
}  // namespace tw
