// int8 in plain C++: the top bits of |y| name a bucket that at most one bound divides, and one comparison decides.
//
// A bucket is 1/64 of an octave. From 2^-22, below which all is level 0, to 1 these are 1408, and one for 1 itself,
// which x * (1 / absmax) may exceed by an ulp or two.
#pragma once

namespace tw {
namespace {

struct Int8Buckets {
    static constexpr int kShift = 17;                     // keeps the exponent and 6 bits of mantissa
    static constexpr uint32_t kFirst = (127 - 22) << 6;   // the bucket of 2^-22
    static constexpr uint32_t kCount = 22 * 64 + 1;

    uint32_t bound[kCount] = {};  // the bits of its bound, or of the next above it
    uint8_t level[kCount] = {};   // the level of its lower end

    constexpr Int8Buckets() {
        uint32_t bucket = 0;
        uint8_t below = 0;
        float octave = 0x1p-22f;
        for (; octave <= 1; octave *= 2) {
            for (int step = 0; step < 64 && bucket < kCount; ++step, ++bucket) {
                const float end = octave + octave * (static_cast<float>(step + 1) / 64);
                bound[bucket] = __builtin_bit_cast(uint32_t, below < 128 ? kInt8Bounds.above[below] : 2.0f);
                level[bucket] = below;
                while (below < 128 && kInt8Bounds.above[below] < end) {
                    ++below;
                    if (below - level[bucket] > 1) level[bucket] = 255;
                }
            }
        }
    }
    constexpr bool exact() const {
        for (uint8_t l : level) {
            if (l == 255) return false;
        }
        return true;
    }
};
constexpr Int8Buckets kInt8Buckets;
static_assert(kInt8Buckets.exact(), "a bucket holds two bounds");

// Without branches, which the signs of real data would make unpredictable.
inline uint8_t code_of(float y) {
    constexpr uint32_t kFirst = Int8Buckets::kFirst;
    constexpr uint32_t kLast = kFirst + Int8Buckets::kCount - 1;
    const uint32_t bits = bits_of(y);
    const uint32_t size = bits & ~kSignBit;
    const uint32_t negative = bits >> 31;
    const uint32_t bucket = min_of(max_of(size >> Int8Buckets::kShift, kFirst), kLast) - kFirst;
    const uint32_t above = (kInt8Buckets.bound[bucket] - size) >> 31;
    const uint32_t level = min_of(kInt8Buckets.level[bucket] + above, 128 - negative);
    return static_cast<uint8_t>(127 + ((level ^ (0 - negative)) + negative));
}

constexpr size_t kStep = kLanes;
using PackedCodes = PackedInt8;

template <class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    const Floats inv = splat(inverse);
    for (size_t i = 0; i < n; i += kLanes) {
        const size_t here = min_size(kLanes, n - i);
        const Floats scaled = mul(here == kLanes ? load(x + i) : load_part(x + i, here), inv);
        float y[kLanes];
        uint8_t code[kLanes];
        memcpy(y, &scaled, sizeof y);
        for (size_t lane = 0; lane < kLanes; ++lane) code[lane] = code_of(y[lane]);
        PackedCodes codes;
        memcpy(&codes, code, sizeof codes);
        if (here == kLanes) {
            out.put(codes);
        } else {
            out.put_part(codes, here);
        }
    }
}

template <class T, class Sink>
inline void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const Floats s = splat(scale);
    float value[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (size_t lane = 0; lane < kLanes; ++lane) value[lane] = kInt8Code.value[codes[i + lane]];
        out.put(narrow(mul(load(value), s), T{}));
    }
    if (i == n) return;
    for (size_t lane = 0; i + lane < n; ++lane) value[lane] = kInt8Code.value[codes[i + lane]];
    out.put_part(narrow(mul(load(value), s), T{}), (n - i) * sizeof(T));
}

}  // namespace
}  // namespace tw
