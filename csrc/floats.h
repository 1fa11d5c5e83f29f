// Scalar floats: unaligned access, bit patterns, and the half types with their conversions in integer arithmetic.
//
// The conversions are branch-free so that compilers vectorise loops over them. Everything has internal linkage: this
// file is compiled into every tier, and a shared inline function might be kept in its AVX-512 version for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace tw {
namespace {

struct Float16 {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

constexpr uint32_t kSignBit = 0x80000000;
constexpr uint32_t kInfinityBits = 0x7F800000;

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
inline T get(const T* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
inline void put(T* p, T value) {
    memcpy(p, &value, sizeof value);
}

// The largest finite value of a type.
template <class T>
constexpr float kLargest = 0x1.fffffep127f;
template <>
constexpr float kLargest<Float16> = 65504.0f;
template <>
constexpr float kLargest<Bfloat16> = 0x1.fep127f;

inline uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

// The index of the lowest set bit; `bits` must not be 0.
inline unsigned lowest_bit(uint64_t bits) {
#ifdef _MSC_VER
    unsigned long place;
    _BitScanForward64(&place, bits);
    return place;
#else
    return static_cast<unsigned>(__builtin_ctzll(bits));
#endif
}

inline size_t blocks_in(size_t n, size_t blocksize) { return n / blocksize + (n % blocksize != 0); }

// How far ahead the vector tiers prefetch what they read in order: two pages, since hardware stops at the end of one.
// Kernels that do little work per line prefetch into the first-level cache. Kernels that work longer on a line, or come
// back to it, prefetch into the second: too many pending fills of the first would delay their own loads.
constexpr size_t kPrefetchBytes = 8192;
enum Cache { kL1, kL2 };

inline float to_float(float value) { return value; }

inline float to_float(Bfloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
    const uint32_t magnitude = value.bits & 0x7FFFu;
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    // Shifting the exponent into place leaves it 112 short, infinities and NaN twice that; NaN becomes quiet.
    const uint32_t rebased = (magnitude << 13) + (112u << 23);
    const uint32_t special = rebased + (112u << 23);
    const uint32_t quiet = magnitude > 0x7C00 ? 0x400000u : 0u;
    // A subnormal is an integer times 2^-24: read its bits as the mantissa of 2^-14, then take 2^-14 away.
    const uint32_t subnormal = bits_of(float_of((magnitude << 13) + (113u << 23)) - 0x1p-14f);
    const uint32_t finite = magnitude < 0x400 ? subnormal : rebased;
    return float_of(sign | (magnitude >= 0x7C00 ? special | quiet : finite));
}

// From float, rounded to nearest even; NaN keeps its sign and top payload bits and becomes quiet.

inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, Bfloat16& out) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40;
    out.bits = static_cast<uint16_t>((bits & ~kSignBit) > kInfinityBits ? quiet : rounded);
}

inline void from_float(float value, Float16& out) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & ~kSignBit;
    const uint32_t sign = (bits >> 16) & 0x8000;
    // Normal: drop 13 bits, half minus one ulp added first, one more if the kept part is odd; 112 off the exponent.
    const uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Below 2^-14 the result is an integer times 2^-24: adding 0.5, whose ulp that is, lets the adder round.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t quiet = 0x7E00 | ((magnitude >> 13) & 0x3FF);
    const uint32_t special = magnitude > kInfinityBits ? quiet : 0x7C00;
    out.bits = static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? special : finite));
}

}  // namespace
}  // namespace tw
