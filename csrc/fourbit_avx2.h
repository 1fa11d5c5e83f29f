// NF4 and FP4 on AVX2: a binary search whose later thresholds come from permutations of eight floats.
#pragma once

namespace tw {
namespace {

// The thresholds that each step of the search may need, by the code found so far.
struct Nf4Steps {
    alignas(32) float third[8] = {};
    alignas(32) float fourth[8] = {};
    constexpr Nf4Steps() {
        for (int k = 0; k < 8; ++k) {
            third[k] = kNf4Thresholds.t[4 * (k % 4) + 1];
            fourth[k] = kNf4Thresholds.t[2 * k];
        }
    }
};
constexpr Nf4Steps kNf4Steps;

struct Fp4Steps {
    alignas(32) float third[8] = {};
    alignas(32) int32_t code[8] = {};  // by level
    constexpr Fp4Steps() {
        for (int k = 0; k < 8; ++k) {
            third[k] = kFp4Thresholds[2 * (k % 4)];
            code[k] = static_cast<int32_t>(fp4_code_of_level(static_cast<uint32_t>(k)));
        }
    }
};
constexpr Fp4Steps kFp4Steps;

inline __m256i above(__m256 y, __m256 threshold) {
    return _mm256_castps_si256(_mm256_cmp_ps(y, threshold, _CMP_GT_OQ));  // -1 where true
}

// The code found so far, one bit longer.
inline __m256i longer(__m256i code, __m256i bit) { return _mm256_sub_epi32(_mm256_add_epi32(code, code), bit); }

// Eight codes in 32-bit lanes.
template <QuantType Q>
inline __m256i search(__m256 y);

template <>
inline __m256i search<kNf4>(__m256 y) {
    const __m256i first_bit = above(y, _mm256_set1_ps(kNf4Thresholds.t[7]));
    const __m256 second = _mm256_blendv_ps(_mm256_set1_ps(kNf4Thresholds.t[3]), _mm256_set1_ps(kNf4Thresholds.t[11]),
                                           _mm256_castsi256_ps(first_bit));
    __m256i code = longer(_mm256_sub_epi32(_mm256_setzero_si256(), first_bit), above(y, second));
    code = longer(code, above(y, _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4Steps.third), code)));
    return longer(code, above(y, _mm256_permutevar8x32_ps(_mm256_load_ps(kNf4Steps.fourth), code)));
}

template <>
inline __m256i search<kFp4>(__m256 y) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), y);
    const __m256i first_bit = above(size, _mm256_set1_ps(kFp4Thresholds[3]));
    const __m256 second = _mm256_blendv_ps(_mm256_set1_ps(kFp4Thresholds[1]), _mm256_set1_ps(kFp4Thresholds[5]),
                                           _mm256_castsi256_ps(first_bit));
    __m256i level = longer(_mm256_sub_epi32(_mm256_setzero_si256(), first_bit), above(size, second));
    level = longer(level, above(size, _mm256_permutevar8x32_ps(_mm256_load_ps(kFp4Steps.third), level)));
    const __m256i code =
        _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kFp4Steps.code)), level);
    const __m256i negative = above(_mm256_setzero_ps(), y);
    return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
}

template <QuantType Q, class T>
inline __m128i packed_codes(const T* x, __m256 inv) {
    const auto codes = [&](size_t k) { return search<Q>(_mm256_mul_ps(load(x + 8 * k), inv)); };
    const __m256i bytes =
        in_order(_mm256_packus_epi16(_mm256_packs_epi32(codes(0), codes(1)), _mm256_packs_epi32(codes(2), codes(3))));
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

constexpr size_t kStep = 32;
using PackedCodes = __m128i;

template <QuantType Q, class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    const __m256 inv = _mm256_set1_ps(inverse);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) out.put(packed_codes<Q>(x + i, inv));
    if (i == n) return;
    T rest[32] = {};
    memcpy(rest, x + i, (n - i) * sizeof(T));
    uint8_t packed[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), packed_codes<Q>(rest, inv));
    if (n % 2) packed[(n - i) / 2] &= 0xF0;
    out.put_part(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), (n - i + 1) / 2);
}

// Four bytes to eight values: each byte in a 64-bit lane, its high nibble shifted down into the first half of the
// lane and its low nibble up into the second. Bit 3 chooses between the halves of the table.
inline __m256 code_values(uint32_t four, __m256 low, __m256 high) {
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(static_cast<int>(four)));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
}

template <QuantType Q, class T, bool kSaturate, class Sink>
inline void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const float* table = Q == kNf4 ? kNf4Code.value : kFp4Code.value;
    const __m256 low = _mm256_load_ps(table), high = _mm256_load_ps(table + 8);
    const __m256 s = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= n; i += 8, codes += 4) {
        const uint32_t four = get(reinterpret_cast<const uint32_t*>(codes));
        out.put(decoded<T, kSaturate>(code_values(four, low, high), s));
    }
    if (i == n) return;
    uint32_t rest = 0;
    memcpy(&rest, codes, (n - i + 1) / 2);
    out.put_part(decoded<T, kSaturate>(code_values(rest, low, high), s), (n - i) * sizeof(T));
}

}  // namespace
}  // namespace tw
