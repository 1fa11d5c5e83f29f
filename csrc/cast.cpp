// float32 <-> float16 and bfloat16: rounded to nearest even, subnormals kept, NaN quieted with its top payload bits.
//
// A finite value overflows from the midpoint between the largest finite value and what would come next. It becomes an
// infinity or, saturating, that largest value; it is counted either way.
#include "kernels.h"
#include "simd.h"

namespace tw {
namespace TW_TIER {
namespace {

template <class Half>
struct Limits;

template <>
struct Limits<Float16> {
    static constexpr uint32_t kOverflowBits = 0x477FF000;  // 65520
    static constexpr float kLargest = 65504.0f;
};

template <>
struct Limits<Bfloat16> {
    static constexpr uint32_t kOverflowBits = 0x7F7F8000;
    static constexpr float kLargest = 0x1.fep127f;
};

template <class Half, bool kSaturate>
uint32_t narrow_piece(const float* x, Half* out, size_t n) {
    uint32_t overflows = 0;
    const auto fitted = [&](Floats v) {
        const Mask over = within(magnitude(v), Limits<Half>::kOverflowBits, kInfinityBits);
        overflows += count(over);
        return kSaturate ? select(over, with_sign_of(splat(Limits<Half>::kLargest), v), v) : v;
    };
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, fitted(load(x + i)));
    if (i < n) store_part(out + i, fitted(load_part(x + i, n - i)), n - i);
    return overflows;
}

template <class Half>
uint64_t narrow_all(const void* values, void* out, size_t n, bool saturate, bool stream) {
    const float* x = static_cast<const float*>(values);
    Out<Half> to(static_cast<Half*>(out), stream);
    uint64_t overflows = 0;
    for (size_t i = 0; i < n; i += kPiece) {
        const size_t length = min_size(kPiece, n - i);
        Half* at = to.room(length);
        overflows += saturate ? narrow_piece<Half, true>(x + i, at, length) : narrow_piece<Half, false>(x + i, at, length);
    }
    return overflows;
}

template <class Half>
void widen_all(const void* values, void* out, size_t n, bool stream) {
    const Half* x = static_cast<const Half*>(values);
    Out<float> to(static_cast<float*>(out), stream);
    for (size_t begin = 0; begin < n; begin += kPiece, x += kPiece) {
        const size_t length = min_size(kPiece, n - begin);
        float* at = to.room(length);
        size_t i = 0;
        for (; i + kLanes <= length; i += kLanes) store(at + i, load(x + i));
        if (i < length) store_part(at + i, load_part(x + i, length - i), length - i);
    }
}

}  // namespace

void add_cast(Kernels& k) {
    k.narrow[kFloat16] = narrow_all<Float16>;
    k.narrow[kBfloat16] = narrow_all<Bfloat16>;
    k.widen[kFloat16] = widen_all<Float16>;
    k.widen[kBfloat16] = widen_all<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
