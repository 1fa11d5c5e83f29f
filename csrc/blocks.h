// The walk over the blocks of a quantizer: statistic first, then codes, with memory kept busy throughout.
#pragma once

#include "simd.h"

namespace tw {
namespace {

// The largest magnitude as float bits. The order of magnitudes is that of their bits as integers, with infinity and
// then NaN above every finite value: kInfinityBits or more means "not all finite".
template <class T>
inline uint32_t absmax_of(const T* x, size_t n) {
    Words largest = no_words();
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        prefetch(x + i, kPrefetchBytes);
        largest = max(largest, magnitude(load(x + i)));
    }
    if (i < n) largest = max(largest, magnitude(load_part(x + i, n - i)));
    return max_lane(largest);
}

// bitsandbytes' guard against an all-zero block: 1 / 1e-38 is still finite.
inline float inverse_of(uint32_t absmax_bits) {
    const float absmax = float_of(absmax_bits);
    return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
}

// For each block i, factor(i, largest magnitude as bits), then encode(x, n, factor) in order; whether all is finite.
//
// Small blocks have their statistic taken some blocks before they are encoded: a block's maximum and reciprocal are a
// long chain of dependent instructions, which would otherwise stand between one block's work and the next's.
template <class T, class Factor, class Encode>
inline bool quantize_blocks(const T* x, size_t n, size_t blocksize, Factor factor, Encode encode) {
    constexpr size_t kRing = 16, kAheadElements = 1024;
    const size_t blocks = n / blocksize + (n % blocksize != 0);
    const size_t ahead = min_size(kRing - 1, kAheadElements / blocksize);
    uint32_t worst = 0;
    float factors[kRing];
    size_t looked = 0;
    for (size_t i = 0; i < blocks; ++i) {
        for (; looked < blocks && looked <= i + ahead; ++looked) {
            const size_t begin = looked * blocksize;
            const uint32_t largest = absmax_of(x + begin, min_size(blocksize, n - begin));
            worst = worst > largest ? worst : largest;
            factors[looked % kRing] = factor(looked, largest);
        }
        const size_t begin = i * blocksize;
        encode(x + begin, min_size(blocksize, n - begin), factors[i % kRing]);
    }
    return worst < kInfinityBits;
}

}  // namespace
}  // namespace tw
