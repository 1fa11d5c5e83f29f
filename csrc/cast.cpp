// float32 <-> float16 and bfloat16: rounded to nearest even, subnormals kept, NaN quieted with its top payload bits.
//
// A finite value overflows from the midpoint between the largest finite value and the next step beyond it. It becomes
// an infinity or, saturating, the largest value; it is counted either way.
// The file also has accumulation: values of any of these types, or float32, times a weight, added to float64 sums.
#include "kernels.h"
#include "simd.h"

namespace tw {
namespace TW_TIER {
namespace {

template <class Half>
constexpr uint32_t kOverflowBits = 0;
template <>
constexpr uint32_t kOverflowBits<Float16> = 0x477FF000;  // 65520
template <>
constexpr uint32_t kOverflowBits<Bfloat16> = 0x7F7F8000;

template <class Half, bool kSaturate, class Sink>
uint64_t narrow_into(const float* x, size_t n, Sink& out) {
    uint32_t overflows = 0;
    const auto fitted = [&](Floats v) {
        const Mask over = within(magnitude(v), kOverflowBits<Half>, kInfinityBits);
        overflows += count(over);
        return kSaturate ? select(over, with_sign_of(splat(kLargest<Half>), v), v) : v;
    };
    uint64_t total = 0;
    constexpr size_t kPiece = 4096;  // of which the overflows are counted in 32 bits, as compilers vectorise
    for (size_t begin = 0; begin < n; begin += kPiece) {
        const size_t end = begin + min_size(kPiece, n - begin);
        size_t i = begin;
        for (; i + kHalves <= end; i += kHalves) {
            const auto group = [&](size_t k) {
                prefetch<kL1>(x + i + k * kLanes, kPrefetchBytes);
                return fitted(load(x + i + k * kLanes));
            };
            out.put(narrowed(group, Half{}));
        }
        if (i < end) {
            const auto group = [&](size_t k) { return fitted(load_group(x + i, end - i, k)); };
            out.put_part(narrowed(group, Half{}), (end - i) * sizeof(Half));
        }
        total += overflows;
        overflows = 0;
    }
    return total;
}

template <class Half>
uint64_t narrow_all(const void* values, void* out, size_t n, bool saturate, bool stream, uint32_t* crc) {
    const float* x = static_cast<const float*>(values);
    uint64_t overflows = 0;
    write_to<Halves<Half>>(out, n * sizeof(Half), true, stream, crc, [&](auto& sink) {
        overflows = saturate ? narrow_into<Half, true>(x, n, sink) : narrow_into<Half, false>(x, n, sink);
    });
    return overflows;
}

template <class Half>
void widen_all(const void* values, void* out, size_t n, bool stream) {
    const Half* x = static_cast<const Half*>(values);
    write_to<Packed<float>>(out, stream, [&](auto& sink) {
        size_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            prefetch<kL1>(x + i, kPrefetchBytes);
            sink.put(narrow(load(x + i), float{}));
        }
        if (i < n) sink.put_part(narrow(load_part(x + i, n - i), float{}), (n - i) * sizeof(float));
    });
}

template <class T>
void accumulate(const void* values, double* sums, size_t n, double weight) {
    const T* x = static_cast<const T*>(values);
    Added<float> sink(sums, weight);
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        prefetch<kL1>(x + i, kPrefetchBytes);
        sink.put(narrow(load(x + i), float{}));
    }
    if (i < n) sink.put_part(narrow(load_part(x + i, n - i), float{}), (n - i) * sizeof(float));
}

}  // namespace

void add_cast(Kernels& k) {
    k.narrow[kFloat16] = narrow_all<Float16>;
    k.narrow[kBfloat16] = narrow_all<Bfloat16>;
    k.widen[kFloat16] = widen_all<Float16>;
    k.widen[kBfloat16] = widen_all<Bfloat16>;
    k.accumulate[kFloat32] = accumulate<float>;
    k.accumulate[kFloat16] = accumulate<Float16>;
    k.accumulate[kBfloat16] = accumulate<Bfloat16>;
}

}  // namespace TW_TIER
}  // namespace tw
