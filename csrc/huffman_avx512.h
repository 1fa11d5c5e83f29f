// Joins the codes of several bytes for huffman.cpp: looked up in registers, 64 at once.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace tw {
namespace {

struct Code {
    uint16_t bits;
    uint8_t length;
};

// Bytes that are encoded at once, and the most groups that they give.
constexpr size_t kAtOnce = 64, kGroups = 16;

// Joined codes, the first one lowest, and the number of their bits: at most 56, which leaves room for 7 bits before
// them in a word.
struct Groups {
    uint64_t codes[kGroups];
    uint64_t lengths[kGroups];
};

class Codes {
public:
    explicit Codes(const Code* codes) {
        uint8_t bytes[3][256];
        for (size_t byte = 0; byte < 256; ++byte) {
            bytes[0][byte] = codes[byte].length;
            bytes[1][byte] = static_cast<uint8_t>(codes[byte].bits);
            bytes[2][byte] = static_cast<uint8_t>(codes[byte].bits >> 8);
        }
        for (size_t quarter = 0; quarter < 4; ++quarter) {
            lengths_[quarter] = _mm512_loadu_si512(bytes[0] + 64 * quarter);
            low_[quarter] = _mm512_loadu_si512(bytes[1] + 64 * quarter);
            high_[quarter] = _mm512_loadu_si512(bytes[2] + 64 * quarter);
        }
    }

    // Joins neighbouring codes to pairs, these to four codes of at most 44 bits, and these to eight if all of them fit:
    // nearly always, as codes have two to three bits. Returns the number of groups.
    size_t encode(const uint8_t* x, Groups& groups) const {
        const __m512i bytes = _mm512_loadu_si512(x), even = _mm512_set1_epi16(0xFF);
        const __m512i length = looked_up(lengths_, bytes), low = looked_up(low_, bytes), high = looked_up(high_, bytes);
        const __m512i length1 = _mm512_and_si512(length, even);
        const __m512i first1 = _mm512_or_si512(_mm512_and_si512(low, even), _mm512_slli_epi16(high, 8));
        const __m512i second1 = _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(even, high));
        // 16 bits hold a code, 32 bits two and 64 bits four: their lower and upper halves are first and second.
        const __m512i length2 = _mm512_add_epi16(length1, _mm512_srli_epi16(length, 8));
        const __m512i first2 = joined32(lower16(first1), lower16(second1), lower16(length1));
        const __m512i second2 = joined32(upper16(first1), upper16(second1), upper16(length1));
        const __m512i first_length2 = lower16(length2), length4 = _mm512_add_epi32(first_length2, upper16(length2));
        const __m512i first4 = joined64(lower32(first2), lower32(second2), lower32(first_length2));
        const __m512i second4 = joined64(upper32(first2), upper32(second2), upper32(first_length2));
        const __m512i first_length4 = lower32(length4), second_length4 = upper32(length4);
        const __m512i length8 = _mm512_add_epi64(first_length4, second_length4);
        if (!_mm512_cmpgt_epu64_mask(length8, _mm512_set1_epi64(56))) {
            _mm512_storeu_si512(groups.codes, joined64(first4, second4, first_length4));
            _mm512_storeu_si512(groups.lengths, length8);
            return kGroups / 2;
        }
        store_in_turns(first4, second4, groups.codes);
        store_in_turns(first_length4, second_length4, groups.lengths);
        return kGroups;
    }

private:
    // Looks these bytes up in 256 entries, 64 per vector.
    static __m512i looked_up(const __m512i* entries, __m512i bytes) {
        const __m512i small = _mm512_permutex2var_epi8(entries[0], bytes, entries[1]);
        const __m512i large = _mm512_permutex2var_epi8(entries[2], bytes, entries[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), small, large);
    }

    static __m512i lower16(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi32(0xFFFF)); }
    static __m512i upper16(__m512i v) { return _mm512_srli_epi32(v, 16); }
    static __m512i lower32(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi64(0xFFFFFFFF)); }
    static __m512i upper32(__m512i v) { return _mm512_srli_epi64(v, 32); }

    static __m512i joined32(__m512i first, __m512i second, __m512i first_length) {
        return _mm512_or_si512(first, _mm512_sllv_epi32(second, first_length));
    }
    static __m512i joined64(__m512i first, __m512i second, __m512i first_length) {
        return _mm512_or_si512(first, _mm512_sllv_epi64(second, first_length));
    }

    static void store_in_turns(__m512i first, __m512i second, uint64_t* out) {
        const __m512i lower = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
        const __m512i upper = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi64(first, lower, second));
        _mm512_storeu_si512(out + 8, _mm512_permutex2var_epi64(first, upper, second));
    }

    __m512i lengths_[4], low_[4], high_[4];
};

}  // namespace
}  // namespace tw
