// Byte planes: plane p is byte p of every element, after rotating the upper 16 bits of each left by one. The rotation
// moves the sign of a float below its exponent, so that the exponent's upper 8 bits form a plane of their own.
//
// Elements form blocks of 64. A block whose bit in `marks` is not set is all zeros and is left out of the planes.
#include "kernels.h"

#if defined(TW_AVX512)
#include "planes_avx512.h"
#elif defined(TW_AVX2)
#include "planes_avx2.h"
#else
#include "planes_scalar.h"
#endif

#include <cstring>

namespace tw {
namespace TW_TIER {
namespace {

bool marked(const uint8_t* marks, size_t block) { return marks[block / 8] >> block % 8 & 1; }

bool any_nonzero(const uint8_t* x, size_t n) {
    uint64_t bits = 0;
    size_t i = 0;
    for (; i + sizeof bits <= n; i += sizeof bits) {
        uint64_t word;
        memcpy(&word, x + i, sizeof word);
        bits |= word;
    }
    for (; i < n; ++i) bits |= x[i];
    return bits != 0;
}

size_t nonzero_blocks(const uint8_t* x, size_t n, size_t blocksize, uint8_t* marks) {
    size_t found = 0, block = 0;
    memset(marks, 0, (n / blocksize + (n % blocksize != 0) + 7) / 8);
    for (size_t i = 0; i < n; i += blocksize, ++block) {
        const unsigned mark = any_nonzero(x + i, n - i < blocksize ? n - i : blocksize);
        marks[block / 8] |= static_cast<uint8_t>(mark << block % 8);
        found += mark;
    }
    return found;
}

// With a single counter, repeated bytes would wait for one another.
void byte_histogram(const uint8_t* x, size_t n, size_t every, uint32_t* counts) {
    uint32_t tables[4][256] = {};
    for (size_t i = 0; i < n; i += every * kPlaneBlock) {
        const size_t end = n - i < kPlaneBlock ? n : i + kPlaneBlock;
        for (size_t k = i; k < end; ++k) ++tables[k % 4][x[k]];
    }
    for (size_t byte = 0; byte < 256; ++byte) {
        counts[byte] = tables[0][byte] + tables[1][byte] + tables[2][byte] + tables[3][byte];
    }
}

// Separates kWidth vectors of elements, recursively, into planes first, first + step, ...
template <size_t kWidth>
void separate(const Vector* v, uint8_t* const* planes, size_t first, size_t step, size_t at) {
    if constexpr (kWidth == 1) {
        store_vector(planes[first] + at, v[0]);
    } else {
        Vector even[kWidth / 2], odd[kWidth / 2];
        for (size_t i = 0; i < kWidth / 2; ++i) {
            even[i] = even_bytes(v[2 * i], v[2 * i + 1]);
            odd[i] = odd_bytes(v[2 * i], v[2 * i + 1]);
        }
        separate<kWidth / 2>(even, planes, first, 2 * step, at);
        separate<kWidth / 2>(odd, planes, first + step, 2 * step, at);
    }
}

template <size_t kWidth>
void join(const Plane* planes, size_t first, size_t step, size_t at, Vector* v) {
    if constexpr (kWidth == 1) {
        v[0] = planes[first].constant ? repeated(*planes[first].bytes) : load_vector(planes[first].bytes + at);
    } else {
        Vector even[kWidth / 2], odd[kWidth / 2];
        join<kWidth / 2>(planes, first, 2 * step, at, even);
        join<kWidth / 2>(planes, first + step, 2 * step, at, odd);
        for (size_t i = 0; i < kWidth / 2; ++i) {
            v[2 * i] = first_pairs(even[i], odd[i]);
            v[2 * i + 1] = second_pairs(even[i], odd[i]);
        }
    }
}

template <size_t kWidth>
void split_block(const uint8_t* x, uint8_t* const* planes, size_t at) {
    for (size_t i = 0; i < kPlaneBlock; i += sizeof(Vector), x += kWidth * sizeof(Vector)) {
        Vector v[kWidth];
        for (size_t k = 0; k < kWidth; ++k) v[k] = rotated_left<kWidth>(load_vector(x + k * sizeof(Vector)));
        separate<kWidth>(v, planes, 0, 1, at + i);
    }
}

template <size_t kWidth>
void merge_block(const Plane* planes, size_t at, uint8_t* out) {
    for (size_t i = 0; i < kPlaneBlock; i += sizeof(Vector), out += kWidth * sizeof(Vector)) {
        Vector v[kWidth];
        join<kWidth>(planes, 0, 1, at + i, v);
        for (size_t k = 0; k < kWidth; ++k) store_vector(out + k * sizeof(Vector), rotated_right<kWidth>(v[k]));
    }
}

template <size_t kWidth>
void split_part(const uint8_t* x, size_t n, uint8_t* const* planes, size_t at) {
    uint8_t whole[kPlaneBlock * kWidth] = {}, parts[kWidth][kPlaneBlock];
    uint8_t* to[kWidth];
    for (size_t p = 0; p < kWidth; ++p) to[p] = parts[p];
    memcpy(whole, x, n * kWidth);
    split_block<kWidth>(whole, to, 0);
    for (size_t p = 0; p < kWidth; ++p) memcpy(planes[p] + at, parts[p], n);
}

template <size_t kWidth>
void merge_part(const Plane* planes, size_t at, uint8_t* out, size_t n) {
    uint8_t whole[kPlaneBlock * kWidth], parts[kWidth][kPlaneBlock] = {};
    Plane from[kWidth];
    for (size_t p = 0; p < kWidth; ++p) {
        from[p] = planes[p];
        if (from[p].constant) continue;
        memcpy(parts[p], planes[p].bytes + at, n);
        from[p].bytes = parts[p];
    }
    merge_block<kWidth>(from, 0, whole);
    memcpy(out, whole, n * kWidth);
}

template <size_t kWidth>
void split_planes(const uint8_t* x, const uint8_t* marks, uint8_t* const* planes, size_t n) {
    size_t at = 0, block = 0;
    for (size_t i = 0; i < n; i += kPlaneBlock, ++block) {
        if (!marked(marks, block)) continue;
        if (n - i >= kPlaneBlock) {
            split_block<kWidth>(x + i * kWidth, planes, at);
        } else {
            split_part<kWidth>(x + i * kWidth, n - i, planes, at);
        }
        at += kPlaneBlock;
    }
}

template <size_t kWidth>
void merge_planes(const Plane* planes, const uint8_t* marks, uint8_t* out, size_t n) {
    size_t at = 0, block = 0;
    for (size_t i = 0; i < n; i += kPlaneBlock, ++block) {
        const size_t size = n - i < kPlaneBlock ? n - i : kPlaneBlock;
        if (!marked(marks, block)) {
            memset(out + i * kWidth, 0, size * kWidth);
            continue;
        }
        if (size == kPlaneBlock) {
            merge_block<kWidth>(planes, at, out + i * kWidth);
        } else {
            merge_part<kWidth>(planes, at, out + i * kWidth, size);
        }
        at += kPlaneBlock;
    }
}

}  // namespace

void add_planes(Kernels& k) {
    k.nonzero_blocks = nonzero_blocks;
    k.byte_histogram = byte_histogram;
    k.split_planes[0] = split_planes<1>;
    k.split_planes[1] = split_planes<2>;
    k.split_planes[2] = split_planes<4>;
    k.split_planes[3] = split_planes<8>;
    k.merge_planes[0] = merge_planes<1>;
    k.merge_planes[1] = merge_planes<2>;
    k.merge_planes[2] = merge_planes<4>;
    k.merge_planes[3] = merge_planes<8>;
}

}  // namespace TW_TIER
}  // namespace tw
