// int8 on AVX-512: 64 elements at a time, with no look-up in memory.
//
// Encoding. The decade of |y| comes from its exponent and one comparison with the power of ten in that octave, if
// any. Levels are evenly spaced within a decade, so one FMA turns |y| into a bucket number j, such that bucket j
// holds the bound between levels j and j + 1 and no other. The bound is looked up by bytes: VPERMI2B indexes 128
// bytes at once, so four look-ups give the bounds of 64 elements in four planes, and unpacking puts their bytes
// together. One subtraction decides.
//
// Decoding looks the 256 values up in four byte planes the same way.
#pragma once

namespace tw {
namespace {

struct Int8Search {
    // By exponent modulo 32, for 2^-31 up: the power of ten in [2^e, 2^(e+1)), or 2. The number of the decade at 2^e
    // is in its low four bits: the power need only lie somewhere between two bounds.
    alignas(64) uint32_t border[32] = {};
    // By decade: |y| * slope + offset = 2^15 + bucket + a fraction, so that byte 1 of the sum is the bucket.
    alignas(64) float slope[16] = {};
    alignas(64) float offset[16] = {};
    // Byte k of the bound of bucket j.
    alignas(64) uint8_t plane[4][128] = {};

    constexpr Int8Search() {
        constexpr float kPower[6] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f};
        float octave = 0x1p-31f;
        for (uint32_t e = 0; e < 32; ++e, octave *= 2) {
            uint32_t decade = 0;
            while (decade < 6 && kPower[decade] < octave) ++decade;
            const bool crossed = decade < 6 && kPower[decade] < 2 * octave;
            border[e] = (__builtin_bit_cast(uint32_t, crossed ? kPower[decade] : 2.0f) & ~15u) | decade;
        }
        for (int decade = 0; decade < 7; ++decade) {
            const int first_level = 1 << decade;
            const double step = (kPower10[decade + 1] - kPower10[decade]) / first_level;
            slope[decade] = static_cast<float>(1 / step);
            offset[decade] = static_cast<float>(32768 + first_level - kInt8Level[first_level] / step);
        }
        for (int level = 0; level < 128; ++level) {
            const uint32_t bits = __builtin_bit_cast(uint32_t, kInt8Bounds.above[level]);
            for (int k = 0; k < 4; ++k) plane[k][level] = static_cast<uint8_t>(bits >> 8 * k);
        }
    }

    static constexpr double kPower10[8] = {1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};
};
constexpr Int8Search kInt8Search;

struct Int8Planes {
    alignas(64) uint8_t plane[4][256] = {};
    constexpr Int8Planes() {
        for (int code = 0; code < 256; ++code) {
            const uint32_t bits = __builtin_bit_cast(uint32_t, kInt8Code.value[code]);
            for (int k = 0; k < 4; ++k) plane[k][code] = static_cast<uint8_t>(bits >> 8 * k);
        }
    }
};
constexpr Int8Planes kInt8Planes;

// Unpacking works within 128-bit lanes, so bytes travel in its order (VectorOrders in simd_avx512.h).
struct LaneOrder {
    alignas(64) uint8_t byte1[64] = {};  // of two vectors' 32-bit elements
    alignas(64) uint8_t byte3[64] = {};
    constexpr LaneOrder() {
        for (int i = 0; i < 64; ++i) {
            const int lane = i / 16, vector = i / 4 % 2, element = 4 * lane + i % 4;
            byte1[i] = static_cast<uint8_t>(64 * vector + 4 * element + 1);
            byte3[i] = static_cast<uint8_t>(64 * vector + 4 * element + 3);
        }
    }
};
constexpr LaneOrder kLaneOrder;

// One byte of each element of four vectors, in lane order.
inline __m512i gathered(const __m512i* v, const uint8_t* which) {
    const __m512i at = _mm512_load_si512(which);
    return _mm512_mask_blend_epi32(0xCCCC, _mm512_permutex2var_epi8(v[0], at, v[1]),
                                   _mm512_permutex2var_epi8(v[2], at, v[3]));
}

// Four planes of bytes in lane order to four vectors of 32-bit elements.
inline void unpacked(const __m512i* plane, __m512i* v) {
    const __m512i low01 = _mm512_unpacklo_epi8(plane[0], plane[1]), low23 = _mm512_unpacklo_epi8(plane[2], plane[3]);
    const __m512i high01 = _mm512_unpackhi_epi8(plane[0], plane[1]), high23 = _mm512_unpackhi_epi8(plane[2], plane[3]);
    v[0] = _mm512_unpacklo_epi16(low01, low23);
    v[1] = _mm512_unpackhi_epi16(low01, low23);
    v[2] = _mm512_unpacklo_epi16(high01, high23);
    v[3] = _mm512_unpackhi_epi16(high01, high23);
}

// The bucket of each |y|, in byte 1.
inline __m512i bucket_of(__m512 magnitude) {
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(magnitude), 23);
    const __m512i border = _mm512_permutex2var_epi32(_mm512_load_si512(kInt8Search.border), exponent,
                                                     _mm512_load_si512(kInt8Search.border + 16));
    const __mmask16 beyond = _mm512_cmp_ps_mask(magnitude, _mm512_castsi512_ps(border), _CMP_GE_OQ);
    const __m512i decade = _mm512_mask_add_epi32(border, beyond, border, _mm512_set1_epi32(1));
    const __m512 slope = _mm512_permutexvar_ps(decade, _mm512_load_ps(kInt8Search.slope));
    const __m512 offset = _mm512_permutexvar_ps(decade, _mm512_load_ps(kInt8Search.offset));
    return _mm512_castps_si512(_mm512_fmadd_ps(magnitude, slope, offset));
}

inline __m512i codes_of(const __m512* y) {
    __m512i bits[4], magnitude[4], bucket[4], bound[4], plane[4];
    for (int k = 0; k < 4; ++k) {
        bits[k] = _mm512_castps_si512(y[k]);
        // VRANGEPS: the larger magnitude. Below 2^-31 all is level 0, and the exponent table would be left.
        const __m512 size = _mm512_range_ps(y[k], _mm512_set1_ps(0x1p-31f), 0xB);
        magnitude[k] = _mm512_castps_si512(size);
        bucket[k] = bucket_of(size);
    }
    const __m512i level = gathered(bucket, kLaneOrder.byte1);
    for (int k = 0; k < 4; ++k) {
        plane[k] = _mm512_permutex2var_epi8(_mm512_load_si512(kInt8Search.plane[k]), level,
                                            _mm512_load_si512(kInt8Search.plane[k] + 64));
    }
    unpacked(plane, bound);
    // Both are bits of positive floats: the difference is negative, with a set top bit, where |y| is above.
    for (int k = 0; k < 4; ++k) bound[k] = _mm512_sub_epi32(bound[k], magnitude[k]);
    const __mmask64 above = _mm512_movepi8_mask(gathered(bound, kLaneOrder.byte3));
    const __mmask64 negative = _mm512_movepi8_mask(gathered(bits, kLaneOrder.byte3));
    const __m512i reached = _mm512_mask_sub_epi8(level, above, level, _mm512_set1_epi8(-1));
    const __m512i zero = _mm512_set1_epi8(127);
    const __m512i codes = _mm512_mask_subs_epu8(_mm512_add_epi8(zero, reached), negative, zero, reached);
    return transposed(codes);
}

constexpr size_t kStep = 64;
using PackedCodes = __m512i;

template <class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    const __m512 inv = _mm512_set1_ps(inverse);
    const size_t next = bytes_to_next<T>(n);
    __m512 y[4];
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        for (int k = 0; k < 4; ++k) {
            prefetch<kL2>(x + i + 16 * k, next);
            y[k] = _mm512_mul_ps(load(x + i + 16 * k), inv);
        }
        out.put(codes_of(y));
    }
    if (i == n) return;
    const size_t rest = n - i;
    for (size_t k = 0; k < 4; ++k) y[k] = _mm512_mul_ps(load_group(x + i, rest, k), inv);
    out.put_part(codes_of(y), rest);
}

inline void values_of(__m512i codes, __m512i* values) {
    const __m512i index = transposed(codes);
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i plane[4];
    for (int k = 0; k < 4; ++k) {
        const uint8_t* table = kInt8Planes.plane[k];
        const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
        const __m512i high =
            _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), index, _mm512_load_si512(table + 192));
        plane[k] = _mm512_mask_blend_epi8(upper, low, high);
    }
    unpacked(plane, values);
}

template <class T, bool kSaturate, class Sink>
inline void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const __m512 s = _mm512_set1_ps(scale);
    __m512i values[4];
    const auto value = [&](size_t k) { return decoded<T, kSaturate>(_mm512_castsi512_ps(values[k]), s); };
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        prefetch<kL1>(codes + i, kPrefetchBytes);
        values_of(_mm512_loadu_si512(codes + i), values);
        for (size_t k = 0; k < 4; ++k) out.put(value(k));
    }
    if (i == n) return;
    values_of(_mm512_maskz_loadu_epi8(first_bytes(n - i), codes + i), values);
    size_t k = 0;
    for (; i + 16 <= n; ++k, i += 16) out.put(value(k));
    if (i < n) out.put_part(value(k), (n - i) * sizeof(T));
}

}  // namespace
}  // namespace tw
