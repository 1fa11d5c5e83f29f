// The level of |y| for int8 by one look-up, for tiers that cannot hold the bounds in registers.
//
// The top bits of |y| name a bucket that at most one bound divides: 1/64 of an octave. From 2^-22, below which all is
// level 0, to 1 these are 1408, and one more for 1 itself. An entry is the level at the bucket's lower end in units
// of 2^17, plus what the low 17 bits of |y| lack to be above the bound: adding those bits carries into the level.
#pragma once

namespace tw {
namespace {

struct Int8Buckets {
    static constexpr int kShift = 17;                      // drops all but the exponent and 6 bits of mantissa
    static constexpr uint32_t kLowest = (127 - 22) << 23;  // the bits of |y| are first clamped to those of 2^-22
    static constexpr uint32_t kHighest = 127 << 23;        // and of 1
    static constexpr uint32_t kFirst = kLowest >> kShift;
    static constexpr uint32_t kCount = 22 * 64 + 1;

    uint32_t entry[kCount] = {};

    constexpr Int8Buckets() {
        constexpr uint32_t kUnit = 1u << kShift;
        uint32_t level = 0;
        for (uint32_t bucket = 0; bucket < kCount; ++bucket) {
            const uint32_t begin = (kFirst + bucket) << kShift;
            entry[bucket] = level * kUnit;
            const uint32_t bound = level < 128 ? __builtin_bit_cast(uint32_t, kInt8Bounds.above[level]) : 0;
            if (bound < begin || bound - begin >= kUnit) continue;
            entry[bucket] += kUnit - 1 - (bound - begin);
            ++level;
            exact = exact && (level == 128 || __builtin_bit_cast(uint32_t, kInt8Bounds.above[level]) - begin >= kUnit);
        }
        exact = exact && level == 128;
    }

    bool exact = true;
};
constexpr Int8Buckets kInt8Buckets;
static_assert(kInt8Buckets.exact, "a bucket holds two bounds");

}  // namespace
}  // namespace tw
