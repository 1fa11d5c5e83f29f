// NF4 and FP4 in plain C++. Encoding compares with every threshold and adds up, which vectorises without look-ups;
// decoding looks up both values of a byte at once.
#pragma once

namespace tw {
namespace {

template <QuantType Q>
inline int32_t code_of(float y) {
    int32_t code = 0;
    if (Q == kNf4) {
        for (float t : kNf4Thresholds.t) code += y > t;
        return code;
    }
    const float magnitude = y < 0 ? -y : y;
    for (float t : kFp4Thresholds) code += magnitude > t;
    return fp4_code_of_level(code) | (y < 0 ? 8 : 0);
}

constexpr size_t kStep = 2;
using PackedCodes = uint8_t;

template <QuantType Q, class T, class Sink>
void encode(const T* x, size_t n, float inverse, Sink& out) {
    constexpr size_t kTile = 64;
    int32_t tile[kTile];
    size_t i = 0;
    for (; i + kTile <= n; i += kTile) {
        for (size_t j = 0; j < kTile; ++j) tile[j] = code_of<Q>(to_float(get(x + i + j)) * inverse);
        for (size_t j = 0; j < kTile; j += 2) out.put(static_cast<uint8_t>(tile[j] << 4 | tile[j + 1]));
    }
    for (; i < n; i += 2) {
        const int32_t high = code_of<Q>(to_float(get(x + i)) * inverse);
        const int32_t low = i + 1 < n ? code_of<Q>(to_float(get(x + i + 1)) * inverse) : 0;
        out.put(static_cast<uint8_t>(high << 4 | low));
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

template <QuantType Q, class T, class Sink>
void decode(const uint8_t* codes, size_t n, float scale, Sink& out) {
    const auto& value = Q == kNf4 ? kNf4Pairs.value : kFp4Pairs.value;
    for (size_t i = 0; i + 2 <= n; i += 2) {
        const float* pair = value[*codes++];
        out.put(narrow(pair[0] * scale, T{}));
        out.put(narrow(pair[1] * scale, T{}));
    }
    if (n % 2) out.put(narrow(value[*codes][0] * scale, T{}));
}

}  // namespace
}  // namespace tw
