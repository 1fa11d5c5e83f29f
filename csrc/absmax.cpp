// Block statistics: absmax[i] = the largest |x| of block i, in float32 after exact widening.
#include "blocks.h"
#include "kernels.h"

namespace tw {
namespace TW_TIER {
namespace {

template <class T>
bool blockwise_absmax(const void* values, float* absmax, size_t n, size_t blocksize) {
    const T* x = static_cast<const T*>(values);
    uint32_t worst = 0;
    for (size_t i = 0; i < n; i += blocksize) {
        const uint32_t largest = absmax_of<kL1>(x + i, min_size(blocksize, n - i));
        worst = worst > largest ? worst : largest;
        put(absmax++, float_of(largest));
    }
    return worst < kInfinityBits;
}

}  // namespace

void add_absmax(Kernels& k) {
    k.absmax[kFloat32] = blockwise_absmax<float>;
    k.absmax[kFloat16] = blockwise_absmax<Float16>;
    k.absmax[kBfloat16] = blockwise_absmax<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
