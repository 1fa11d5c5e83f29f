// Sparse changes of 16-bit floats: which numbers differ from those of a base, and by how much.
//
// Whether a number changes depends on the exponent that it had, which both sides know. Exponents are classes, runs of
// neighbouring classes groups, and within a group the gaps between changed numbers are Rice codes. docs/format.md has
// the layout. Also the differences of numbers of any width, as zig-zag.
#include "bits.h"
#include "kernels.h"

#if defined(TW_AVX512) || defined(TW_AVX2)
#include <immintrin.h>
#endif

#include <cstring>

namespace tw {
namespace TW_TIER {
namespace {

constexpr size_t kBlock = 64;
constexpr size_t kTile = 4096;  // numbers whose classes are in the caches while each group looks for its own
constexpr unsigned kClasses = 32, kNoClass = 255;
constexpr unsigned kMostRice = 24;
// The approximate cost in bits of a group besides its gaps: its counts and parameters.
constexpr uint64_t kGroupBits = 40;

// With 8 exponent bits, the exponents from 2^-31 to 1 have classes of their own; with 5 bits, all have.
template <Dtype kDtype>
uint16_t class_of(uint16_t x) {
    if constexpr (kDtype == kFloat16) return x >> 10 & 31;
    const uint16_t exponent = x >> 7 & 255, least = exponent < 96 ? 96 : exponent;
    return static_cast<uint16_t>((least > 127 ? 127 : least) - 96);
}

// Number i, at any alignment.
uint16_t number(const uint8_t* x, size_t i) {
    uint16_t found;
    memcpy(&found, x + 2 * i, sizeof found);
    return found;
}

unsigned count_ones(uint64_t x) {
#if defined(TW_AVX512) || defined(TW_AVX2)
    return static_cast<unsigned>(_mm_popcnt_u64(x));
#else
    x -= x >> 1 & 0x5555555555555555;
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    return static_cast<unsigned>(((x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56);
#endif
}

// Deposits the lowest bits of x at the set bits of `mine`.
uint64_t spread(uint64_t x, uint64_t mine) {
#if defined(TW_AVX512) || defined(TW_AVX2)
    return _pdep_u64(x, mine);
#else
    uint64_t found = 0;
    for (; x && mine; x >>= 1, mine &= mine - 1) found |= x & 1 ? mine & (0 - mine) : 0;
    return found;
#endif
}

#if defined(TW_AVX512)
__m512i sixteen_from(uint32_t first) {
    return _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// Lists the indices of the set bits of x, counted from `first`. Returns how many there are. Writes at most 64.
size_t places(uint64_t x, uint32_t first, uint32_t* out) {
    size_t found = 0;
#if defined(TW_AVX512)
    for (uint32_t part = 0; part < 64; part += 16, x >>= 16) {
        const auto chosen = static_cast<__mmask16>(x);
        _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(chosen, sixteen_from(first + part)));
        found += count_ones(chosen);
    }
#else
    for (; x; x &= x - 1) out[found++] = first + lowest_bit(x);
#endif
    return found;
}

// Bit i: whether classes[i] is one of first, ..., first + more.
uint64_t members(const uint8_t* classes, unsigned first, unsigned more) {
#if defined(TW_AVX512)
    const __m512i v = _mm512_sub_epi8(_mm512_loadu_si512(classes), _mm512_set1_epi8(static_cast<char>(first)));
    return _mm512_cmple_epu8_mask(v, _mm512_set1_epi8(static_cast<char>(more)));
#elif defined(TW_AVX2)
    uint64_t bits = 0;
    for (unsigned i = 0; i < kBlock; i += 32) {
        __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(classes + i));
        v = _mm256_sub_epi8(v, _mm256_set1_epi8(static_cast<char>(first)));
        const __m256i within = _mm256_cmpeq_epi8(_mm256_min_epu8(v, _mm256_set1_epi8(static_cast<char>(more))), v);
        bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(within))) << i;
    }
    return bits;
#else
    uint64_t bits = 0;
    for (unsigned i = 0; i < kBlock; ++i) {
        bits |= static_cast<uint64_t>(static_cast<uint8_t>(classes[i] - first) <= more) << i;
    }
    return bits;
#endif
}

// Bit i: whether x[i] differs from y[i].
uint64_t unequal(const uint8_t* x, const uint8_t* y, size_t n) {
    uint64_t bits = 0;
#if defined(TW_AVX512)
    if (n == kBlock) {
        bits = _mm512_cmpneq_epu16_mask(_mm512_loadu_si512(x), _mm512_loadu_si512(y));
        return bits |
               static_cast<uint64_t>(_mm512_cmpneq_epu16_mask(_mm512_loadu_si512(x + 64), _mm512_loadu_si512(y + 64)))
                   << 32;
    }
#elif defined(TW_AVX2)
    if (n == kBlock) {
        const auto equal = [&](size_t i) {
            return _mm256_cmpeq_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * i)),
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y + 2 * i)));
        };
        for (size_t i = 0; i < kBlock; i += 32) {
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(equal(i), equal(i + 16)), 0xD8);
            bits |= static_cast<uint64_t>(static_cast<uint32_t>(~_mm256_movemask_epi8(packed))) << i;
        }
        return bits;
    }
#endif
    for (size_t i = 0; i < n; ++i) bits |= static_cast<uint64_t>(number(x, i) != number(y, i)) << i;
    return bits;
}

constexpr size_t kSigns = 32;

// Bit i: the highest bit of x[i].
uint64_t signs(const uint16_t* x) {
#if defined(TW_AVX512)
    return _mm512_movepi16_mask(_mm512_loadu_si512(x));
#elif defined(TW_AVX2)
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(packed));
#else
    uint64_t bits = 0;
    for (size_t i = 0; i < kSigns; ++i) bits |= static_cast<uint64_t>(x[i] >> 15) << i;
    return bits;
#endif
}

// A tile of neighbouring numbers and their classes, in whole blocks.
struct Tile {
    size_t size, blocks;
    uint8_t classes[kTile];

    template <Dtype kDtype>
    void load(const uint8_t* x, size_t n) {
        size = n < kTile ? n : kTile;
        blocks = (size + kBlock - 1) / kBlock;
        for (size_t i = 0; i < size; ++i) classes[i] = static_cast<uint8_t>(class_of<kDtype>(number(x, i)));
        memset(classes + size, kNoClass, blocks * kBlock - size);
    }
    size_t block_size(size_t block) const { return size - block * kBlock < kBlock ? size - block * kBlock : kBlock; }
    // Bit i: whether number i of a block has one of the classes first, ..., first + more.
    uint64_t of_block(size_t block, unsigned first, unsigned more) const {
        return members(classes + block * kBlock, first, more);
    }
    // Bit i: whether number i of a block differs between the tile's source and y.
    uint64_t unlike(size_t block, const uint8_t* x, const uint8_t* y) const {
        const size_t at = 2 * block * kBlock;
        return unequal(x + at, y + at, block_size(block));
    }
};

constexpr size_t kTileWords = kTile / kBlock;

// A run of classes. The gaps of `listed` numbers are written: those that changed or, if `inverted`, those that did not.
struct Group {
    unsigned first, more;
    bool inverted;
    size_t changed, listed;
    uint32_t* gaps;
    uint16_t* changes;
    // The position of a walk over the numbers.
    size_t gap, change;
    int64_t run;
};

struct Groups {
    size_t count = 0;
    Group group[kClasses];
    uint8_t of[kClasses];  // by class
};

// The work space: the gaps of all groups, their changes, and the sizes larger than 1 of one group. At most half of the
// n numbers change, and fewer gaps are written. Before that, an encoder uses the space of `sizes` for all changes, each
// with the class of its number in the upper half, and for their places.
struct Work {
    uint32_t *gaps, *sizes;
    uint16_t* changes;
    Work(uint32_t* work, size_t n)
        : gaps(work), sizes(work + n / 2), changes(reinterpret_cast<uint16_t*>(sizes + 2 * (n / 2))) {}
    uint32_t* unsorted() const { return sizes; }
    uint32_t* unsorted_places(size_t n) const { return sizes + n / 2; }
};

// ------------------------------------------------------------------------------------------------ Choice of groups

// The counts of a class, or of several: all numbers; those that changed; those that changed by more than 1; and the sum
// of how far those are beyond 2.
struct Tally {
    uint64_t all = 0, changed = 0, larger = 0, beyond = 0;

    void add(const Tally& other) {
        all += other.all;
        changed += other.changed;
        larger += other.larger;
        beyond += other.beyond;
    }
};

// The approximate minimum of bits for Rice codes of `count` numbers with this sum: a larger parameter is better as long
// as it saves more than it adds.
uint64_t rice_bits(uint64_t count, uint64_t sum) {
    uint64_t least = count + sum;
    for (unsigned k = 1; k <= kMostRice; ++k) {
        const uint64_t bits = count * (k + 1) + (sum >> k);
        if (bits >= least) break;
        least = bits;
    }
    return least;
}

uint64_t group_bits(const Tally& t) {
    if (t.changed == 0) return 5;
    const uint64_t same = t.all - t.changed;
    const uint64_t gaps = t.changed > same ? rice_bits(same, t.changed) : rice_bits(t.changed, same);
    const uint64_t some = rice_bits(t.larger, t.changed - t.larger) + rice_bits(t.larger, t.beyond);
    const uint64_t each = rice_bits(t.changed, t.larger + t.beyond);
    return kGroupBits + gaps + (some < each ? some : each);
}

// Cuts classes into the groups that take the fewest bits, and gives each its part of the work space.
void choose(const Tally* tallies, Work work, Groups& groups) {
    uint64_t best[kClasses + 1] = {};
    unsigned from[kClasses + 1] = {};
    for (unsigned end = 1; end <= kClasses; ++end) {
        Tally tally;
        best[end] = ~uint64_t{0};
        for (unsigned begin = end; begin-- > 0;) {
            tally.add(tallies[begin]);
            const uint64_t bits = best[begin] + group_bits(tally);
            if (bits < best[end]) {
                best[end] = bits;
                from[end] = begin;
            }
        }
    }
    unsigned begins[kClasses];
    for (unsigned end = kClasses; end > 0; end = from[end]) begins[groups.count++] = from[end];
    for (size_t i = 0; i < groups.count; ++i) {
        Group& g = groups.group[i] = {};
        g.first = begins[groups.count - 1 - i];
        const unsigned end = i + 1 < groups.count ? begins[groups.count - 2 - i] : kClasses;
        g.more = end - 1 - g.first;
        Tally tally;
        for (unsigned c = g.first; c < end; ++c) {
            tally.add(tallies[c]);
            groups.of[c] = static_cast<uint8_t>(i);
        }
        g.changed = tally.changed;
        g.inverted = tally.changed > tally.all - tally.changed;
        g.listed = g.inverted ? tally.all - tally.changed : tally.changed;
        g.gaps = work.gaps;
        g.changes = work.changes;
        work.gaps += g.changed;
        work.changes += g.changed;
    }
}

// ------------------------------------------------------------------------------------------------------------ Bits

unsigned bit_length(uint64_t n) {
    unsigned length = 0;
    while (n >> length) ++length;
    return length;
}

void put_count(BitWriter& out, uint64_t n) {
    const unsigned length = bit_length(n);
    out.put(length, 5);
    if (length > 1) out.put(n & ((uint64_t{1} << (length - 1)) - 1), length - 1);
}

// The parameter near the mean that gives these numbers the fewest bits; and that number of bits.
struct Rice {
    unsigned k = 0;
    uint64_t bits = 0;

    Rice(const uint32_t* x, size_t n) {
        if (n == 0) return;
        const uint64_t mean = shifted_sum(x, n, 0) / n;
        unsigned near = 0;
        while (near < kMostRice && (mean + 1) >> (near + 1)) ++near;
        bits = ~uint64_t{0};
        for (unsigned one = near ? near - 1 : 0; one <= near + 1 && one <= kMostRice; ++one) {
            const uint64_t total = 5 + n * (one + 1) + shifted_sum(x, n, one);
            if (total < bits) {
                bits = total;
                k = one;
            }
        }
    }

private:
    static uint64_t shifted_sum(const uint32_t* x, size_t n, unsigned k) {
        uint64_t sum = 0;
        for (size_t i = 0; i < n; ++i) sum += x[i] >> k;
        return sum;
    }
};

// Writes to a copy of the writer, which the compiler keeps in registers.
void put_rice(BitWriter& writer, const Rice& rice, const uint32_t* x, size_t n) {
    if (n == 0) return;
    BitWriter out = writer;
    const unsigned k = rice.k;
    const uint64_t mask = (uint64_t{1} << k) - 1;
    out.put(k, 5);
    size_t i = 0;
    for (; 0 < k && k <= 14 && n - i >= 4; i += 4) {
        const uint64_t low = (x[i] & mask) | (x[i + 1] & mask) << k;
        const uint64_t high = (x[i + 2] & mask) | (x[i + 3] & mask) << k;
        out.put(low | high << 2 * k, 4 * k);
    }
    for (; k > 0 && i < n; ++i) out.put(x[i] & mask, k);
    for (i = 0; n - i >= 4; i += 4) {
        const uint64_t first = x[i] >> k, second = first + 1 + (x[i + 1] >> k);
        const uint64_t third = second + 1 + (x[i + 2] >> k), fourth = third + 1 + (x[i + 3] >> k);
        if (fourth < 56) {
            constexpr uint64_t one = 1;
            out.put(one << first | one << second | one << third | one << fourth, static_cast<unsigned>(fourth) + 1);
        } else {
            for (size_t j = i; j < i + 4; ++j) out.put_unary(x[j] >> k);
        }
    }
    for (; i < n; ++i) out.put_unary(x[i] >> k);
    writer = out;
}

class ChangesReader : public BitReader {
public:
    using BitReader::BitReader;

    // n changes of this sign each, by 1.
    void take_signs(uint16_t* changes, size_t n) {
        for (size_t i = 0; i < n; i += kSigns) {
            const size_t more = n - i < kSigns ? n - i : kSigns;
            const uint64_t negative = take(static_cast<unsigned>(more));
            for (size_t j = 0; j < more; ++j) changes[i + j] = static_cast<uint16_t>(1 - 2 * (negative >> j & 1));
        }
    }
    // Reads a count of at most `most`.
    size_t take_count(size_t most) {
        const unsigned length = static_cast<unsigned>(take(5));
        if (length == 0) return 0;
        const uint64_t n = uint64_t{1} << (length - 1) | take(length - 1);
        if (n > most) good_ = false;
        return good_ ? static_cast<size_t>(n) : 0;
    }
    // Reads n Rice codes of numbers of at most `most`.
    void take_rice(uint32_t* x, size_t n, uint64_t most) {
        if (n == 0) return;
        const unsigned k = static_cast<unsigned>(take(5));
        size_t low = at_;
        if (k > kMostRice || (end_ - at_) / (k + 1) < n) good_ = false;
        if (!good_) return;
        at_ += n * k;
        take_unaries(x, n, most >> k);
        if (!good_ || k == 0) return;
        const uint64_t mask = (uint64_t{1} << k) - 1;
        bool beyond = false;
        for (size_t i = 0; i < n; ++i, low += k) {
            const uint64_t code = static_cast<uint64_t>(x[i]) << k | (peek(low) & mask);
            beyond |= code > most;
            x[i] = static_cast<uint32_t>(code);
        }
        good_ = !beyond;
    }

private:
    // How many zeros stand before each of n ones, no more than `most`.
    void take_unaries(uint32_t* x, size_t n, uint64_t most) {
        size_t begin = at_ - at_ % 8, i = 0;
        uint64_t bits = peek(begin) >> at_ % 8 << at_ % 8, zeros = 0 - at_ % 8, largest = 0;  // behind the last one
        uint32_t ones[64];
        for (;;) {
            size_t found = places(bits, 0, ones);
            if (found > n - i) found = n - i;
            if (found) {
                zeros += ones[0];
                largest = zeros > largest ? zeros : largest;
                x[i] = static_cast<uint32_t>(zeros);
                for (size_t j = 1; j < found; ++j) x[i + j] = ones[j] - ones[j - 1] - 1;
                i += found;
                zeros = 63 - ones[found - 1];
            } else {
                zeros += 64;
            }
            if (i == n) break;
            begin += 64;
            if (begin >= end_) {
                good_ = false;
                return;
            }
            bits = peek(begin);
        }
        at_ = begin + 64 - static_cast<size_t>(zeros);
        for (i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
        good_ = largest <= most;
    }
};

// --------------------------------------------------------------------------------------------------------- Encoding

// The magnitude of a change; without a branch, because signs are unpredictable.
uint32_t size_of(uint16_t change) {
    const uint32_t negative = change >> 15;
    return ((change | (0 - negative) << 16) ^ (0 - negative)) + negative;
}

// Counts the numbers of each class of a tile.
void count_classes(const Tile& tile, Tally* tallies) {
    unsigned first = kClasses, last = 0;
    for (size_t i = 0; i < tile.size; ++i) {
        const unsigned c = tile.classes[i];
        first = c < first ? c : first;
        last = c > last ? c : last;
    }
    for (unsigned c = first; c <= last; ++c) {
        uint64_t all = 0;
        for (size_t b = 0; b < tile.blocks; ++b) all += count_ones(tile.of_block(b, c, 0));
        tallies[c].all += all;
    }
}

// Lists the changes of a block, each with the class of its number in the upper half, and their places in the tile.
// Returns how many there are. May write up to 16 places more.
size_t list_block(const Tile& tile, size_t block, const uint8_t* base, const uint8_t* x, uint32_t* out, uint32_t* at) {
    uint64_t bits = tile.unlike(block, base, x);
    const size_t begin = block * kBlock;
    size_t found = 0;
#if defined(TW_AVX512)
    if (bits && tile.block_size(block) == kBlock) {
        for (size_t i = begin; i < begin + kBlock; i += 16, bits >>= 16) {
            const __m256i change = _mm256_sub_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * i)),
                                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + 2 * i)));
            const __m512i class_of_each =
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.classes + i)));
            const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(change), _mm512_slli_epi32(class_of_each, 16));
            const auto chosen = static_cast<__mmask16>(bits);
            _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(chosen, both));
            _mm512_storeu_si512(at + found,
                                _mm512_maskz_compress_epi32(chosen, sixteen_from(static_cast<uint32_t>(i))));
            found += count_ones(chosen);
        }
        return found;
    }
#endif
    for (; bits; bits &= bits - 1) {
        const size_t i = begin + lowest_bit(bits);
        const auto change = static_cast<uint16_t>(number(x, i) - number(base, i));
        at[found] = static_cast<uint32_t>(i);
        out[found++] = change | static_cast<uint32_t>(tile.classes[i]) << 16;
    }
    return found;
}

// Adds changes of a tile to the tallies of their classes.
void tally_changes(const uint32_t* listed, size_t n, Tally* tallies) {
    // For each class, in 16, 16 and 32 bits: how many changed, how many by more than 1, and how far beyond 2 in all.
    // There are two sums, because neighbours often have the same class, and a sum must be stored before it is loaded
    // again.
    uint64_t sums[2][kClasses] = {}, each[256];
    for (size_t begin = 0; begin < n; begin += 256) {
        const size_t end = n - begin < 256 ? n - begin : 256;
        for (size_t i = 0; i < end; ++i) {
            const uint32_t size = size_of(static_cast<uint16_t>(listed[begin + i]));
            const uint64_t larger = size > 1, beyond = size > 1 ? size - 2 : 0;
            each[i] = 1 | larger << 16 | beyond << 32;
        }
        for (size_t i = 0; i < end; ++i) sums[i % 2][listed[begin + i] >> 16] += each[i];
    }
    for (unsigned c = 0; c < kClasses; ++c) {
        const uint64_t sum = sums[0][c] + sums[1][c];
        tallies[c].changed += sum & 0xFFFF;
        tallies[c].larger += sum >> 16 & 0xFFFF;
        tallies[c].beyond += sum >> 32;
    }
}

// Fills the tallies of all classes, and lists the changes, with the classes of their numbers, and their places, as far
// as there is room. Returns how many changes there are.
template <Dtype kDtype>
size_t list_changes(const uint8_t* base, const uint8_t* x, size_t n, const Work& work, Tally* tallies) {
    Tile tile;
    uint32_t listed[kTile + 16], places[kTile + 16];
    size_t changed = 0;
    for (size_t at = 0; at < n; at += kTile) {
        tile.load<kDtype>(base + 2 * at, n - at);
        count_classes(tile, tallies);
        size_t found = 0;
        for (size_t b = 0; b < tile.blocks; ++b) {
            found += list_block(tile, b, base + 2 * at, x + 2 * at, listed + found, places + found);
        }
        tally_changes(listed, found, tallies);
        for (size_t i = 0; i < found && changed + found <= n / 2; ++i) {
            work.unsorted()[changed + i] = listed[i];
            work.unsorted_places(n)[changed + i] = static_cast<uint32_t>(at) + places[i];
        }
        changed += found;
    }
    return changed;
}

// Sorts the changes into groups, in order, and their places into the space for the gaps.
void sort_changes(const Work& work, size_t n, size_t changed, const Groups& groups) {
    const uint32_t *const listed = work.unsorted(), *const places = work.unsorted_places(n);
    size_t next[kClasses];
    for (size_t k = 0; k < groups.count; ++k) next[k] = static_cast<size_t>(groups.group[k].changes - work.changes);
    for (size_t i = 0; i < changed; ++i) {
        const size_t to = next[groups.of[listed[i] >> 16]]++;
        work.changes[to] = static_cast<uint16_t>(listed[i]);
        work.gaps[to] = places[i];
    }
}

// Turns the places of a group's changes in a tile, which begins at number `begin`, into gaps.
void count_gaps(Group& g, const Tile& tile, size_t begin) {
    uint64_t mine[kTileWords];
    int64_t before[kTileWords], size = 0, run = g.run;
    for (size_t b = 0; b < tile.blocks; ++b) {
        mine[b] = tile.of_block(b, g.first, g.more);
        before[b] = size;
        size += count_ones(mine[b]);
    }
    size_t gap = g.gap;
    for (; gap < g.listed && g.gaps[gap] < begin + tile.size; ++gap) {
        const size_t at = g.gaps[gap] - begin;
        const int64_t rank = before[at / kBlock] + count_ones(mine[at / kBlock] & ((uint64_t{1} << at % kBlock) - 1));
        g.gaps[gap] = static_cast<uint32_t>(rank + run);
        run = -(rank + 1);
    }
    g.gap = gap;
    g.run = run + size;
}

// Lists the gaps between unchanged numbers of a group in a tile. Returns whether there are no more than were counted.
bool list_gaps(Group& g, const Tile& tile, const uint64_t* unlike) {
    int64_t size = 0;
    for (size_t b = 0; b < tile.blocks; ++b) {
        const uint64_t mine = tile.of_block(b, g.first, g.more);
        for (uint64_t bits = mine & ~unlike[b]; bits; bits &= bits - 1) {
            if (g.gap == g.listed) return false;
            const int64_t rank = size + count_ones(mine & ~bits & (bits - 1));
            g.gaps[g.gap++] = static_cast<uint32_t>(rank + g.run);
            g.run = -(rank + 1);
        }
        size += count_ones(mine);
    }
    g.run += size;
    return true;
}

void put_signs(BitWriter& out, const uint16_t* changes, size_t n) {
    size_t i = 0;
    for (; n - i >= kSigns; i += kSigns) out.put(signs(changes + i), kSigns);
    for (; i < n; ++i) out.put(changes[i] >> 15, 1);
}

// Writes the signs; then the size of each change, or which ones are larger than 1 and by how much, whichever is
// shorter.
void put_changes(BitWriter& out, const Group& g, uint32_t* work) {
    put_signs(out, g.changes, g.changed);
    for (size_t i = 0; i < g.changed; ++i) work[i] = size_of(g.changes[i]) - 1;
    const Rice each(work, g.changed);
    size_t larger = 0, last = 0;
    uint32_t *const gaps = work + g.changed, *const beyond = work;  // which is read before it is written
    for (size_t i = 0; i < g.changed; ++i) {
        const uint32_t size = work[i];
        gaps[larger] = static_cast<uint32_t>(i - last);
        beyond[larger] = size - 1;
        larger += size > 0;
        last = size > 0 ? i + 1 : last;
    }
    const Rice which(gaps, larger), some(beyond, larger);
    const unsigned length = bit_length(larger);
    if (each.bits <= 5 + (length ? length - 1 : 0) + which.bits + some.bits) {
        for (size_t i = 0; i < g.changed; ++i) work[i] = size_of(g.changes[i]) - 1;
        out.put(1, 1);
        put_rice(out, each, work, g.changed);
        return;
    }
    out.put(0, 1);
    put_count(out, larger);
    put_rice(out, which, gaps, larger);
    put_rice(out, some, beyond, larger);
}

template <Dtype kDtype>
size_t encode_changes(const uint8_t* base, const uint8_t* x, size_t n, uint32_t* work, uint8_t* codes, size_t room,
                      size_t* differ) {
    Tally tallies[kClasses];
    const Work parts(work, n);
    const size_t changed = list_changes<kDtype>(base, x, n, parts, tallies);
    *differ = changed;
    if (changed == 0 || changed > n / 2) return 0;
    Groups groups;
    choose(tallies, parts, groups);
    sort_changes(parts, n, changed, groups);
    Tile tile;
    for (size_t at = 0; at < n; at += kTile) {
        tile.load<kDtype>(base + 2 * at, n - at);
        uint64_t unlike[kTileWords];
        for (size_t b = 0; b < tile.blocks; ++b) unlike[b] = tile.unlike(b, base + 2 * at, x + 2 * at);
        for (size_t k = 0; k < groups.count; ++k) {
            Group& g = groups.group[k];
            if (g.changed && !g.inverted) count_gaps(g, tile, at);
            if (g.inverted && !list_gaps(g, tile, unlike)) return 0;  // somebody writes to the numbers
        }
    }
    BitWriter out(codes, room);
    uint32_t begins = 0;
    for (size_t k = 0; k < groups.count; ++k) begins |= uint32_t{1} << groups.group[k].first;
    out.put(begins, 32);
    for (size_t k = 0; k < groups.count; ++k) {
        const Group& g = groups.group[k];
        put_count(out, g.changed);
        if (g.changed == 0) continue;
        out.put(g.inverted, 1);
        if (g.inverted) put_count(out, g.listed);
        put_rice(out, Rice(g.gaps, g.listed), g.gaps, g.listed);
        put_changes(out, g, parts.sizes);
    }
    return out.finish();
}

// --------------------------------------------------------------------------------------------------------- Decoding

// Gives a change, which is 1 or 0xFFFF, its size. Returns whether such a change is possible.
bool set_size(uint16_t& change, uint32_t size) {
    const uint32_t negative = change >> 15;
    change = static_cast<uint16_t>((size ^ (0 - negative)) + negative);
    return size <= 0x7FFF + negative;
}

// The signs and sizes of the changes of a group; whether they are good.
bool take_changes(ChangesReader& in, Group& g, uint32_t* work) {
    in.take_signs(g.changes, g.changed);
    if (in.take(1)) {
        in.take_rice(work, g.changed, 0x7FFF);
        bool good = in.good();
        if (!good) return false;
        for (size_t i = 0; i < g.changed; ++i) good &= set_size(g.changes[i], work[i] + 1);
        return good;
    }
    const size_t larger = in.take_count(g.changed);
    uint32_t* const beyond = work + larger;
    in.take_rice(work, larger, g.changed);
    in.take_rice(beyond, larger, 0x7FFE);
    if (!in.good()) return false;
    size_t at = 0;
    for (size_t i = 0; i < larger; ++i, ++at) {
        at += work[i];
        if (at >= g.changed || !set_size(g.changes[at], beyond[i] + 2)) return false;
    }
    return true;
}

bool take_groups(ChangesReader& in, size_t n, Work work, Groups& groups) {
    const uint64_t begins = in.take(32);
    if (!(begins & 1)) return false;
    size_t changed = 0;
    for (unsigned c = 0; c < kClasses; ++c) {
        if (begins >> c & 1) {
            groups.group[groups.count] = {};
            groups.group[groups.count++].first = c;
        } else {
            ++groups.group[groups.count - 1].more;
        }
        groups.of[c] = static_cast<uint8_t>(groups.count - 1);
    }
    for (size_t k = 0; k < groups.count; ++k) {
        Group& g = groups.group[k];
        g.changed = in.take_count(n / 2 - changed);
        if (g.changed == 0) continue;
        g.inverted = in.take(1);
        g.listed = g.inverted ? in.take_count(g.changed - 1) : g.changed;
        g.gaps = work.gaps;
        g.changes = work.changes;
        in.take_rice(g.gaps, g.listed, n);
        if (!take_changes(in, g, work.sizes)) return false;
        work.gaps += g.listed;
        work.changes += g.changed;
        changed += g.changed;
        g.run = g.listed ? static_cast<int64_t>(g.gaps[0]) : INT64_MAX / 2;
    }
    return in.finished();
}

// Marks the numbers of a tile that a group changes. Returns whether its lists are long enough.
bool mark_changes(Group& g, const Tile& tile, uint64_t* changed) {
    uint64_t mine[kTileWords], listed[kTileWords + 2];
    int64_t size = 0;
    for (size_t b = 0; b < tile.blocks; ++b) {
        mine[b] = tile.of_block(b, g.first, g.more);
        size += count_ones(mine[b]);
    }
    if (g.run >= size && !g.inverted) {
        g.run -= size;
        return true;
    }
    // A bit for each of the group's numbers in order, and one word more: whether it is listed.
    const size_t before = g.gap;
    for (int64_t w = 0; w <= size / 64 + 1; ++w) {
        const int64_t end = 64 * w + 64 < size ? 64 * w + 64 : size;
        uint64_t held = 0;
        while (g.run < end) {
            held |= uint64_t{1} << g.run % 64;
            g.run = ++g.gap < g.listed ? g.run + 1 + static_cast<int64_t>(g.gaps[g.gap]) : INT64_MAX / 2;
        }
        listed[w] = held;
    }
    g.run -= size;
    const size_t marked = g.inverted ? static_cast<size_t>(size) - (g.gap - before) : g.gap - before;
    if (marked > g.changed - g.change) return false;
    g.change += marked;
    for (size_t b = 0, at = 0; b < tile.blocks; at += count_ones(mine[b++])) {
        const uint64_t bits = listed[at / 64] >> at % 64 | listed[at / 64 + 1] << 1 << (63 - at % 64);
        const uint64_t told = spread(bits, mine[b]);
        changed[b] |= g.inverted ? mine[b] & ~told : told;
    }
    return true;
}

template <Dtype kDtype>
size_t decode_changes(const uint8_t* codes, size_t size, uint8_t* x, size_t n, uint32_t* work) {
    ChangesReader in(codes, size);
    Groups groups;
    if (!take_groups(in, n, Work(work, n), groups)) return 0;
    const uint16_t* next[kClasses];
    for (size_t k = 0; k < groups.count; ++k) next[k] = groups.group[k].changes;
    Tile tile;
    for (size_t at = 0; at < n; at += kTile) {
        tile.load<kDtype>(x + 2 * at, n - at);
        uint64_t changed[kTileWords] = {};
        for (size_t k = 0; k < groups.count; ++k) {
            Group& g = groups.group[k];
            if (g.changed && !mark_changes(g, tile, changed)) return 0;
        }
        for (size_t b = 0; b < tile.blocks; ++b) {
            for (uint64_t bits = changed[b]; bits; bits &= bits - 1) {
                const size_t i = b * kBlock + lowest_bit(bits);
                const uint16_t change = *next[groups.of[tile.classes[i]]]++;
                const auto made = static_cast<uint16_t>(number(x, at + i) + change);
                memcpy(x + 2 * (at + i), &made, sizeof made);
            }
        }
    }
    size_t changed = 0;
    for (size_t k = 0; k < groups.count; ++k) {
        const Group& g = groups.group[k];
        if (g.gap != g.listed || g.change != g.changed) return 0;
        changed += g.changed;
    }
    return changed;
}

// ------------------------------------------------------------------------------------------------------ Differences

// The upper 16 bits of a number rotated right by one; `planes` rotates them back.
template <typename Word>
Word turned_right(Word x) {
    if constexpr (sizeof(Word) == 1) {
        return x;
    } else {
        constexpr unsigned low = 8 * sizeof(Word) - 16;
        const Word upper = static_cast<Word>(x >> low);
        const Word turned = static_cast<Word>((upper >> 1 | upper << 15) & 0xFFFF);
        return static_cast<Word>((x & ((Word{1} << low) - 1)) | turned << low);
    }
}
template <typename Word>
Word turned_left(Word x) {
    if constexpr (sizeof(Word) == 1) {
        return x;
    } else {
        constexpr unsigned low = 8 * sizeof(Word) - 16;
        const Word upper = static_cast<Word>(x >> low);
        const Word turned = static_cast<Word>((upper << 1 | upper >> 15) & 0xFFFF);
        return static_cast<Word>((x & ((Word{1} << low) - 1)) | turned << low);
    }
}

template <typename Word>
void difference(const uint8_t* base, const uint8_t* values, uint8_t* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        Word from, to;
        memcpy(&from, base + i * sizeof from, sizeof from);
        memcpy(&to, values + i * sizeof to, sizeof to);
        const Word d = static_cast<Word>(to - from);
        const Word sign = static_cast<Word>(0 - (d >> (8 * sizeof d - 1)));
        const Word z = turned_right<Word>(static_cast<Word>(static_cast<Word>(d << 1) ^ sign));
        memcpy(out + i * sizeof z, &z, sizeof z);
    }
}

template <typename Word>
void add_difference(const uint8_t* differences, uint8_t* values, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        Word z, x;
        memcpy(&z, differences + i * sizeof z, sizeof z);
        memcpy(&x, values + i * sizeof x, sizeof x);
        z = turned_left<Word>(z);
        x = static_cast<Word>(x + static_cast<Word>(static_cast<Word>(z >> 1) ^ static_cast<Word>(0 - (z & 1))));
        memcpy(values + i * sizeof x, &x, sizeof x);
    }
}

}  // namespace

void add_changes(Kernels& k) {
    k.encode_changes[kFloat16] = encode_changes<kFloat16>;
    k.encode_changes[kBfloat16] = encode_changes<kBfloat16>;
    k.decode_changes[kFloat16] = decode_changes<kFloat16>;
    k.decode_changes[kBfloat16] = decode_changes<kBfloat16>;
    k.difference[0] = difference<uint8_t>;
    k.difference[1] = difference<uint16_t>;
    k.difference[2] = difference<uint32_t>;
    k.difference[3] = difference<uint64_t>;
    k.add_difference[0] = add_difference<uint8_t>;
    k.add_difference[1] = add_difference<uint16_t>;
    k.add_difference[2] = add_difference<uint32_t>;
    k.add_difference[3] = add_difference<uint64_t>;
}

}  // namespace TW_TIER
}  // namespace tw
