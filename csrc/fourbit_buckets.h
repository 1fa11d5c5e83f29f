// The thresholds of NF4 and FP4 by bucket, so that one comparison decides.
//
// Adding 2^23 to a multiple of y leaves it, rounded, in the low mantissa bits: the bucket of y. Buckets are monotone
// in y and hold at most one threshold each: all thresholds in lower buckets are below y, all in higher ones are not,
// for every float. No threshold is so near the border of a bucket that it matters whether the multiplication rounds.
#pragma once

namespace tw {
namespace {

// NF4: 32 buckets of [-1, 1], a fifteenth wide; the closest thresholds are 0.08 apart.
struct Nf4Search {
    static constexpr float kScale = 15.0f;
    static constexpr int kOffset = 16;

    alignas(64) float threshold[32] = {};
    alignas(64) uint8_t code[64] = {};  // by bucket + 32 * (y > threshold)

    constexpr Nf4Search() {
        uint32_t below = 0;
        for (int bucket = 0; bucket < 32; ++bucket) {
            const uint32_t before = below;
            while (below < 15 && bucket_of(kNf4Thresholds.t[below]) == bucket) ++below;
            threshold[bucket] = below > before ? kNf4Thresholds.t[before] : 2.0f;
            code[bucket] = static_cast<uint8_t>(before);
            code[bucket + 32] = static_cast<uint8_t>(below > before ? before + 1 : before);
            exact = exact && below - before <= 1;
        }
        exact = exact && below == 15;
    }
    static constexpr int bucket_of(float y) { return static_cast<int>(y * 15.0 + kOffset + 0.5); }

    bool exact = true;
};
constexpr Nf4Search kNf4Search;
static_assert(kNf4Search.exact, "a bucket holds two thresholds");

// FP4: 16 buckets of |y|, a thirteenth wide; no threshold is near the border of a bucket.
struct Fp4Search {
    static constexpr float kScale = 13.0f;

    alignas(64) float threshold[16] = {};
    alignas(64) uint8_t code[64] = {};  // by bucket + 16 * (|y| > threshold) + 32 * (y < 0)

    constexpr Fp4Search() {
        uint32_t below = 0;
        for (int bucket = 0; bucket < 16; ++bucket) {
            const uint32_t before = below;
            while (below < 7 && bucket_of(kFp4Thresholds[below]) == bucket) ++below;
            threshold[bucket] = below > before ? kFp4Thresholds[before] : 2.0f;
            for (int negative = 0; negative < 2; ++negative) {
                const int at = bucket + 32 * negative;
                code[at] = static_cast<uint8_t>(fp4_code_of_level(before) + 8 * negative);
                code[at + 16] = static_cast<uint8_t>(fp4_code_of_level(below) + 8 * negative);
            }
            exact = exact && below - before <= 1;
        }
        exact = exact && below == 7;
    }
    static constexpr int bucket_of(float y) { return static_cast<int>(y * 13.0 + 0.5); }

    bool exact = true;
};
constexpr Fp4Search kFp4Search;
static_assert(kFp4Search.exact, "a bucket holds two thresholds");

}  // namespace
}  // namespace tw
