// int8: the 256 values of the dynamic map, a float32 absmax per block, any blocksize.
//
// y = fl32(x * fl32(1 / max(absmax, 1e-38))) goes to the nearest value by the float32 midpoints, a tie to the even
// code. Values are symmetric except that there is no -1, so the encoders find the level of |y| and then apply the
// sign. Decoding is fl32(value of code * absmax), then one rounding to the output's type.
#include "kernels.h"
#include "simd.h"
#include "tables.h"

#if defined(TW_AVX512)
#include "int8_avx512.h"
#else
#include "int8_scalar.h"
#endif

namespace tw {
namespace TW_TIER {
namespace {

template <class T>
bool quantize(const void* values, uint8_t* codes, float* absmax, size_t n, size_t blocksize, bool stream) {
    const T* x = static_cast<const T*>(values);
    Out<uint8_t> out(codes, stream);
    uint32_t worst = 0;
    for (size_t begin = 0; begin < n; begin += blocksize) {
        const size_t end = begin + min_size(blocksize, n - begin);
        const uint32_t largest = absmax_of(x + begin, end - begin);
        worst = max_of(worst, largest);
        put(absmax++, float_of(largest));
        const float inverse = inverse_of(largest);
        for (size_t i = begin; i < end; i += kPiece) {
            const size_t length = min_size(kPiece, end - i);
            encode(x + i, length, inverse, out.room(length));
        }
    }
    return worst < kInfinityBits;
}

template <class T>
void dequantize(const uint8_t* codes, const float* absmax, void* out, size_t n, size_t blocksize, bool stream) {
    Out<T> to(static_cast<T*>(out), stream);
    for (size_t begin = 0; begin < n; begin += blocksize) {
        const size_t end = begin + min_size(blocksize, n - begin);
        const float scale = get(absmax++);
        for (size_t i = begin; i < end; i += kPiece) {
            const size_t length = min_size(kPiece, end - i);
            decode(codes + i, length, scale, to.room(length));
        }
    }
}

}  // namespace

void add_int8(Kernels& k) {
    k.quantize_int8[kFloat32] = quantize<float>;
    k.quantize_int8[kFloat16] = quantize<Float16>;
    k.quantize_int8[kBfloat16] = quantize<Bfloat16>;
    k.dequantize_int8[kFloat32] = dequantize<float>;
    k.dequantize_int8[kFloat16] = dequantize<Float16>;
    k.dequantize_int8[kBfloat16] = dequantize<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
