// int8 linear: symmetric, one bfloat16 scale per block, any blocksize.
//
// scale = bfloat16(fl32(absmax / 127)), 0 if that is below 2^-126, and with it all codes of the block;
// code = the integer nearest to fl32(x * fl32(1 / scale)), ties to even; decoding is fl32(code * scale), then one
// rounding to the output's type, which saturates: 127 times a scale that was rounded up may be beyond it. The same
// holds for -128, which is reported, because no encoder makes it.
//
// Codes stay within +-127: a normal scale is at most 2^-8 too small, and 127 * (1 + 2^-8) rounds to 127. They are
// clamped to -127 nevertheless, because another thread may write to the values between the two readings, and a decoder
// refuses -128.
#include "blocks.h"
#include "kernels.h"

namespace tw {
namespace TW_TIER {
namespace {

Bfloat16 scale_of(uint32_t absmax_bits) {
    Bfloat16 scale;
    from_float(float_of(absmax_bits) / 127.0f, scale);
    return scale.bits < 0x0080 ? Bfloat16{0} : scale;
}

template <class T, class Sink>
void encode(const T* x, size_t n, float inverse, Sink& out) {
    const Floats inv = splat(inverse);
    const size_t next = bytes_to_next<T>(n);
    size_t i = 0;
    for (; i + kInt8s <= n; i += kInt8s) {
        out.put(rounded([&](size_t k) {
            prefetch<kL2>(x + i + k * kLanes, next);
            return mul(load(x + i + k * kLanes), inv);
        }));
    }
    if (i < n) out.put_part(rounded([&](size_t k) { return mul(load_group(x + i, n - i, k), inv); }), n - i);
}

template <class T>
bool quantize(const void* values, int8_t* codes, uint16_t* scales, size_t n, size_t blocksize, bool stream,
              uint32_t* crc) {
    const T* x = static_cast<const T*>(values);
    const auto factor = [=](size_t i, uint32_t largest) {
        const Bfloat16 scale = scale_of(largest);
        put(scales + i, scale.bits);
        return scale.bits ? 1.0f / to_float(scale) : 0.0f;
    };
    bool finite = true;
    write_to<Int8s>(codes, n, blocksize % kInt8s == 0, stream, crc, [&](auto& out) {
        finite = quantize_blocks(x, n, blocksize, factor, [&](const T* block, size_t size, float inverse) {
            encode(block, size, inverse, out);
        });
    });
    return finite;
}

// `largest`: the bits of the codes' magnitudes, gathered over all blocks.
template <class T, bool kSaturate, class Sink>
void decode(const int8_t* codes, size_t n, float scale, Sink& out, Words& largest) {
    const Floats s = splat(scale);
    const auto value = [&](Floats code) {
        largest = max(largest, magnitude(code));
        return decoded<T, kSaturate>(code, s);
    };
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        prefetch<kL1>(codes + i, kPrefetchBytes);
        out.put(value(load_int8(codes + i)));
    }
    if (i < n) out.put_part(value(load_int8_part(codes + i, n - i)), (n - i) * sizeof(T));
}

template <class T, bool kSaturate, class Sink>
bool decode_blocks(const int8_t* codes, const Bfloat16* scales, size_t n, size_t blocksize, Sink& out) {
    Words largest = no_words();
    for (size_t i = 0; i < n; i += blocksize) {
        decode<T, kSaturate>(codes + i, min_size(blocksize, n - i), to_float(get(scales++)), out, largest);
    }
    return max_lane(largest) <= bits_of(127.0f);
}

template <class T, class Sink>
bool decode_into(Sink& out, const int8_t* codes, const uint16_t* scales, size_t n, size_t blocksize) {
    const Bfloat16* s = reinterpret_cast<const Bfloat16*>(scales);
    return overflows<T>(s, blocks_in(n, blocksize), 128) ? decode_blocks<T, true>(codes, s, n, blocksize, out)
                                                         : decode_blocks<T, false>(codes, s, n, blocksize, out);
}

template <class T>
bool dequantize(const int8_t* codes, const uint16_t* scales, void* out, size_t n, size_t blocksize, bool stream) {
    bool good = true;
    write_to<Packed<T>>(out, stream && blocksize % kLanes == 0,
                        [&](auto& sink) { good = decode_into<T>(sink, codes, scales, n, blocksize); });
    return good;
}

template <class T>
bool accumulate(const int8_t* codes, const uint16_t* scales, double* sums, size_t n, size_t blocksize, double weight) {
    Added<T> sink(sums, weight);
    return decode_into<T>(sink, codes, scales, n, blocksize);
}

}  // namespace

void add_linear(Kernels& k) {
    k.quantize_linear[kFloat32] = quantize<float>;
    k.quantize_linear[kFloat16] = quantize<Float16>;
    k.quantize_linear[kBfloat16] = quantize<Bfloat16>;
    k.dequantize_linear[kFloat32] = dequantize<float>;
    k.dequantize_linear[kFloat16] = dequantize<Float16>;
    k.dequantize_linear[kBfloat16] = dequantize<Bfloat16>;
    k.accumulate_linear[kFloat32] = accumulate<float>;
    k.accumulate_linear[kFloat16] = accumulate<Float16>;
    k.accumulate_linear[kBfloat16] = accumulate<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
