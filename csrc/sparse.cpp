// Sparse changes of 16-bit floats: which numbers differ from those of a base, and by how much.
//
// Whether a number changes depends on the exponent that it had, which both sides know. Exponents are classes, runs of
// neighbouring classes groups, and within a group the gaps between changed numbers are Rice codes. docs/format.md has
// the layout. Also the differences of numbers of any width, as zig-zag.
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
// What a group costs beside its gaps, about: its counts and parameters.
constexpr uint64_t kGroupBits = 40;

// 8 exponent bits: those from 2^-31 to 1 are told apart. 5 bits: all of them.
template <Dtype kDtype>
unsigned class_of(uint16_t x) {
    if constexpr (kDtype == kFloat16) return x >> 10 & 31;
    const int exponent = x >> 7 & 255;
    return static_cast<unsigned>(exponent < 96 ? 0 : exponent > 127 ? 31 : exponent - 96);
}

// Number i, wherever it stands.
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

// The place of the lowest bit that is set; there is one.
unsigned lowest(uint64_t x) { return count_ones(~x & (x - 1)); }

// The place of the bit that `rank` others stand below; there is one.
unsigned select(uint64_t x, uint64_t rank) {
#if defined(TW_AVX512) || defined(TW_AVX2)
    return lowest(_pdep_u64(uint64_t{1} << rank, x));
#else
    for (; rank; --rank) x &= x - 1;
    return lowest(x);
#endif
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

// Bit i: whether x[i] is not y[i].
uint64_t unequal(const uint8_t* x, const uint8_t* y, size_t n) {
    uint64_t bits = 0;
#if defined(TW_AVX512)
    if (n == kBlock) {
        bits = _mm512_cmpneq_epu16_mask(_mm512_loadu_si512(x), _mm512_loadu_si512(y));
        return bits | static_cast<uint64_t>(_mm512_cmpneq_epu16_mask(_mm512_loadu_si512(x + 64),
                                                                     _mm512_loadu_si512(y + 64))) << 32;
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

// Some neighbouring numbers, and their classes, in whole blocks.
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
};

// A run of classes. `listed` numbers of it have their gaps written: those that changed or, `inverted`, those that did
// not.
struct Group {
    unsigned first, more;
    bool inverted;
    size_t changed, listed;
    uint32_t* gaps;
    uint16_t* changes;
    // Where a walk over the numbers is.
    size_t gap, change;
    int64_t run;
};

struct Groups {
    size_t count = 0;
    Group group[kClasses];
};

// The work space: the gaps of all groups, their changes, and what is larger than 1 in one of them. At most half of n
// numbers change, and fewer gaps are written.
struct Work {
    uint32_t *gaps, *sizes;
    uint16_t* changes;
    Work(uint32_t* work, size_t n)
        : gaps(work), sizes(work + n / 2), changes(reinterpret_cast<uint16_t*>(sizes + 2 * (n / 2))) {}
};

// ------------------------------------------------------------------------------------------------ Choice of groups

// What is known of a class, or of several: its numbers; those that changed; of these, those that changed by more than
// 1; and how far beyond 2 that is, added up.
struct Tally {
    uint64_t all = 0, changed = 0, larger = 0, beyond = 0;

    void add(const Tally& other) {
        all += other.all;
        changed += other.changed;
        larger += other.larger;
        beyond += other.beyond;
    }
};

// The least bits that Rice codes of `count` numbers take, about, whose sum is this.
uint64_t rice_bits(uint64_t count, uint64_t sum) {
    uint64_t least = count + sum;
    for (unsigned k = 1; k <= kMostRice; ++k) {
        const uint64_t bits = count * (k + 1) + (sum >> k);
        if (bits < least) least = bits;
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
        for (unsigned c = g.first; c < end; ++c) tally.add(tallies[c]);
        g.changed = tally.changed;
        g.inverted = tally.changed > tally.all - tally.changed;
        g.listed = g.inverted ? tally.all - tally.changed : tally.changed;
        g.gaps = work.gaps;
        g.changes = work.changes;
        work.gaps += g.changed ? g.listed : 0;
        work.changes += g.changed;
    }
}

// ------------------------------------------------------------------------------------------------------------ Bits

unsigned bit_length(uint64_t n) {
    unsigned length = 0;
    while (n >> length) ++length;
    return length;
}

// Bits, from the lowest of the first byte on. Nothing is written past the room, and `full` says that there was none.
class BitWriter {
public:
    BitWriter(uint8_t* out, size_t room) : out_(out), room_(room) {}

    // The lowest `count` bits, at most 32; the others are 0.
    void put(uint64_t bits, unsigned count) {
        held_ |= bits << holds_;
        holds_ += count;
        if (holds_ >= 32) {
            flush(4);
            held_ >>= 32;
            holds_ -= 32;
        }
    }
    void put_count(uint64_t n) {
        const unsigned length = bit_length(n);
        put(length, 5);
        if (length > 1) put(n & ((uint64_t{1} << (length - 1)) - 1), length - 1);
    }
    void put_unary(uint64_t zeros) {
        for (; zeros >= 31; zeros -= 31) put(0, 31);
        put(uint64_t{1} << zeros, static_cast<unsigned>(zeros) + 1);
    }
    // The bytes written, the bits behind the last one 0; or 0 if there was no room for them.
    size_t finish() {
        flush((holds_ + 7) / 8);
        return full_ ? 0 : at_;
    }

private:
    void flush(size_t bytes) {
        if (room_ - at_ < bytes) {
            full_ = true;
            return;
        }
        for (size_t i = 0; i < bytes; ++i) out_[at_ + i] = static_cast<uint8_t>(held_ >> 8 * i);
        at_ += bytes;
    }

    uint8_t* out_;
    size_t room_, at_ = 0;
    uint64_t held_ = 0;
    unsigned holds_ = 0;
    bool full_ = false;
};

// The parameter that gives these numbers the fewest bits, of those near the mean; and so many bits.
struct Rice {
    unsigned k = 0;
    uint64_t bits = 0;

    Rice(const uint32_t* x, size_t n) {
        if (n == 0) return;
        uint64_t sum = 0;
        for (size_t i = 0; i < n; ++i) sum += x[i];
        unsigned near = 0;
        while (near < kMostRice && (sum / n + 1) >> (near + 1)) ++near;
        bits = ~uint64_t{0};
        for (unsigned one = near ? near - 1 : 0; one <= near + 1 && one <= kMostRice; ++one) {
            uint64_t total = 5 + n * (one + 1);
            for (size_t i = 0; i < n; ++i) total += x[i] >> one;
            if (total < bits) {
                bits = total;
                k = one;
            }
        }
    }
};

void put_rice(BitWriter& out, const Rice& rice, const uint32_t* x, size_t n) {
    if (n == 0) return;
    out.put(rice.k, 5);
    for (size_t i = 0; i < n; ++i) out.put(x[i] & ((uint32_t{1} << rice.k) - 1), rice.k);
    for (size_t i = 0; i < n; ++i) out.put_unary(x[i] >> rice.k);
}

class BitReader {
public:
    BitReader(const uint8_t* data, size_t size) : data_(data), size_(size), end_(8 * size) {}

    bool good() const { return good_; }
    // The next `count` bits, at most 32.
    uint64_t take(unsigned count) {
        const uint64_t bits = peek(at_) & ((uint64_t{1} << count) - 1);
        advance(count);
        return bits;
    }
    // A count of no more than `most`.
    size_t take_count(size_t most) {
        const unsigned length = static_cast<unsigned>(take(5));
        if (length == 0) return 0;
        const uint64_t n = uint64_t{1} << (length - 1) | take(length - 1);
        if (n > most) good_ = false;
        return good_ ? static_cast<size_t>(n) : 0;
    }
    // n Rice codes of numbers of no more than `most`.
    void take_rice(uint32_t* x, size_t n, uint64_t most) {
        if (n == 0) return;
        const unsigned k = static_cast<unsigned>(take(5));
        size_t low = at_;
        if (k > kMostRice || (end_ - at_) / (k + 1) < n) good_ = false;
        if (!good_) return;
        at_ += n * k;
        for (size_t i = 0; i < n && good_; ++i, low += k) {
            const uint64_t code = take_unary() << k | (peek(low) & ((uint64_t{1} << k) - 1));
            if (code > most) good_ = false;
            x[i] = static_cast<uint32_t>(code);
        }
    }
    // Whether all was read, and the bits behind are 0.
    bool finished() { return good_ && end_ - at_ < 8 && peek(at_) == 0; }

private:
    // At least 57 bits from a place on, with zeros behind the end.
    uint64_t peek(size_t at) const {
        const size_t byte = at / 8;
        uint64_t bits = 0;
        if (size_ - byte >= 8) {
            memcpy(&bits, data_ + byte, 8);
        } else {
            for (size_t i = byte; i < size_; ++i) bits |= static_cast<uint64_t>(data_[i]) << 8 * (i - byte);
        }
        return bits >> at % 8;
    }
    void advance(size_t bits) {
        if (end_ - at_ < bits) {
            good_ = false;
            at_ = end_;
        } else {
            at_ += bits;
        }
    }
    uint64_t take_unary() {
        uint64_t zeros = 0;
        for (;;) {
            const uint64_t bits = peek(at_) & ((uint64_t{1} << 57) - 1);
            if (bits) {
                const unsigned here = lowest(bits);
                at_ += here + 1;
                return zeros + here;
            }
            advance(57);
            zeros += 57;
            if (!good_) return 0;
        }
    }

    const uint8_t* data_;
    size_t size_, at_ = 0, end_;
    bool good_ = true;
};

// --------------------------------------------------------------------------------------------------------- Encoding

// By how much a number changed, whatever the sign.
uint32_t size_of(uint16_t change) { return change >> 15 ? 0x10000u - change : change; }

// Fills the tallies of all classes; how many numbers changed.
template <Dtype kDtype>
size_t count_changes(const uint8_t* base, const uint8_t* x, size_t n, Tally* tallies) {
    Tile tile;
    size_t changed = 0;
    uint32_t tables[4][256] = {};
    for (size_t at = 0; at < n; at += kTile) {
        tile.load<kDtype>(base + 2 * at, n - at);
        for (size_t i = 0; i < tile.size; ++i) ++tables[i % 4][tile.classes[i]];
        for (size_t b = 0; b < tile.blocks; ++b) {
            const size_t begin = at + b * kBlock;
            uint64_t differ = unequal(base + 2 * begin, x + 2 * begin, tile.block_size(b));
            for (; differ; differ &= differ - 1, ++changed) {
                const unsigned i = lowest(differ);
                Tally& t = tallies[tile.classes[b * kBlock + i]];
                const uint32_t size = size_of(static_cast<uint16_t>(number(x, begin + i) - number(base, begin + i)));
                ++t.changed;
                t.larger += size > 1;
                t.beyond += size > 1 ? size - 2 : 0;
            }
        }
    }
    for (unsigned c = 0; c < kClasses; ++c) {
        tallies[c].all = uint64_t{tables[0][c]} + tables[1][c] + tables[2][c] + tables[3][c];
    }
    return changed;
}

void list_block(Group& g, uint64_t mine, uint64_t differ, const uint8_t* base, const uint8_t* x) {
    for (uint64_t bits = g.inverted ? mine & ~differ : mine & differ; bits; bits &= bits - 1) {
        const int64_t rank = count_ones(mine & ~bits & (bits - 1));
        g.gaps[g.gap++] = static_cast<uint32_t>(g.run + rank);
        g.run = -(rank + 1);
    }
    g.run += count_ones(mine);
    for (uint64_t bits = mine & differ; bits; bits &= bits - 1) {
        const unsigned i = lowest(bits);
        g.changes[g.change++] = static_cast<uint16_t>(number(x, i) - number(base, i));
    }
}

// Signs; then the size of each change, or which ones are larger than 1 and by how much, whichever is shorter.
void put_changes(BitWriter& out, const Group& g, uint32_t* work) {
    for (size_t i = 0; i < g.changed; ++i) {
        out.put(g.changes[i] >> 15, 1);
        work[i] = size_of(g.changes[i]) - 1;
    }
    const Rice each(work, g.changed);
    size_t larger = 0, last = 0;
    uint32_t *const gaps = work + g.changed, *const beyond = work;  // which is read before it is written
    for (size_t i = 0; i < g.changed; ++i) {
        if (work[i] == 0) continue;
        gaps[larger] = static_cast<uint32_t>(i - last);
        beyond[larger++] = work[i] - 1;
        last = i + 1;
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
    out.put_count(larger);
    put_rice(out, which, gaps, larger);
    put_rice(out, some, beyond, larger);
}

template <Dtype kDtype>
size_t sparse_encode(const uint8_t* base, const uint8_t* x, size_t n, uint32_t* work, uint8_t* codes, size_t room,
                     size_t* differ) {
    Tally tallies[kClasses];
    const size_t changed = count_changes<kDtype>(base, x, n, tallies);
    *differ = changed;
    if (changed == 0 || changed > n / 2) return 0;
    const Work parts(work, n);
    Groups groups;
    choose(tallies, parts, groups);
    Tile tile;
    for (size_t at = 0; at < n; at += kTile) {
        tile.load<kDtype>(base + 2 * at, n - at);
        uint64_t unlike[kTile / kBlock];
        for (size_t b = 0; b < tile.blocks; ++b) {
            const size_t i = at + b * kBlock;
            unlike[b] = unequal(base + 2 * i, x + 2 * i, tile.block_size(b));
        }
        for (size_t k = 0; k < groups.count; ++k) {
            Group& g = groups.group[k];
            if (g.changed == 0) continue;
            for (size_t b = 0; b < tile.blocks; ++b) {
                const uint64_t mine = members(tile.classes + b * kBlock, g.first, g.more);
                if (!g.inverted && !(mine & unlike[b])) {
                    g.run += count_ones(mine);
                } else {
                    const size_t i = 2 * (at + b * kBlock);
                    list_block(g, mine, unlike[b], base + i, x + i);
                }
            }
        }
    }
    BitWriter out(codes, room);
    uint32_t begins = 0;
    for (size_t k = 0; k < groups.count; ++k) begins |= uint32_t{1} << groups.group[k].first;
    out.put(begins, 32);
    for (size_t k = 0; k < groups.count; ++k) {
        const Group& g = groups.group[k];
        out.put_count(g.changed);
        if (g.changed == 0) continue;
        out.put(g.inverted, 1);
        if (g.inverted) out.put_count(g.listed);
        put_rice(out, Rice(g.gaps, g.listed), g.gaps, g.listed);
        put_changes(out, g, parts.sizes);
    }
    return out.finish();
}

// --------------------------------------------------------------------------------------------------------- Decoding

// A change of this sign, 1 or 0xFFFF, by so much; whether there is one.
bool set_size(uint16_t& change, uint32_t size) {
    if (change == 1 && size > 0x7FFF) return false;
    change = static_cast<uint16_t>(change == 1 ? size : 0x10000u - size);
    return true;
}

// The signs and sizes of the changes of a group; whether they are good.
bool take_changes(BitReader& in, Group& g, uint32_t* work) {
    for (size_t i = 0; i < g.changed; ++i) g.changes[i] = in.take(1) ? 0xFFFF : 1;
    if (in.take(1)) {
        in.take_rice(work, g.changed, 0x7FFF);
        if (!in.good()) return false;
        for (size_t i = 0; i < g.changed; ++i) {
            if (!set_size(g.changes[i], work[i] + 1)) return false;
        }
        return true;
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

bool take_groups(BitReader& in, size_t n, Work work, Groups& groups) {
    const uint64_t begins = in.take(32);
    if (!(begins & 1)) return false;
    size_t changed = 0;
    for (unsigned c = 0; c < kClasses; ++c) {
        if (!(begins >> c & 1)) {
            ++groups.group[groups.count - 1].more;
            continue;
        }
        groups.group[groups.count++] = {};
        groups.group[groups.count - 1].first = c;
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

// Applies what a group has to say of a block; whether its lists say so much.
bool change_block(Group& g, uint64_t mine, uint8_t* x) {
    const int64_t count = count_ones(mine);
    uint64_t listed = 0;
    while (g.run < count) {
        listed |= uint64_t{1} << select(mine, static_cast<uint64_t>(g.run));
        g.run = ++g.gap < g.listed ? g.run + 1 + static_cast<int64_t>(g.gaps[g.gap]) : INT64_MAX / 2;
    }
    g.run -= count;
    for (uint64_t bits = g.inverted ? mine & ~listed : listed; bits; bits &= bits - 1) {
        if (g.change == g.changed) return false;
        const unsigned i = lowest(bits);
        const auto made = static_cast<uint16_t>(number(x, i) + g.changes[g.change++]);
        memcpy(x + 2 * i, &made, sizeof made);
    }
    return true;
}

template <Dtype kDtype>
size_t sparse_decode(const uint8_t* codes, size_t size, uint8_t* x, size_t n, uint32_t* work) {
    BitReader in(codes, size);
    Groups groups;
    if (!take_groups(in, n, Work(work, n), groups)) return 0;
    Tile tile;
    for (size_t at = 0; at < n; at += kTile) {
        tile.load<kDtype>(x + 2 * at, n - at);
        for (size_t k = 0; k < groups.count; ++k) {
            Group& g = groups.group[k];
            if (g.changed == 0) continue;
            for (size_t b = 0; b < tile.blocks; ++b) {
                const uint64_t mine = members(tile.classes + b * kBlock, g.first, g.more);
                if (!change_block(g, mine, x + 2 * (at + b * kBlock))) return 0;
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

// The upper 16 bits of a number rotated right by one, which planes undo.
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

void add_sparse(Kernels& k) {
    k.sparse_encode[kFloat16] = sparse_encode<kFloat16>;
    k.sparse_encode[kBfloat16] = sparse_encode<kBfloat16>;
    k.sparse_decode[kFloat16] = sparse_decode<kFloat16>;
    k.sparse_decode[kBfloat16] = sparse_decode<kBfloat16>;
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
