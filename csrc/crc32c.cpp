// CRC-32C of memory. Kernels that compute it in their own loop use Summed in simd.h.
#include "crc32c.h"

#include "kernels.h"
#include "simd.h"

#if defined(TW_NEON)
#include <arm_acle.h>
#endif

namespace tw {
namespace TW_TIER {
namespace {

#if defined(TW_AVX512) || defined(TW_AVX2) || defined(TW_NEON)

#if defined(TW_NEON)
inline void fetch(const uint8_t*) {}
inline uint32_t append(uint32_t r, uint64_t eight) { return __crc32cd(r, eight); }
inline uint32_t append(uint32_t r, uint8_t one) { return __crc32cb(r, one); }

// For lack of a carry-less multiplication: bit by bit, in 32 steps.
template <size_t kBits>
inline uint32_t shifted(uint32_t r) {
    constexpr uint32_t kFactor = x_to_the(kBits);
    return times(kFactor, r);
}
#else
inline void fetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline uint32_t append(uint32_t r, uint64_t eight) { return static_cast<uint32_t>(_mm_crc32_u64(r, eight)); }
inline uint32_t append(uint32_t r, uint8_t one) { return _mm_crc32_u8(r, one); }

// The product of two reflected 32-bit polynomials, read as 64 bits, has one factor x too many, and the crc32
// instruction that reduces it multiplies by x^32.
template <size_t kBits>
inline uint32_t shifted(uint32_t r) {
    constexpr uint32_t kFactor = x_to_the(kBits - 33);
    const __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(r)), _mm_cvtsi32_si128(static_cast<int>(kFactor)), 0);
    return append(0, static_cast<uint64_t>(_mm_cvtsi128_si64(product)));
}
#endif

inline uint64_t eight_at(const uint8_t* p) { return get(reinterpret_cast<const uint64_t*>(p)); }

// The instruction takes three cycles but one can start each cycle: three stripes side by side keep it busy.
template <size_t kStripe>
inline uint32_t append_stripes(uint32_t r, const uint8_t*& p, size_t& size) {
    for (; size >= 3 * kStripe; p += 3 * kStripe, size -= 3 * kStripe) {
        uint32_t b = 0, c = 0;
        for (size_t i = 0; i < kStripe; i += 64) {
            for (size_t stripe = 3; stripe < 6; ++stripe) fetch(p + stripe * kStripe + i);
            for (size_t j = i; j < i + 64; j += 8) {
                r = append(r, eight_at(p + j));
                b = append(b, eight_at(p + kStripe + j));
                c = append(c, eight_at(p + 2 * kStripe + j));
            }
        }
        r = shifted<16 * kStripe>(r) ^ shifted<8 * kStripe>(b) ^ c;
    }
    return r;
}

inline uint32_t append_bytes(uint32_t r, const uint8_t* p, size_t size) {
    r = append_stripes<4096>(r, p, size);
    r = append_stripes<256>(r, p, size);
    for (; size >= 8; p += 8, size -= 8) r = append(r, eight_at(p));
    for (; size; ++p, --size) r = append(r, *p);
    return r;
}

#if defined(TW_AVX512)

// Four vectors of four lanes advance together; then they are folded onto the last, whose lanes the crc32 instruction
// reduces in order.
uint32_t append_all(uint32_t r, const uint8_t* p, size_t size) {
    if (size < 512) return append_bytes(r, p, size);
    __m512i a[4];
    for (int k = 0; k < 4; ++k) a[k] = _mm512_loadu_si512(p + 64 * k);
    a[0] = _mm512_xor_si512(a[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(r))));
    for (p += 256, size -= 256; size >= 256; p += 256, size -= 256) {
        for (int k = 0; k < 4; ++k) {
            fetch(p + 64 * k + kPrefetchBytes);
            a[k] = folded<2048>(a[k], _mm512_loadu_si512(p + 64 * k));
        }
    }
    for (int k = 1; k < 4; ++k) a[k] = folded<512>(a[k - 1], a[k]);
    alignas(64) uint64_t last[8];
    _mm512_store_si512(last, a[3]);
    r = 0;
    for (uint64_t eight : last) r = append(r, eight);
    return append_bytes(r, p, size);
}

#else

uint32_t append_all(uint32_t r, const uint8_t* p, size_t size) { return append_bytes(r, p, size); }

#endif

#else

// Without an instruction for it: slicing by sixteen. of[k][b] is the CRC of byte b followed by k zero bytes.
constexpr size_t kSliced = 16;

struct SliceTables {
    uint32_t of[kSliced][256] = {};
    constexpr SliceTables() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t r = byte;
            for (size_t k = 0; k < kSliced; ++k) {
                for (int bit = 0; bit < 8; ++bit) r = times_x(r);
                of[k][byte] = r;
            }
        }
    }
};
constexpr SliceTables kSlice;

// What four bytes, the first one lowest, contribute with `after` bytes after them.
inline uint32_t slice(uint32_t four, size_t after) {
    return kSlice.of[after + 3][four & 0xFF] ^ kSlice.of[after + 2][four >> 8 & 0xFF] ^
           kSlice.of[after + 1][four >> 16 & 0xFF] ^ kSlice.of[after][four >> 24];
}

inline uint32_t four_at(const uint8_t* p) {
    return p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
}

inline uint32_t append_sixteen(uint32_t r, const uint8_t* p) {
    return slice(r ^ four_at(p), 12) ^ slice(four_at(p + 4), 8) ^ slice(four_at(p + 8), 4) ^ slice(four_at(p + 12), 0);
}

// Each step waits for the look-ups of the step before, so two stripes are processed side by side.
uint32_t append_all(uint32_t r, const uint8_t* p, size_t size) {
    constexpr size_t kStripe = 8192;
    constexpr uint32_t kOverStripe = x_to_the(8 * kStripe);
    for (; size >= 2 * kStripe; p += 2 * kStripe, size -= 2 * kStripe) {
        uint32_t b = 0;
        for (size_t i = 0; i < kStripe; i += kSliced) {
            r = append_sixteen(r, p + i);
            b = append_sixteen(b, p + kStripe + i);
        }
        r = times(kOverStripe, r) ^ b;
    }
    for (; size >= kSliced; p += kSliced, size -= kSliced) r = append_sixteen(r, p);
    for (; size; ++p, --size) r = r >> 8 ^ kSlice.of[0][(r ^ *p) & 0xFF];
    return r;
}

#endif

}  // namespace

uint32_t crc32c(uint32_t checksum, const void* data, size_t size) {
    return ~append_all(~checksum, static_cast<const uint8_t*>(data), size);
}

void add_crc32c(Kernels& k) { k.crc32c = crc32c; }

}  // namespace TW_TIER
}  // namespace tw
