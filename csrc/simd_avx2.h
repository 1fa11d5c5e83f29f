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

inline Floats widen(__m256i values, float) { return _mm256_castsi256_ps(values); }
inline Floats widen(__m128i halves, Float16) { return _mm256_cvtph_ps(halves); }
inline Floats widen(__m128i halves, Bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline __m256i narrow(Floats v, float) { return _mm256_castps_si256(v); }
inline __m128i narrow(Floats v, Float16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Rounded in 32-bit lanes.
inline Words rounded_bfloat16(Floats v) {
    const Words bits = _mm256_castps_si256(v);
    const Words top = _mm256_srli_epi32(bits, 16);
    const Words odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const Words rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const Words quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const Words nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline __m128i narrow(Floats v, Bfloat16) {
    const Words words = rounded_bfloat16(v);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

constexpr size_t kHalves = 16;
template <class Group>
inline __m256i narrowed(Group group, Float16 half) {
    return _mm256_set_m128i(narrow(group(1), half), narrow(group(0), half));
}
template <class Group>
inline __m256i narrowed(Group group, Bfloat16) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bfloat16(group(0)), rounded_bfloat16(group(1))), 0xD8);
}

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
template <class Half>
inline Floats load(const Half* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
}
template <Cache kTo>
inline void prefetch(const void* p, size_t bytes_ahead) {
    _mm_prefetch(static_cast<const char*>(p) + bytes_ahead, kTo == kL1 ? _MM_HINT_T0 : _MM_HINT_T1);
}

template <class T>
inline Floats load_part(const T* p, size_t n) {
    T lanes[kLanes] = {};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
inline Floats splat(float v) { return _mm256_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
// The lanes of two vectors by turns: those of their lower halves, and those of their upper ones.
inline void interleave(Floats a, Floats b, Floats& low, Floats& high) {
    const Floats lows = _mm256_unpacklo_ps(a, b), highs = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(lows, highs, 0x20);
    high = _mm256_permute2f128_ps(lows, highs, 0x31);
}
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void add_weighted(float* sums, Floats v, float weight) { store(sums, add(load(sums), mul(splat(weight), v))); }
inline void add_weighted(double* sums, Floats v, double weight) {
    const __m256d w = _mm256_set1_pd(weight);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_mul_pd(w, low)));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_mul_pd(w, high)));
}
inline Floats clamp(Floats v, float most) {  // in this order of operands NaN stays
    return _mm256_max_ps(splat(-most), _mm256_min_ps(splat(most), v));
}
inline Floats select(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}

inline Words no_words() { return _mm256_setzero_si256(); }
inline Words magnitude(Floats v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)); }
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

// Which lanes reach a number, as bits.
inline uint32_t reaching(const int32_t* p, int32_t low) {
    const Words words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const Words below = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), words);
    return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) & 0xFF;
}
inline Floats load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_int8_part(const int8_t* p, size_t n) {
    int8_t lanes[kLanes] = {};
    memcpy(lanes, p, n);
    return load_int8(lanes);
}
// Bytes packed from four vectors of 32-bit lanes, which packing leaves in the order of 128-bit lanes, put in theirs.
inline __m256i in_order(__m256i bytes) {
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

constexpr size_t kInt8s = 32;
template <class Group>
inline __m256i rounded(Group group) {
    const auto word = [&](size_t k) { return _mm256_cvtps_epi32(group(k)); };
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(word(0), word(1)), _mm256_packs_epi32(word(2), word(3)));
    return in_order(_mm256_max_epi8(bytes, _mm256_set1_epi8(-127)));
}

template <class V>
inline void store_bytes(uint8_t* to, V v, size_t size) {
    memcpy(to, &v, size);
}

inline void stream(uint8_t* to, __m256i v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v); }
inline void stream(uint8_t* to, __m128i v) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), v); }

// The last `late` bytes of one vector and the first of the next: blended where they are, then rotated.
template <class V>
class Joint;

template <>
class Joint<__m256i> {
public:
    explicit Joint(size_t late) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const int late_lanes = static_cast<int>(late / 4);
        is_last_ = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(7 - late_lanes));
        rotation_ = _mm256_sub_epi32(lane, _mm256_set1_epi32(late_lanes));  // of which three bits count
    }
    static bool takes(size_t late) { return late % 4 == 0; }
    __m256i operator()(__m256i last, __m256i next) const {
        return _mm256_permutevar8x32_epi32(_mm256_blendv_epi8(next, last, is_last_), rotation_);
    }

private:
    __m256i is_last_, rotation_;
};

template <>
class Joint<__m128i> {
public:
    explicit Joint(size_t late) {
        const __m128i byte = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const int late_bytes = static_cast<int>(late);
        is_last_ = _mm_cmpgt_epi8(byte, _mm_set1_epi8(static_cast<char>(15 - late_bytes)));
        rotation_ = _mm_and_si128(_mm_sub_epi8(byte, _mm_set1_epi8(static_cast<char>(late_bytes))), _mm_set1_epi8(15));
    }
    static bool takes(size_t) { return true; }
    __m128i operator()(__m128i last, __m128i next) const {
        return _mm_shuffle_epi8(_mm_blendv_epi8(next, last, is_last_), rotation_);
    }

private:
    __m128i is_last_, rotation_;
};

}  // namespace
}  // namespace tw
