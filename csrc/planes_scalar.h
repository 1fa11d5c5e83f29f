// The vectors of bytes that planes.cpp uses, in loops that compilers vectorise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tw {
namespace {

struct Vector {
    uint8_t bytes[16];
};

inline Vector load_vector(const uint8_t* from) {
    Vector v;
    memcpy(v.bytes, from, sizeof v);
    return v;
}
inline void store_vector(uint8_t* to, Vector v) { memcpy(to, v.bytes, sizeof v); }
inline Vector repeated(uint8_t byte) {
    Vector v;
    memset(v.bytes, byte, sizeof v);
    return v;
}

inline Vector every_second(const Vector& a, const Vector& b, size_t from) {
    Vector v;
    for (size_t i = 0; i < 8; ++i) v.bytes[i] = a.bytes[2 * i + from];
    for (size_t i = 0; i < 8; ++i) v.bytes[8 + i] = b.bytes[2 * i + from];
    return v;
}
inline Vector even_bytes(const Vector& a, const Vector& b) { return every_second(a, b, 0); }
inline Vector odd_bytes(const Vector& a, const Vector& b) { return every_second(a, b, 1); }

inline Vector pairs(const Vector& even, const Vector& odd, size_t from) {
    Vector v;
    for (size_t i = 0; i < 8; ++i) {
        v.bytes[2 * i] = even.bytes[from + i];
        v.bytes[2 * i + 1] = odd.bytes[from + i];
    }
    return v;
}
inline Vector first_pairs(const Vector& even, const Vector& odd) { return pairs(even, odd, 0); }
inline Vector second_pairs(const Vector& even, const Vector& odd) { return pairs(even, odd, 8); }

// The upper 16 bits of each element of kWidth bytes, rotated.
template <size_t kWidth>
inline Vector rotated_left(Vector v) {
    if constexpr (kWidth == 1) return v;
    for (size_t i = kWidth - 2; i < sizeof v; i += kWidth) {
        const unsigned low = v.bytes[i], high = v.bytes[i + 1];
        v.bytes[i] = static_cast<uint8_t>(low << 1 | high >> 7);
        v.bytes[i + 1] = static_cast<uint8_t>(high << 1 | low >> 7);
    }
    return v;
}
template <size_t kWidth>
inline Vector rotated_right(Vector v) {
    if constexpr (kWidth == 1) return v;
    for (size_t i = kWidth - 2; i < sizeof v; i += kWidth) {
        const unsigned low = v.bytes[i], high = v.bytes[i + 1];
        v.bytes[i] = static_cast<uint8_t>(low >> 1 | high << 7);
        v.bytes[i + 1] = static_cast<uint8_t>(high >> 1 | low << 7);
    }
    return v;
}

}  // namespace
}  // namespace tw
