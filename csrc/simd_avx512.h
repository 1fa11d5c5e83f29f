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

inline Floats widen(__m512i values, float) { return _mm512_castsi512_ps(values); }
inline Floats widen(__m256i halves, Float16) { return _mm512_cvtph_ps(halves); }
inline Floats widen(__m256i halves, Bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline __m512i narrow(Floats v, float) { return _mm512_castps_si512(v); }
inline __m256i narrow(Floats v, Float16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Rounded in the upper halves. In integers: VCVTNE2PS2BF16 would flush subnormals.
inline Words rounded_bfloat16(Floats v) {
    const Words bits = _mm512_castps_si512(v);
    const Mask odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const Words below = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    const Words rounded = _mm512_mask_add_epi32(below, odd, bits, _mm512_set1_epi32(0x8000));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m256i narrow(Floats v, Bfloat16) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bfloat16(v), 16)); }

struct VectorOrders {
    alignas(64) uint16_t upper_halves[32] = {};  // of two vectors' 32-bit lanes
    // Packing works within 128-bit lanes: lane L gets elements 4L to 4L + 3 of each of four vectors. As 32-bit units
    // that is the transpose of their natural order, and its own inverse.
    alignas(64) uint32_t transposed[16] = {};
    alignas(64) uint32_t low_lanes[16] = {}, high_lanes[16] = {};  // of two vectors by turns
    constexpr VectorOrders() {
        for (int i = 0; i < 32; ++i) upper_halves[i] = static_cast<uint16_t>(2 * i + 1);
        for (int i = 0; i < 16; ++i) transposed[i] = static_cast<uint32_t>(i % 4 * 4 + i / 4);
        for (int i = 0; i < 16; ++i) low_lanes[i] = static_cast<uint32_t>(i / 2 + i % 2 * 16);
        for (int i = 0; i < 16; ++i) high_lanes[i] = low_lanes[i] + 8;
    }
};
constexpr VectorOrders kVectorOrders;

inline __m512i transposed(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_load_si512(kVectorOrders.transposed), bytes);
}

// The lanes of two vectors by turns: those of their lower halves, and those of their upper ones.
inline void interleave(Floats a, Floats b, Floats& low, Floats& high) {
    low = _mm512_permutex2var_ps(a, _mm512_load_si512(kVectorOrders.low_lanes), b);
    high = _mm512_permutex2var_ps(a, _mm512_load_si512(kVectorOrders.high_lanes), b);
}

constexpr size_t kHalves = 32;
template <class Group>
inline __m512i narrowed(Group group, Float16 half) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(group(0), half)), narrow(group(1), half), 1);
}
template <class Group>
inline __m512i narrowed(Group group, Bfloat16) {
    return _mm512_permutex2var_epi16(rounded_bfloat16(group(0)), _mm512_load_si512(kVectorOrders.upper_halves),
                                     rounded_bfloat16(group(1)));
}

constexpr size_t kInt8s = 64;
template <class Group>
inline __m512i rounded(Group group) {
    const auto word = [&](size_t k) { return _mm512_cvtps_epi32(group(k)); };
    const __m512i bytes =
        _mm512_packs_epi16(_mm512_packs_epi32(word(0), word(1)), _mm512_packs_epi32(word(2), word(3)));
    return transposed(_mm512_max_epi8(bytes, _mm512_set1_epi8(-127)));
}

template <Cache kTo>
inline void prefetch(const void* p, size_t bytes_ahead) {
    _mm_prefetch(static_cast<const char*>(p) + bytes_ahead, kTo == kL1 ? _MM_HINT_T0 : _MM_HINT_T1);
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
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void add_weighted(float* sums, Floats v, float weight) { store(sums, add(load(sums), mul(splat(weight), v))); }
inline void add_weighted(double* sums, Floats v, double weight) {
    const __m512d w = _mm512_set1_pd(weight);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_mul_pd(w, low)));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_mul_pd(w, high)));
}
inline Floats clamp(Floats v, float most) {  // in this order of operands NaN stays
    return _mm512_max_ps(splat(-most), _mm512_min_ps(splat(most), v));
}
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

// Which lanes reach a number, as bits.
inline uint32_t reaching(const int32_t* p, int32_t low) {
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(low));
}
inline Floats load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_int8_part(const int8_t* p, size_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}

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

// a * x^kBits + b in the polynomials of CRC-32C: each 128-bit lane of `a` as two reflected 64-bit polynomials, the
// first of higher degree. A product of two of those has an x too many, as that of two 32-bit ones.
template <size_t kBits>
inline __m512i folded(__m512i a, __m512i b) {
    constexpr int64_t kFirst = int64_t{x_to_the(kBits + 63)} << 32, kSecond = int64_t{x_to_the(kBits - 1)} << 32;
    const __m512i by = _mm512_set4_epi64(kSecond, kFirst, kSecond, kFirst);
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(a, by, 0x00), _mm512_clmulepi64_epi128(a, by, 0x11), b,
                                     0x96);
}

}  // namespace
}  // namespace tw
