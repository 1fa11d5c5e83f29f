// The vector vocabulary of simd.h on one lane: plain C++ that compilers vectorise for the baseline of the target.
#pragma once

#include "floats.h"

namespace tw {
namespace {

constexpr size_t kLanes = 1;

using Floats = float;
using Words = int32_t;
using Mask = bool;

template <Cache>
inline void prefetch(const void*, size_t) {}  // it would keep loops from being vectorised

template <class T>
inline Floats load(const T* p) {
    return to_float(get(p));
}
template <class T>
inline Floats load_part(const T* p, size_t) {
    return load(p);
}

template <class T>
inline T narrow(Floats v, T) {
    T narrowed;
    from_float(v, narrowed);
    return narrowed;
}

template <class T>
inline Floats widen(T v, T) {
    return to_float(v);
}

inline Floats splat(float v) { return v; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline void store(float* p, Floats v) { put(p, v); }
inline void add_weighted(float* sums, Floats v, float weight) { put(sums, get(sums) + weight * v); }
inline void add_weighted(double* sums, Floats v, double weight) { put(sums, get(sums) + weight * v); }
inline Floats clamp(Floats v, float most) { return v > most ? most : v < -most ? -most : v; }
inline Floats select(Mask m, Floats a, Floats b) { return m ? a : b; }
inline Floats with_sign_of(Floats magnitude, Floats sign) {
    return float_of(bits_of(magnitude) | (bits_of(sign) & kSignBit));
}

inline Words no_words() { return 0; }
inline Words magnitude(Floats v) { return static_cast<Words>(bits_of(v) & ~kSignBit); }
inline Words max(Words a, Words b) { return a > b ? a : b; }
inline uint32_t max_lane(Words v) { return static_cast<uint32_t>(v); }
inline Mask within(Words v, uint32_t low, uint32_t high) { return static_cast<uint32_t>(v) - low < high - low; }
inline uint32_t count(Mask m) { return m; }

inline uint32_t reaching(const int32_t* p, int32_t low) { return *p >= low; }
inline Floats load_int8(const int8_t* p) { return static_cast<float>(*p); }
inline Floats load_int8_part(const int8_t* p, size_t) { return load_int8(p); }

// One result at a time.
constexpr size_t kHalves = 1;
template <class Group, class Half>
inline Half narrowed(Group group, Half half) {
    return narrow(group(0), half);
}
constexpr size_t kInt8s = 1;
// Adding 1.5 * 2^23, whose ulp is 1, rounds to the nearest even integer and leaves it in the low bits.
template <class Group>
inline int8_t rounded(Group group) {
    const int8_t code = static_cast<int8_t>(bits_of(group(0) + 0x1.8p23f));
    return code < -127 ? int8_t{-127} : code;
}

template <class V>
inline void store_bytes(uint8_t* to, V v, size_t size) {
    memcpy(to, &v, size);
}

}  // namespace
}  // namespace tw
