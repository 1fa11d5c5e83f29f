// Arithmetic of CRC-32C (Castagnoli, RFC 3720): reflected, initial and final complement.
//
// A register holds a polynomial over GF(2) modulo P with bit 31 as x^0. Appending k bits multiplies it by x^k and adds
// the appended bits. So the parts of a message can be processed separately, moved into place by a multiplication, and
// added. The constants x^k mod P are computed at compile time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tw {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;

constexpr uint32_t times_x(uint32_t a) { return a >> 1 ^ (a & 1 ? kPolynomial : 0); }

constexpr uint32_t x_to_the(size_t power) {
    uint32_t a = 0x80000000;
    while (power--) a = times_x(a);
    return a;
}

constexpr uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 0x80000000; bit; bit >>= 1) {
        product ^= a & bit ? b : 0;
        b = times_x(b);
    }
    return product;
}

// The register that becomes `a` when `power` zero bits are appended.
constexpr uint32_t over_x_to_the(size_t power, uint32_t a) {
    while (power--) a = a >> 31 ? (a ^ kPolynomial) << 1 | 1 : a << 1;
    return a;
}

struct BytePowers {
    uint32_t of[64] = {};  // x^(8 * 2^k)
    constexpr BytePowers() {
        of[0] = x_to_the(8);
        for (int k = 1; k < 64; ++k) of[k] = times(of[k - 1], of[k - 1]);
    }
};
constexpr BytePowers kBytePowers;

// What a part with this checksum adds to the checksum of a message in which `bytes` more follow it.
inline uint32_t moved_ahead(uint32_t checksum, size_t bytes) {
    for (int k = 0; bytes; ++k, bytes >>= 1) {
        if (bytes & 1) checksum = times(checksum, kBytePowers.of[k]);
    }
    return checksum;
}

}  // namespace
}  // namespace tw
