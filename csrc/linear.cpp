// int8 linear: symmetric, one bfloat16 scale per block, any blocksize.
//
// scale = bfloat16(fl32(absmax / 127)), 0 if that is below 2^-126, and with it all codes of the block;
// code = the integer nearest to fl32(x * fl32(1 / scale)), ties to even; decoding is fl32(code * scale).
// Codes need no clamp to +-127: a normal scale is at most 2^-9 too small, and 127 * (1 + 2^-8) rounds to 127.
#include "kernels.h"
#include "simd.h"

namespace tw {
namespace TW_TIER {
namespace {

Bfloat16 scale_of(uint32_t absmax_bits) {
    Bfloat16 scale;
    from_float(float_of(absmax_bits) / 127.0f, scale);
    return scale.bits < 0x0080 ? Bfloat16{0} : scale;
}

template <class T>
void encode(const T* x, size_t n, float inverse, int8_t* codes) {
    const Floats inv = splat(inverse);
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_int8(codes + i, mul(load(x + i), inv));
    if (i < n) store_int8_part(codes + i, mul(load_part(x + i, n - i), inv), n - i);
}

template <class T>
bool quantize(const void* values, int8_t* codes, uint16_t* scales, size_t n, size_t blocksize, bool stream) {
    const T* x = static_cast<const T*>(values);
    Out<int8_t> out(codes, stream);
    uint32_t worst = 0;
    for (size_t begin = 0; begin < n; begin += blocksize) {
        const size_t end = begin + min_size(blocksize, n - begin);
        const uint32_t largest = absmax_of(x + begin, end - begin);
        worst = max_of(worst, largest);
        const Bfloat16 scale = scale_of(largest);
        put(scales++, scale.bits);
        const float inverse = scale.bits ? 1.0f / to_float(scale) : 0.0f;
        for (size_t i = begin; i < end; i += kPiece) {
            const size_t length = min_size(kPiece, end - i);
            encode(x + i, length, inverse, out.room(length));
        }
    }
    return worst < kInfinityBits;
}

template <class T>
void decode(const int8_t* codes, size_t n, float scale, T* out) {
    const Floats s = splat(scale);
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(load_int8(codes + i), s));
    if (i < n) store_part(out + i, mul(load_int8_part(codes + i, n - i), s), n - i);
}

template <class T>
void dequantize(const int8_t* codes, const uint16_t* scales, void* out, size_t n, size_t blocksize, bool stream) {
    Out<T> to(static_cast<T*>(out), stream);
    for (size_t begin = 0; begin < n; begin += blocksize) {
        const size_t end = begin + min_size(blocksize, n - begin);
        const float scale = to_float(Bfloat16{get(scales++)});
        for (size_t i = begin; i < end; i += kPiece) {
            const size_t length = min_size(kPiece, end - i);
            decode(codes + i, length, scale, to.room(length));
        }
    }
}

}  // namespace

void add_linear(Kernels& k) {
    k.quantize_linear[kFloat32] = quantize<float>;
    k.quantize_linear[kFloat16] = quantize<Float16>;
    k.quantize_linear[kBfloat16] = quantize<Bfloat16>;
    k.dequantize_linear[kFloat32] = dequantize<float>;
    k.dequantize_linear[kFloat16] = dequantize<Float16>;
    k.dequantize_linear[kBfloat16] = dequantize<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
