// 4 bits: NF4 and FP4, a float32 absmax per block, two codes per byte with the even element in the high nibble.
//
// y = fl32(x * fl32(1 / max(absmax, 1e-38))). NF4's code is the number of thresholds strictly below y. FP4's level is
// the number of thresholds strictly below |y|, with bit 3 of the code set iff y < 0. The last low nibble of an odd n
// is 0. Decoding is fl32(value of code * absmax), then one rounding to the output's type, which saturates.
#include "blocks.h"
#include "kernels.h"
#include "tables.h"

#if defined(TW_AVX512)
#include "fourbit_avx512.h"
#elif defined(TW_AVX2)
#include "fourbit_avx2.h"
#else
#include "fourbit_scalar.h"
#endif

namespace tw {
namespace TW_TIER {
namespace {

template <QuantType Q, class T>
bool quantize(const void* values, uint8_t* codes, float* absmax, size_t n, size_t blocksize, bool stream) {
    const T* x = static_cast<const T*>(values);
    const auto factor = [=](size_t i, uint32_t largest) {
        put(absmax + i, float_of(largest));
        return inverse_of(largest);
    };
    bool finite = true;
    write_to<PackedCodes>(codes, stream && blocksize % kStep == 0, [&](auto& out) {
        finite = quantize_blocks(x, n, blocksize, factor, [&](const T* block, size_t size, float inverse) {
            encode<Q>(block, size, inverse, out);
        });
    });
    return finite;
}

template <QuantType Q, class T, bool kSaturate, class Sink>
void decode_blocks(const uint8_t* codes, const float* absmax, size_t n, size_t blocksize, Sink& out) {
    for (size_t i = 0; i < n; i += blocksize) {
        decode<Q, T, kSaturate>(codes + i / 2, min_size(blocksize, n - i), get(absmax + i / blocksize), out);
    }
}

template <QuantType Q, class T, class Sink>
void decode_into(Sink& out, const uint8_t* codes, const float* absmax, size_t n, size_t blocksize) {
    if (overflows<T>(absmax, blocks_in(n, blocksize), 1)) {
        decode_blocks<Q, T, true>(codes, absmax, n, blocksize, out);
    } else {
        decode_blocks<Q, T, false>(codes, absmax, n, blocksize, out);
    }
}

template <QuantType Q, class T>
void dequantize(const uint8_t* codes, const float* absmax, void* out, size_t n, size_t blocksize, bool stream) {
    write_to<Packed<T>>(out, stream && blocksize % kStep == 0,
                        [&](auto& sink) { decode_into<Q, T>(sink, codes, absmax, n, blocksize); });
}

template <QuantType Q, class T>
void accumulate(const uint8_t* codes, const float* absmax, double* sums, size_t n, size_t blocksize, double weight) {
    Added<T> sink(sums, weight);
    decode_into<Q, T>(sink, codes, absmax, n, blocksize);
}

template <QuantType Q>
void add(Kernels& k) {
    k.quantize_4bit[Q][kFloat32] = quantize<Q, float>;
    k.quantize_4bit[Q][kFloat16] = quantize<Q, Float16>;
    k.quantize_4bit[Q][kBfloat16] = quantize<Q, Bfloat16>;
    k.dequantize_4bit[Q][kFloat32] = dequantize<Q, float>;
    k.dequantize_4bit[Q][kFloat16] = dequantize<Q, Float16>;
    k.dequantize_4bit[Q][kBfloat16] = dequantize<Q, Bfloat16>;
    k.accumulate_4bit[Q][kFloat32] = accumulate<Q, float>;
    k.accumulate_4bit[Q][kFloat16] = accumulate<Q, Float16>;
    k.accumulate_4bit[Q][kBfloat16] = accumulate<Q, Bfloat16>;
}

}  // namespace

void add_fourbit(Kernels& k) {
    add<kNf4>(k);
    add<kFp4>(k);
}

}  // namespace TW_TIER
}  // namespace tw
