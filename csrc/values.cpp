// Numbers as a sign and a magnitude of a few bits, (m + 1/2) * step; and the update of a compressor's state.
//
// Codes stand one behind the other, from the lowest bit of the first byte on; the highest bit of a code is the sign.
// `steps` has one for all numbers, or one each: it is read at i * every.
#include <math.h>

#include "decay.h"
#include "kernels.h"

namespace tw {
namespace TW_TIER {
namespace {

double absolute(float x) { return float_of(bits_of(x) & ~kSignBit); }

// In units of 2^-32 of the largest, magnitudes are integers, so their sum does not depend on the order.
void sum_magnitudes(const float* values, size_t n, float* largest, uint64_t* sum, uint64_t* count) {
    uint32_t top = 0;
    for (size_t i = 0; i < n; ++i) top = max_of(top, bits_of(get(values + i)) & ~kSignBit);
    *largest = float_of(top);
    *sum = *count = 0;
    if (top == 0) return;
    constexpr double kWhole = 0x1p32,
                     kMagic = 0x1p52;  // a number below it that is added to it is rounded to a whole one
    const double whole = *largest;
    uint64_t total = 0, there = 0, none;
    memcpy(&none, &kMagic, sizeof none);
    for (size_t i = 0; i < n; ++i) {
        const double magnitude = absolute(get(values + i)), rounded = magnitude / whole * kWhole + kMagic;
        uint64_t bits;
        memcpy(&bits, &rounded, sizeof bits);
        total += bits - none;
        there += magnitude != 0;
    }
    *sum = total;
    *count = there;
}

template <unsigned kBits>
uint32_t code_of(float value, float step) {
    constexpr float kMost = static_cast<float>((1u << (kBits - 1)) - 1);
    const uint32_t sign = (value < 0 ? 1u : 0u) << (kBits - 1);
    if (kBits == 1 || !(step > 0)) return sign;
    const float scaled = static_cast<float>(absolute(value)) / step;
    return sign | static_cast<uint32_t>(scaled < kMost ? scaled : kMost);
}

template <unsigned kBits>
float number_of(uint32_t code, float step) {
    const float magnitude = (static_cast<float>(code & ((1u << (kBits - 1)) - 1)) + 0.5f) * step;
    return code >> (kBits - 1) ? -magnitude : magnitude;
}

template <unsigned kBits>
void pack_values(const float* values, const float* steps, size_t every, uint8_t* codes, size_t n) {
    constexpr size_t kCodes = kBits < 8 ? 8 / kBits : 1, kBytes = kBits < 8 ? 1 : kBits / 8;
    for (size_t i = 0; i < n; i += kCodes) {
        uint32_t bits = 0;
        for (size_t j = 0; j < kCodes && i + j < n; ++j) {
            bits |= code_of<kBits>(get(values + i + j), get(steps + (i + j) * every)) << j * kBits;
        }
        for (size_t byte = 0; byte < kBytes; ++byte) *codes++ = static_cast<uint8_t>(bits >> 8 * byte);
    }
}

// False: what stands behind the last code is not 0.
template <unsigned kBits>
bool unpack_values(const uint8_t* codes, const float* steps, size_t every, float* values, size_t n) {
    constexpr size_t kCodes = kBits < 8 ? 8 / kBits : 1, kBytes = kBits < 8 ? 1 : kBits / 8;
    const auto number = [&](size_t i, uint32_t bits) {
        return number_of<kBits>(bits & ((1u << kBits) - 1), get(steps + i * every));
    };
    size_t i = 0;
    for (; n - i >= kCodes; i += kCodes) {
        uint32_t bits = 0;
        for (size_t byte = 0; byte < kBytes; ++byte) bits |= uint32_t{*codes++} << 8 * byte;
        for (size_t j = 0; j < kCodes; ++j) put(values + i + j, number(i + j, bits >> j * kBits));
    }
    if (i == n) return true;
    uint32_t bits = *codes;
    for (; i < n; ++i, bits >>= kBits) put(values + i, number(i, bits));
    return bits == 0;
}

// In float64: squares of float32 values neither overflow nor vanish there.
void divide_by_rms(const float* values, float* roots, float* out, size_t n, double beta, double scale, double eps) {
    const double rest = 1 - beta;
    for (size_t i = 0; i < n; ++i) {
        const double x = get(values + i), before = get(roots + i);
        const double root = sqrt(beta * (before * before) + rest * (x * x));
        put(roots + i, static_cast<float>(root));
        put(out + i, static_cast<float>(x / (root * scale + eps)));
    }
}

}  // namespace

void add_values(Kernels& k) {
    k.sum_magnitudes = sum_magnitudes;
    k.pack_values[0] = pack_values<1>;
    k.pack_values[1] = pack_values<2>;
    k.pack_values[2] = pack_values<4>;
    k.pack_values[3] = pack_values<8>;
    k.pack_values[4] = pack_values<16>;
    k.unpack_values[0] = unpack_values<1>;
    k.unpack_values[1] = unpack_values<2>;
    k.unpack_values[2] = unpack_values<4>;
    k.unpack_values[3] = unpack_values<8>;
    k.unpack_values[4] = unpack_values<16>;
    k.decay_and_add[kFloat32] = decay_and_add<float>;
    k.decay_and_add[kFloat16] = decay_and_add<Float16>;
    k.decay_and_add[kBfloat16] = decay_and_add<Bfloat16>;
    k.divide_by_rms = divide_by_rms;
}

}  // namespace TW_TIER
}  // namespace tw
