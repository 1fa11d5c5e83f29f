// The loop over the blocks of a quantizer: first the statistic, then the codes, with memory kept busy throughout.
#pragma once

#include "simd.h"

namespace tw {
namespace {

// The largest magnitude as float bits. The order of magnitudes is that of their bits as integers, with infinity and
// then NaN above every finite value: kInfinityBits or more means "not all finite".
template <Cache kFetchTo, class T>
inline uint32_t absmax_of(const T* x, size_t n) {
    Words largest = no_words();
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        prefetch<kFetchTo>(x + i, kPrefetchBytes);
        largest = max(largest, magnitude(load(x + i)));
    }
    if (i < n) largest = max(largest, magnitude(load_part(x + i, n - i)));
    return max_lane(largest);
}

// Whether one of n scales may bring a code, whose value is at most `most`, beyond the range of T.
template <class T, class Scale>
inline bool overflows(const Scale* scales, size_t n, float most) {
    return !(float_of(absmax_of<kL1>(scales, n)) * most <= kLargest<T>);
}

// For blocks of fewer elements, the statistic is computed some blocks ahead: enough to hide the chain of instructions,
// but few, because the second reading costs less the sooner it comes.
constexpr size_t kLargeBlock = 1024;
constexpr size_t kBlocksAhead = 4;

// While a larger block is encoded, the next one, of the same size, is prefetched from this many bytes on, but only as
// much as the second-level cache can keep.
template <class T>
inline size_t bytes_to_next(size_t n) {
    return n >= kLargeBlock ? min_size(n, 8192) * sizeof(T) : 0;
}

// bitsandbytes' guard against an all-zero block: 1 / 1e-38 is still finite.
inline float inverse_of(uint32_t absmax_bits) {
    const float absmax = float_of(absmax_bits);
    return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
}

// The blocksize for which the loop is compiled specially: the default of 4-bit quantization. Whole blocks only.
struct Fixed64 {
    constexpr operator size_t() const { return 64; }
};

inline size_t size_of_block(Fixed64, size_t) { return 64; }
inline size_t size_of_block(size_t blocksize, size_t left) { return min_size(blocksize, left); }

// For each block i from `first`, calls factor(i, largest magnitude as bits), then encode(x, n, factor). Returns the
// largest magnitude of all.
//
// For small blocks, the statistic is computed some blocks before they are encoded: a block's maximum and reciprocal are
// a long chain of dependent instructions, which would otherwise delay every block.
template <class T, class Size, class Factor, class Encode>
inline uint32_t walk_blocks(const T* x, size_t n, Size blocksize, size_t first, Factor factor, Encode encode) {
    constexpr size_t kRing = 8;
    const size_t blocks = blocks_in(n, blocksize);
    const size_t ahead = blocksize < kLargeBlock ? kBlocksAhead : 0;
    uint32_t worst = 0;
    float factors[kRing];
    const auto size = [&](size_t i) { return size_of_block(blocksize, n - i * blocksize); };
    const auto look = [&](size_t i) {
        const uint32_t largest = absmax_of<kL2>(x + i * blocksize, size(i));
        worst = worst > largest ? worst : largest;
        factors[i % kRing] = factor(first + i, largest);
    };
    for (size_t i = 0; i < min_size(ahead, blocks); ++i) look(i);
    for (size_t i = 0; i < blocks; ++i) {
        if (i + ahead < blocks) look(i + ahead);
        encode(x + i * blocksize, size(i), factors[i % kRing]);
    }
    return worst;
}

// The loop over all blocks. Returns whether all values are finite.
template <class T, class Factor, class Encode>
inline bool quantize_blocks(const T* x, size_t n, size_t blocksize, Factor factor, Encode encode) {
    const size_t fixed = blocksize == Fixed64{} ? n / 64 : 0;
    const uint32_t most = walk_blocks(x, fixed * 64, Fixed64{}, 0, factor, encode);
    const uint32_t rest = walk_blocks(x + fixed * 64, n - fixed * 64, blocksize, fixed, factor, encode);
    return (most > rest ? most : rest) < kInfinityBits;
}

}  // namespace
}  // namespace tw
