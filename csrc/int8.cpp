// int8: the 256 values of the dynamic map, a float32 absmax per block, any blocksize.
//
// y = fl32(x * fl32(1 / max(absmax, 1e-38))) goes to the nearest value by the float32 midpoints, a tie to the even
// code. Values are symmetric except that there is no -1, so the encoders find the level of |y| and then apply the
// sign. Decoding is fl32(value of code * absmax), then one rounding to the output's type, which
// saturates.
#include "blocks.h"
#include "kernels.h"
#include "tables.h"

#if defined(TW_AVX512)
#include "int8_avx512.h"
#elif defined(TW_AVX2)
#include "int8_avx2.h"
#else
#include "int8_scalar.h"
#endif

namespace tw {
namespace TW_TIER {
namespace {

template <class T>
bool quantize(const void* values, uint8_t* codes, float* absmax, size_t n, size_t blocksize, bool stream) {
    const T* x = static_cast<const T*>(values);
    const auto factor = [=](size_t i, uint32_t largest) {
        put(absmax + i, float_of(largest));
        return inverse_of(largest);
    };
    bool finite = true;
    write_to<PackedCodes>(codes, stream && blocksize % kStep == 0, [&](auto& out) {
        finite = quantize_blocks(x, n, blocksize, factor, [&](const T* block, size_t size, float inverse) {
            encode(block, size, inverse, out);
        });
    });
    return finite;
}

template <class T, bool kSaturate, class Sink>
void decode_blocks(const uint8_t* codes, const float* absmax, size_t n, size_t blocksize, Sink& out) {
    for (size_t i = 0; i < n; i += blocksize) {
        decode<T, kSaturate>(codes + i, min_size(blocksize, n - i), get(absmax++), out);
    }
}

template <class T, class Sink>
void decode_into(Sink& out, const uint8_t* codes, const float* absmax, size_t n, size_t blocksize) {
    if (overflows<T>(absmax, blocks_in(n, blocksize), 1)) {
        decode_blocks<T, true>(codes, absmax, n, blocksize, out);
    } else {
        decode_blocks<T, false>(codes, absmax, n, blocksize, out);
    }
}

template <class T>
void dequantize(const uint8_t* codes, const float* absmax, void* out, size_t n, size_t blocksize, bool stream) {
    write_to<Packed<T>>(out, stream && blocksize % kStep == 0,
                        [&](auto& sink) { decode_into<T>(sink, codes, absmax, n, blocksize); });
}

template <class T>
void accumulate(const uint8_t* codes, const float* absmax, double* sums, size_t n, size_t blocksize, double weight) {
    Added<T> sink(sums, weight);
    decode_into<T>(sink, codes, absmax, n, blocksize);
}

}  // namespace

void add_int8(Kernels& k) {
    k.quantize_int8[kFloat32] = quantize<float>;
    k.quantize_int8[kFloat16] = quantize<Float16>;
    k.quantize_int8[kBfloat16] = quantize<Bfloat16>;
    k.dequantize_int8[kFloat32] = dequantize<float>;
    k.dequantize_int8[kFloat16] = dequantize<Float16>;
    k.dequantize_int8[kBfloat16] = dequantize<Bfloat16>;
    k.accumulate_int8[kFloat32] = accumulate<float>;
    k.accumulate_int8[kFloat16] = accumulate<Float16>;
    k.accumulate_int8[kBfloat16] = accumulate<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
