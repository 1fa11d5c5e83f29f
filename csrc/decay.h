// A compressor's update: what it keeps of a tensor, with a new gradient added.
#pragma once

#include "simd.h"

namespace tw {
namespace {

// kept = beta * kept + new, each rounded; the largest magnitude of what is kept then. Values are finite.
template <class T>
float decay_and_add(float* kept, const void* values, size_t n, float beta) {
    const T* x = static_cast<const T*>(values);
    const Floats factor = splat(beta);
    Words largest = no_words();
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        prefetch<kL1>(x + i, kPrefetchBytes);
        const Floats sum = add(mul(factor, load(kept + i)), load(x + i));
        largest = max(largest, magnitude(sum));
        store(kept + i, sum);
    }
    if (i < n) {
        const Floats sum = add(mul(factor, load_part(kept + i, n - i)), load_part(x + i, n - i));
        largest = max(largest, magnitude(sum));
        store_bytes(reinterpret_cast<uint8_t*>(kept + i), narrow(sum, float{}), (n - i) * sizeof(float));
    }
    return float_of(static_cast<uint32_t>(max_lane(largest)));
}

}  // namespace
}  // namespace tw
