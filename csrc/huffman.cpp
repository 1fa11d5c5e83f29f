// Bytes in Huffman codes of at most 11 bits. Made for exponents of floats: few different ones, of two to three bits
// each.
//
// Segments have 2^17 bytes, the last one possibly fewer, and each has its own codes: first and last byte that occur,
// the lengths of the codes between them in 4 bits each (low half first), the sizes of four streams (u16), and the
// streams, one after the other. Each stream holds a quarter of the segment, rounded up; the last ones may hold less.
// Codes are canonical, by length and then by byte, and are stored from the lowest bit on, their first bit first; the
// bits after the last code are 0.
//
// Decoding looks up 11 bits at a time, for up to seven bytes that they begin with, in four streams at once.
#include "floats.h"
#include "kernels.h"

#if defined(TW_AVX512)
#include "huffman_avx512.h"
#else
#include "huffman_scalar.h"
#endif

namespace tw {
namespace TW_TIER {
namespace {

constexpr unsigned kBits = 11, kEntries = 1u << kBits;
constexpr size_t kSegment = size_t{1} << 17, kStreams = 4;
// The number of codes that certainly fit into a word of 64 bits that begins up to 7 bits before them.
constexpr int kCodesInWord = 5;
// Bytes of output that a word may give, including those that are written past the valid ones.
constexpr size_t kMostFromWord = kCodesInWord * 7 + 8;

inline uint64_t little(uint64_t word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}
inline uint64_t load_word(const uint8_t* from) {
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return little(word);
}
inline void store_word(uint8_t* to, uint64_t word) {
    word = little(word);
    memcpy(to, &word, sizeof word);
}

size_t quarter(size_t n) { return (n + kStreams - 1) / kStreams; }
size_t stream_begin(size_t n, size_t stream) { return min_size(stream * quarter(n), n); }

// How often each byte occurs in each quarter. Each has two counters, because adjacent bytes are often equal, and a
// counter must be stored before it is loaded again.
void count_bytes(const uint8_t* x, size_t n, uint32_t (*counts)[256]) {
    uint32_t others[kStreams][256] = {};
    memset(counts, 0, sizeof others);
    size_t i = 0;
    for (const size_t last = n - stream_begin(n, kStreams - 1); i + 2 <= last; i += 2) {
        for (size_t s = 0; s < kStreams; ++s) {
            const uint8_t* at = x + s * quarter(n) + i;
            ++counts[s][at[0]];
            ++others[s][at[1]];
        }
    }
    for (size_t s = 0; s < kStreams; ++s) {
        for (size_t k = stream_begin(n, s) + i; k < stream_begin(n, s + 1); ++k) ++counts[s][x[k]];
        for (int byte = 0; byte < 256; ++byte) counts[s][byte] += others[s][byte];
    }
}

// Lists the bytes that occur, sorted by count and then by value. Returns how many there are.
unsigned sorted(const uint32_t* counts, uint8_t* order) {
    unsigned found = 0;
    for (unsigned byte = 0; byte < 256; ++byte) {
        if (!counts[byte]) continue;
        unsigned at = found++;
        for (; at && counts[order[at - 1]] > counts[byte]; --at) order[at] = order[at - 1];
        order[at] = static_cast<uint8_t>(byte);
    }
    return found;
}

// The depths in the tree of `n` leaves, at least two, sorted by weight. Among equal weights, leaves come first.
void depths_of(const uint64_t* leaves, unsigned n, uint8_t* depths) {
    uint64_t weights[256];
    uint16_t parents[512];
    unsigned leaf = 0, inner = 0, made = 0;
    const auto take = [&]() -> unsigned {
        const bool is_leaf = leaf < n && (inner == made || leaves[leaf] <= weights[inner]);
        return is_leaf ? leaf++ : n + inner++;
    };
    while (made < n - 1) {
        const unsigned a = take(), b = take();
        const auto weight = [&](unsigned node) { return node < n ? leaves[node] : weights[node - n]; };
        weights[made] = weight(a) + weight(b);
        parents[a] = parents[b] = static_cast<uint16_t>(n + made);
        ++made;
    }
    uint8_t inner_depths[256];
    inner_depths[n - 2] = 0;
    for (unsigned node = n - 2; node-- > 0;) {
        inner_depths[node] = static_cast<uint8_t>(inner_depths[parents[n + node] - n] + 1);
    }
    for (unsigned node = 0; node < n; ++node) {
        depths[node] = static_cast<uint8_t>(inner_depths[parents[node] - n] + 1);
    }
}

// Limits depths to kBits: the rarest bytes get longer codes until all codes fit, then the most frequent ones get
// shorter codes until the code is complete.
void limit(uint8_t* depths, unsigned n) {
    unsigned used = 0;
    for (unsigned i = 0; i < n; ++i) {
        if (depths[i] > kBits) depths[i] = kBits;
        used += kEntries >> depths[i];
    }
    for (unsigned i = 0; used > kEntries; i = (i + 1) % n) {
        if (depths[i] < kBits) used -= kEntries >> ++depths[i];
    }
    while (used < kEntries) {
        for (unsigned i = n; i-- > 0;) {
            if (used + (kEntries >> depths[i]) <= kEntries) used += kEntries >> depths[i]--;
        }
    }
}

// The canonical codes of these lengths, with reversed bits: the first bit is the lowest.
void codes_of(const uint8_t* lengths, Code* codes) {
    unsigned next = 0;
    for (unsigned length = 1; length <= kBits; ++length) {
        for (unsigned byte = 0; byte < 256; ++byte) {
            if (lengths[byte] != length) continue;
            unsigned turned = 0;
            for (unsigned bit = 0; bit < length; ++bit) turned |= (next >> bit & 1) << (length - 1 - bit);
            codes[byte] = {static_cast<uint16_t>(turned), static_cast<uint8_t>(length)};
            ++next;
        }
        next <<= 1;
    }
}

// Writes whole words, up to 8 bytes past the end of the stream, where the next stream follows.
void encode_stream(const uint8_t* x, size_t n, const Code* table, const Codes& codes, uint8_t* out) {
    uint64_t word = 0;
    uint64_t bits = 0;
    const auto put = [&](uint64_t next, uint64_t length) {
        word |= next << bits;
        bits += length;
        store_word(out, word);
        out += bits / 8;
        word >>= bits & ~uint64_t{7};
        bits %= 8;
    };
    size_t i = 0;
    for (; i + kAtOnce <= n; i += kAtOnce) {
        Groups groups;
        const size_t made = codes.encode(x + i, groups);
        for (size_t k = 0; k < made; ++k) put(groups.codes[k], groups.lengths[k]);
    }
    for (; i < n; ++i) put(table[x[i]].bits, table[x[i]].length);
    store_word(out, word);
}

// The lengths of the codes for bytes with these counts; 0 for bytes that do not occur.
void lengths_of(const uint32_t* counts, uint8_t* lengths) {
    uint8_t order[256], depths[256];
    uint64_t weights[256];
    unsigned found = sorted(counts, order);
    for (unsigned i = 0; i < found; ++i) weights[i] = counts[order[i]];
    if (found == 1) {  // there is no code without a bit: another byte gets one, too
        order[1] = static_cast<uint8_t>(order[0] ? 0 : 1);
        weights[1] = weights[0];
        found = 2;
    }
    depths_of(weights, found, depths);
    limit(depths, found);
    memset(lengths, 0, 256);
    for (unsigned i = 0; i < found; ++i) lengths[order[i]] = depths[i];
}

// Writes which bytes have codes, and their lengths. Returns the bytes that this takes, at most 130.
size_t write_lengths(const uint8_t* lengths, uint8_t* out) {
    unsigned first = 0, last = 255;
    while (!lengths[first]) ++first;
    while (!lengths[last]) --last;
    const size_t head = 2 + (last - first) / 2 + 1;
    memset(out, 0, head);
    out[0] = static_cast<uint8_t>(first);
    out[1] = static_cast<uint8_t>(last);
    for (unsigned byte = first; byte <= last; ++byte) {
        out[2 + (byte - first) / 2] |= static_cast<uint8_t>(lengths[byte] << (byte - first) % 2 * 4);
    }
    return head;
}

// Returns the bytes that the encoded segment takes, or 0 if they do not fit in `room`.
size_t encode_segment(const uint8_t* x, size_t n, uint8_t* out, size_t room) {
    uint32_t counts[kStreams][256], total[256];
    uint8_t lengths[256], head[130];
    count_bytes(x, n, counts);
    for (int byte = 0; byte < 256; ++byte)
        total[byte] = counts[0][byte] + counts[1][byte] + counts[2][byte] + counts[3][byte];
    lengths_of(total, lengths);
    const size_t head_size = write_lengths(lengths, head);
    size_t at = head_size + kStreams * sizeof(uint16_t), sizes[kStreams];
    for (size_t s = 0; s < kStreams; ++s) {
        size_t bits = 0;
        for (int byte = 0; byte < 256; ++byte) bits += size_t{counts[s][byte]} * lengths[byte];
        sizes[s] = (bits + 7) / 8;
        at += sizes[s];
    }
    if (at + sizeof(uint64_t) > room) return 0;
    memcpy(out, head, head_size);
    Code table[256] = {};
    codes_of(lengths, table);
    const Codes codes(table);
    uint8_t* to = out + head_size + kStreams * sizeof(uint16_t);
    for (size_t s = 0; s < kStreams; ++s) {
        out[head_size + 2 * s] = static_cast<uint8_t>(sizes[s]);
        out[head_size + 2 * s + 1] = static_cast<uint8_t>(sizes[s] >> 8);
        encode_stream(x + stream_begin(n, s), stream_begin(n, s + 1) - stream_begin(n, s), table, codes, to);
        to += sizes[s];
    }
    return at;
}

size_t huffman_encode(const uint8_t* x, size_t n, uint8_t* out, size_t room) {
    size_t at = 0;
    for (size_t i = 0; i < n; i += kSegment) {
        const size_t made = encode_segment(x + i, min_size(kSegment, n - i), out + at, room - at);
        if (!made) return 0;
        at += made;
    }
    return at;
}

// Up to seven bytes, the first lowest; their number in 3 bits from bit 56, the bits of their codes from bit 59 on.
using Entry = uint64_t;
constexpr unsigned kMostBytes = 7;
inline unsigned bytes_in(Entry entry) { return entry >> 56 & 7; }
inline unsigned bits_in(Entry entry) { return static_cast<unsigned>(entry >> 59); }

struct Tables {
    uint8_t bytes[kEntries];
    uint8_t lengths[kEntries];
    Entry entries[kEntries];
};

void fill(const uint8_t* lengths, Tables& t) {
    Code codes[256];
    codes_of(lengths, codes);
    for (unsigned byte = 0; byte < 256; ++byte) {
        if (!lengths[byte]) continue;
        for (unsigned at = codes[byte].bits; at < kEntries; at += 1u << lengths[byte]) {
            t.bytes[at] = static_cast<uint8_t>(byte);
            t.lengths[at] = lengths[byte];
        }
    }
    for (unsigned at = 0; at < kEntries; ++at) {
        Entry entry = 0;
        unsigned bits = 0, count = 0;
        while (count < kMostBytes && bits + t.lengths[at >> bits] <= kBits) {
            entry |= Entry{t.bytes[at >> bits]} << 8 * count++;
            bits += t.lengths[at >> bits];
        }
        t.entries[at] = entry | Entry{count} << 56 | Entry{bits} << 59;
    }
}

struct Stream {
    const uint8_t* data;
    size_t size;
    size_t bit;
    uint8_t* out;
    uint8_t* end;

    bool has_room() const { return bit / 8 + sizeof(uint64_t) <= size && size_t(end - out) >= kMostFromWord; }
};

// Decodes the rest of a stream, byte by byte. Returns whether it ends where it should, with zeros.
bool finish(Stream& s, const Tables& t) {
    const auto bits_at = [&](size_t bit) {
        unsigned word = 0;
        for (size_t k = 0; k < 3; ++k) {
            if (bit / 8 + k < s.size) word |= unsigned{s.data[bit / 8 + k]} << 8 * k;
        }
        return word >> bit % 8;
    };
    while (s.out < s.end) {
        const unsigned at = bits_at(s.bit) & (kEntries - 1);
        *s.out++ = t.bytes[at];
        s.bit += t.lengths[at];
    }
    return (s.bit + 7) / 8 == s.size && bits_at(s.bit) == 0;
}

// Reads the lengths of codes. Returns the bytes that they take, or 0 if no encoder writes such lengths.
size_t read_lengths(const uint8_t* data, size_t size, uint8_t* lengths) {
    if (size < 3 || data[0] >= data[1]) return 0;
    const unsigned first = data[0], last = data[1];
    const size_t head = 2 + (last - first) / 2 + 1;
    if (size < head) return 0;
    unsigned used = 0;
    for (unsigned byte = first; byte <= last; ++byte) {
        const unsigned length = data[2 + (byte - first) / 2] >> (byte - first) % 2 * 4 & 15;
        if (length > kBits) return 0;
        lengths[byte] = static_cast<uint8_t>(length);
        if (length) used += kEntries >> length;
    }
    const bool unused_half = (last - first) % 2 == 0 && data[head - 1] >> 4;
    return used == kEntries && lengths[first] && lengths[last] && !unused_half ? head : 0;
}

// Decodes a segment. Returns the bytes that it takes, or 0 if no encoder writes such bytes.
size_t decode_segment(const uint8_t* data, size_t size, uint8_t* out, size_t n) {
    uint8_t lengths[256] = {};
    size_t at = read_lengths(data, size, lengths);
    if (!at || size - at < kStreams * sizeof(uint16_t)) return 0;
    Stream streams[kStreams];
    const uint8_t* sizes = data + at;
    at += kStreams * sizeof(uint16_t);
    for (size_t s = 0; s < kStreams; ++s) {
        const size_t stream_size = sizes[2 * s] | size_t{sizes[2 * s + 1]} << 8;
        if (stream_size > size - at) return 0;
        streams[s] = {data + at, stream_size, 0, out + stream_begin(n, s), out + stream_begin(n, s + 1)};
        at += stream_size;
    }
    Tables t;
    fill(lengths, t);
    Stream a = streams[0], b = streams[1], c = streams[2], d = streams[3];
    while (a.has_room() && b.has_room() && c.has_room() && d.has_room()) {
        uint64_t words[kStreams];
        const auto load = [](const Stream& s) { return load_word(s.data + s.bit / 8) >> s.bit % 8; };
        words[0] = load(a), words[1] = load(b), words[2] = load(c), words[3] = load(d);
        const auto step = [&](Stream& s, uint64_t& word) {
            const Entry entry = t.entries[word & (kEntries - 1)];
            store_word(s.out, entry);
            s.out += bytes_in(entry);
            s.bit += bits_in(entry);
            word >>= bits_in(entry);
        };
        for (int k = 0; k < kCodesInWord; ++k) {
            step(a, words[0]), step(b, words[1]), step(c, words[2]), step(d, words[3]);
        }
    }
    bool good = finish(a, t);
    good &= finish(b, t);
    good &= finish(c, t);
    good &= finish(d, t);
    return good ? at : 0;
}

bool huffman_decode(const uint8_t* data, size_t size, uint8_t* out, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < n; i += kSegment) {
        const size_t taken = decode_segment(data + at, size - at, out + i, min_size(kSegment, n - i));
        if (!taken) return false;
        at += taken;
    }
    return at == size;
}

}  // namespace

void add_huffman(Kernels& k) {
    k.huffman_encode = huffman_encode;
    k.huffman_decode = huffman_decode;
}

}  // namespace TW_TIER
}  // namespace tw
