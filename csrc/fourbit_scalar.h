// NF4 and FP4 in plain C++. NF4 is encoded by the buckets of fourbit_buckets.h; FP4 has so few thresholds that
// comparing with all of them, which vectorises, is faster. Decoding looks up both values of a byte at once.
#pragma once

#include "fourbit_buckets.h"

namespace tw {
namespace {

inline uint32_t nf4_code(float y) {
    const uint32_t bucket = bits_of(y * Nf4Search::kScale + (0x1p23f + Nf4Search::kOffset)) % 32;
    return kNf4Search.code[bucket + 32u * (y > kNf4Search.threshold[bucket])];
}

inline uint32_t fp4_code(float y) {
    const float size = float_of(bits_of(y) & ~kSignBit);
    uint32_t level = 0;
    for (float t : kFp4Thresholds) level += size > t;
    return fp4_code_of_level(level) | 8u * (y < 0);
}

inline uint8_t packed(uint32_t high, uint32_t low) { return static_cast<uint8_t>(high << 4 | low); }

constexpr size_t kStep = 2;
using PackedCodes = uint8_t;

template <QuantType Q, class T, class Sink>
inline void encode(const T* x, size_t n, float inverse, Sink& out) {
    const auto y = [&](size_t i) { return load(x + i) * inverse; };
    if constexpr (Q == kNf4) {
        for (size_t i = 0; i + 2 <= n; i += 2) out.put(packed(nf4_code(y(i)), nf4_code(y(i + 1))));
        if (n % 2) out.put(packed(nf4_code(y(n - 1)), 0));
        return;
    }
    constexpr size_t kTile = 64;
    uint32_t tile[kTile + 1];
    for (size_t begin = 0; begin < n; begin += kTile) {
        const size_t size = min_size(kTile, n - begin);
        for (size_t i = 0; i < size; ++i) tile[i] = fp4_code(y(begin + i));
        tile[size] = 0;
        for (size_t i = 0; i < size; i += 2) out.put(packed(tile[i], tile[i + 1]));
    }
}

struct CodePairs {
    float value[256][2] = {};
    constexpr explicit CodePairs(const Code16& code) {
        for (int byte = 0; byte < 256; ++byte) {
            value[byte][0] = code.value[byte >> 4];
            value[byte][1] = code.value[byte & 15];
        }
    }
};
constexpr CodePairs kNf4Pairs{kNf4Code};
constexpr CodePairs kFp4Pairs{kFp4Code};

template <QuantType Q, class T, bool kSaturate, class Sink>
void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const auto& value = Q == kNf4 ? kNf4Pairs.value : kFp4Pairs.value;
    for (size_t i = 0; i + 2 <= n; i += 2) {
        const float* pair = value[*codes++];
        out.put(decoded<T, kSaturate>(pair[0], scale));
        out.put(decoded<T, kSaturate>(pair[1], scale));
    }
    if (n % 2) out.put(decoded<T, kSaturate>(value[*codes][0], scale));
}

}  // namespace
}  // namespace tw
