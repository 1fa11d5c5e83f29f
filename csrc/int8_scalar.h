// int8 in plain C++. No branches: the signs of real data would make them unpredictable.
#pragma once

#include "int8_table.h"

namespace tw {
namespace {

inline uint8_t code_of(float y) {
    const uint32_t negative = bits_of(y) >> 31;
    const uint32_t bits = min_of(max_of(bits_of(y) & ~kSignBit, Int8Buckets::kLowest), Int8Buckets::kHighest);
    const uint32_t entry = kInt8Buckets.entry[(bits >> Int8Buckets::kShift) - Int8Buckets::kFirst];
    const uint32_t reached = (entry + (bits & ((1u << Int8Buckets::kShift) - 1))) >> Int8Buckets::kShift;
    const uint32_t level = min_of(reached, 128 - negative);
    return static_cast<uint8_t>(127 + ((level ^ (0 - negative)) + negative));
}

constexpr size_t kStep = 1;
using PackedCodes = uint8_t;

template <class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    for (size_t i = 0; i < n; ++i) out.put(code_of(load(x + i) * inverse));
}

template <class T, bool kSaturate, class Sink>
inline void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    for (size_t i = 0; i < n; ++i) out.put(decoded<T, kSaturate>(kInt8Code.value[codes[i]], scale));
}

}  // namespace
}  // namespace tw
