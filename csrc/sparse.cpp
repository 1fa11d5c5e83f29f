// The sparse codec: the largest elements of chunks, or of their two-dimensional DCT; and codes of their positions.
//
// What is calculated, and in which order, is said in tensorwire/kernels/_numpy_sparse.py. Matrices are worked on in
// rows of 64 columns, with zeros behind narrower ones.
#include "kernels.h"
#include "simd.h"

namespace tw {
namespace TW_TIER {
namespace {

// The position of what is kept of a chunk of zeros.
constexpr uint16_t kNothing = 0xFFFF;

constexpr size_t min_of(size_t a, size_t b) { return a < b ? a : b; }

// A chunk: its first element, its rows and columns, and how far apart rows are.
struct Chunk {
    size_t start, height, width, stride;

    size_t size() const { return height * width; }
};

// Calls `visit` for every chunk of n elements, until it says false.
template <class Visit>
bool each_chunk(const Grid& grid, size_t n, Visit visit) {
    for (size_t start = 0; start < n;) {
        size_t height = min_of(grid.rows, (n - start) / grid.width), across = grid.width;
        if (height == 0) {  // behind the last whole row
            height = 1;
            across = n - start;
        }
        for (size_t col = 0; col < across; col += grid.cols) {
            if (!visit(Chunk{start + col, height, min_of(grid.cols, across - col), across})) return false;
        }
        start += height * across;
    }
    return true;
}

// ---- the transform -----------------------------------------------------------------------------------------------

struct alignas(64) Matrix {
    float at[kMostSide][kMostSide];
};

const float* of_length(const float* basis, size_t n) { return basis + (n - 1) * n * (2 * n - 1) / 6; }

constexpr size_t kVectors = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 16;
constexpr size_t kTileRows = 4;

// out[r][x] = the sum of a[r][i] * y[i][x] over ascending i, for kRows rows and kVectors vectors of columns.
template <size_t kRows>
void multiply_tile(const float* a, size_t a_stride, const Matrix& y, size_t inner, Matrix& out, size_t row, size_t col) {
    Floats sums[kRows][kVectors];
    for (size_t r = 0; r < kRows; ++r) {
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = splat(0.0f);
    }
    for (size_t i = 0; i < inner; ++i) {
        const float* from = y.at[i] + col;
        for (size_t r = 0; r < kRows; ++r) {
            const Floats factor = splat(get(a + (row + r) * a_stride + i));
            for (size_t v = 0; v < kVectors; ++v) {
                sums[r][v] = add(sums[r][v], mul(factor, load(from + v * kLanes)));
            }
        }
    }
    for (size_t r = 0; r < kRows; ++r) {
        for (size_t v = 0; v < kVectors; ++v) store(out.at[row + r] + col + v * kLanes, sums[r][v]);
    }
}

// The product of a, `rows` by `inner`, and y, `inner` by `cols`.
void multiply(const float* a, size_t a_stride, const Matrix& y, size_t rows, size_t inner, size_t cols, Matrix& out) {
    for (size_t col = 0; col < cols; col += kVectors * kLanes) {
        size_t row = 0;
        for (; row + kTileRows <= rows; row += kTileRows) multiply_tile<kTileRows>(a, a_stride, y, inner, out, row, col);
        for (; row < rows; ++row) multiply_tile<1>(a, a_stride, y, inner, out, row, col);
    }
}

// The DCT of one length, row u for frequency u; or turned, column u. Zeros stand behind.
class Side {
public:
    explicit Side(bool turned) : turned_(turned) {}

    const Matrix& of(const float* basis, size_t n) {
        if (n == n_) return matrix_;
        const float* from = of_length(basis, n);
        memset(&matrix_, 0, sizeof matrix_);
        for (size_t u = 0; u < n; ++u) {
            for (size_t x = 0; x < n; ++x) (turned_ ? matrix_.at[x][u] : matrix_.at[u][x]) = get(from + u * n + x);
        }
        n_ = n;
        return matrix_;
    }

private:
    bool turned_;
    size_t n_ = 0;
    Matrix matrix_;
};

// ---- selection ---------------------------------------------------------------------------------------------------

constexpr size_t kGroup = 64;  // magnitudes that have one largest
constexpr int32_t kTaken = -1;
constexpr int32_t kLargestBits = 0x71800000;  // 2^100

int32_t largest_of(const int32_t* x) {
    int32_t largest = kTaken;
    for (size_t i = 0; i < kGroup; ++i) largest = largest > x[i] ? largest : x[i];
    return largest;
}

size_t first_of(const int32_t* x, int32_t wanted) {
    size_t i = 0;
    while (x[i] != wanted) ++i;
    return i;
}

// The magnitudes of a chunk, of which the largest are taken one by one.
class Selection {
public:
    // `row(i)`: where the elements of a row stand.
    template <class Row>
    Selection(const Chunk& chunk, Row row) : size_(chunk.size()) {
        int32_t* to = magnitudes_;
        for (size_t i = 0; i < chunk.height; ++i) {
            const float* from = row(i);
            for (size_t x = 0; x < chunk.width; ++x) to[x] = static_cast<int32_t>(bits_of(get(from + x)) & ~kSignBit);
            to += chunk.width;
        }
        groups_ = (size_ + kGroup - 1) / kGroup;
        for (size_t i = size_; i < groups_ * kGroup; ++i) magnitudes_[i] = kTaken;
        for (size_t g = 0; g < kMostChunk / kGroup; ++g) {
            largest_[g] = g < groups_ ? largest_of(magnitudes_ + g * kGroup) : kTaken;
        }
    }

    // Of equal ones those at lower positions. `kept` has a bit for each position.
    void take(size_t k, uint64_t* kept) {
        for (size_t g = 0; g < groups_; ++g) kept[g] = 0;
        for (size_t left = min_of(k, size_); left > 0; --left) {
            const size_t group = first_of(largest_, largest_of(largest_));
            const size_t i = first_of(magnitudes_ + group * kGroup, largest_[group]);
            magnitudes_[group * kGroup + i] = kTaken;
            largest_[group] = largest_of(magnitudes_ + group * kGroup);
            kept[group] |= uint64_t{1} << i;
        }
    }

    size_t groups() const { return groups_; }
    bool nothing() const { return largest_of(largest_) == 0; }

private:
    size_t size_, groups_;
    alignas(64) int32_t magnitudes_[kMostChunk];
    alignas(64) int32_t largest_[kMostChunk / kGroup];
};

bool all_taken(const float* x, size_t n) {
    int32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t magnitude = static_cast<int32_t>(bits_of(get(x + i)) & ~kSignBit);
        largest = largest > magnitude ? largest : magnitude;
    }
    return largest <= kLargestBits;
}

bool select_largest(const float* values, uint16_t* positions, float* coefficients, size_t n, const Grid& grid,
                    const float* basis) {
    Side across(true);
    Matrix given, turned, made;
    return each_chunk(grid, n, [&](const Chunk& chunk) {
        const float* from = values + chunk.start;
        bool good = true;
        for (size_t i = 0; i < chunk.height; ++i) good &= all_taken(from + i * chunk.stride, chunk.width);
        if (!good) return false;
        if (basis) {
            memset(&given, 0, sizeof given);
            for (size_t i = 0; i < chunk.height; ++i) {
                memcpy(given.at[i], from + i * chunk.stride, chunk.width * sizeof(float));
            }
            const Matrix& b = across.of(basis, chunk.width);
            multiply(of_length(basis, chunk.height), chunk.height, given, chunk.height, chunk.height, chunk.width,
                     turned);
            multiply(turned.at[0], kMostSide, b, chunk.height, chunk.width, chunk.width, made);
        }
        const auto row = [&](size_t i) { return basis ? made.at[i] : from + i * chunk.stride; };
        uint64_t kept[kMostChunk / kGroup];
        Selection selection(chunk, row);
        if (selection.nothing()) {
            for (size_t i = min_of(grid.k, chunk.size()); i > 0; --i) {
                put(positions++, kNothing);
                put(coefficients++, 0.0f);
            }
            return true;
        }
        selection.take(grid.k, kept);
        for (size_t group = 0; group < selection.groups(); ++group) {
            if (!kept[group]) continue;
            for (size_t i = 0; i < kGroup; ++i) {
                if (!(kept[group] >> i & 1)) continue;
                const size_t position = group * kGroup + i;
                put(positions++, static_cast<uint16_t>(position));
                put(coefficients++, get(row(position / chunk.width) + position % chunk.width));
            }
        }
        return true;
    });
}

// ---- adding ------------------------------------------------------------------------------------------------------

template <class Sum>
void add_row(Sum* sums, const float* elements, size_t n, Sum weight) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add_weighted(sums + i, load(elements + i), weight);
    for (; i < n; ++i) put(sums + i, get(sums + i) + weight * static_cast<Sum>(elements[i]));
}

// What has been selected of one chunk, transformed back.
class Inverse {
public:
    explicit Inverse(const float* basis) : basis_(basis) {}

    // False: a position is not in the chunk.
    bool operator()(const Chunk& chunk, const uint16_t* positions, const float* coefficients, size_t kept, Matrix& out) {
        const Matrix& b = across_.of(basis_, chunk.width);
        const float* down = of_length(basis_, chunk.height);
        size_t rows = 0, last = kMostSide;
        for (size_t i = 0; i < kept; ++i) {
            const size_t position = get(positions + i);
            const float coefficient = get(coefficients + i);
            if (position == kNothing) continue;
            if (position >= chunk.size()) return false;
            const size_t u = position / chunk.width, v = position % chunk.width;
            if (coefficient == 0) continue;
            if (u != last) {
                last = u;
                for (size_t y = 0; y < chunk.height; ++y) factors_[y * kMostSide + rows] = get(down + u * chunk.height + y);
                memset(turned_.at[rows++], 0, sizeof turned_.at[0]);
            }
            float* to = turned_.at[rows - 1];
            for (size_t x = 0; x < kMostSide; ++x) to[x] += coefficient * b.at[v][x];
        }
        multiply(factors_, kMostSide, turned_, chunk.height, rows, chunk.width, out);
        return true;
    }

private:
    const float* basis_;
    Side across_{false};
    Matrix turned_;
    float factors_[kMostChunk];
};

template <class Sum>
bool add_selected(const uint16_t* positions, const float* coefficients, Sum* sums, size_t n, double weight,
                  const Grid& grid, const float* basis) {
    const Sum factor = static_cast<Sum>(weight);
    Inverse inverse(basis);
    Matrix elements;
    return each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        Sum* to = sums + chunk.start;
        if (basis) {
            if (!inverse(chunk, positions, coefficients, kept, elements)) return false;
            for (size_t i = 0; i < chunk.height; ++i) add_row(to + i * chunk.stride, elements.at[i], chunk.width, factor);
        } else {
            for (size_t i = 0; i < kept; ++i) {
                const size_t position = get(positions + i);
                if (position == kNothing) continue;
                if (position >= chunk.size()) return false;
                Sum* sum = to + position / chunk.width * chunk.stride + position % chunk.width;
                put(sum, get(sum) + factor * static_cast<Sum>(get(coefficients + i)));
            }
        }
        positions += kept;
        coefficients += kept;
        return true;
    });
}

// ---- codes of positions ------------------------------------------------------------------------------------------

constexpr size_t kEnumerated = 6;

// n over i, for i <= 6.
uint64_t combinations(uint64_t n, size_t i) {
    if (n < i) return 0;
    switch (i) {
        case 0: return 1;
        case 1: return n;
        case 2: return n * (n - 1) / 2;
        case 3: return n * (n - 1) * (n - 2) / 6;
        case 4: return n * (n - 1) * (n - 2) * (n - 3) / 24;
        default: break;
    }
    const uint64_t five = n * (n - 1) * (n - 2) * (n - 3) * (n - 4) / 120;
    return i == 5 ? five : five / 6 * (n - 5) + five % 6 * (n - 5) / 6;  // the product has more than 64 bits
}

unsigned enumerated_bits(size_t n, size_t k) {
    unsigned bits = 0;
    for (uint64_t most = combinations(n, k) - 1; most; most >>= 1) ++bits;
    return bits;
}

// The largest p below n whose combinations of i are at most `number`.
size_t place_of(uint64_t number, size_t i, size_t n) {
    size_t low = 0, high = n;
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        (combinations(middle, i) <= number ? low : high) = middle;
    }
    return low;
}

class BitWriter {
public:
    BitWriter(uint8_t* to, size_t room) : begin_(to), to_(to), end_(to + room) {}

    // Up to 32 bits.
    void put(uint64_t value, unsigned bits) {
        held_ |= value << fill_;
        for (fill_ += bits; fill_ >= 8; fill_ -= 8) flush();
    }
    void zeros(size_t bits) {
        for (; bits > 32; bits -= 32) put(0, 32);
        put(0, static_cast<unsigned>(bits));
    }
    // The bytes that were written, or 0 where there was no room for all.
    size_t end() {
        if (fill_) flush();
        return full_ ? 0 : static_cast<size_t>(to_ - begin_);
    }

private:
    void flush() {
        if (to_ == end_) {
            full_ = true;
        } else {
            *to_++ = static_cast<uint8_t>(held_);
        }
        held_ >>= 8;
    }

    uint8_t *begin_, *to_, *end_;
    uint64_t held_ = 0;
    unsigned fill_ = 0;
    bool full_ = false;
};

class BitReader {
public:
    BitReader(const uint8_t* from, size_t size) : from_(from), bits_(8 * size) {}

    // Whether so many bits are left.
    bool has(size_t bits) const { return bits <= bits_ - at_; }

    // Up to 57 bits, which are there.
    uint64_t get(unsigned bits) {
        const uint64_t value = window() & ((uint64_t{1} << bits) - 1);
        at_ += bits;
        return value;
    }
    // The bits 0 before the next 1, which is read, too; false: there is none.
    bool zeros(size_t& count) {
        count = 0;
        while (at_ < bits_) {
            const uint64_t ahead = window();
            const size_t known = min_of(57, bits_ - at_);
            size_t i = 0;
            while (i < known && !(ahead >> i & 1)) ++i;
            count += i;
            at_ += i;
            if (i < known) {
                ++at_;
                return true;
            }
        }
        return false;
    }
    // Whether nothing but bits 0 of the last byte is left.
    bool at_end() { return bits_ - at_ < 8 && (at_ == bits_ || get(static_cast<unsigned>(bits_ - at_)) == 0); }

private:
    // At least 57 bits from here on, zeros behind the end.
    uint64_t window() const {
        const size_t byte = at_ / 8, size = bits_ / 8;
        uint64_t bits = 0;
        memcpy(&bits, from_ + byte, min_of(sizeof bits, size - byte));
        return bits >> at_ % 8;
    }

    const uint8_t* from_;
    size_t bits_, at_ = 0;
};

void write_rice(BitWriter& bits, size_t gap, unsigned rice) {
    bits.zeros(gap >> rice);
    bits.put(1 | (gap & ((size_t{1} << rice) - 1)) << 1, 1 + rice);
}

size_t encode_positions(const uint16_t* positions, uint8_t* codes, size_t room, size_t n, const Grid& grid,
                        unsigned rice) {
    BitWriter bits(codes, room);
    each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        const bool nothing = get(positions) == kNothing;
        if (grid.k <= kEnumerated) {
            uint64_t number = nothing ? combinations(chunk.size(), kept) : 0;
            for (size_t i = 0; i < kept && !nothing; ++i) number += combinations(get(positions + i), i + 1);
            const unsigned size = enumerated_bits(chunk.size(), kept), low = size < 32 ? size : 32;
            if (number >> size) number = 0;
            bits.put(number & ((uint64_t{1} << low) - 1), low);
            bits.put(number >> 32, size - low);
        } else if (nothing) {
            write_rice(bits, chunk.size(), rice);
        } else {
            size_t next = 0;
            for (size_t i = 0; i < kept; ++i) {
                const size_t gap = get(positions + i) - next;
                write_rice(bits, gap, rice);
                next += gap + 1;
            }
        }
        positions += kept;
        return true;
    });
    return bits.end();
}

void nothing_of(uint16_t* positions, size_t kept) {
    for (size_t i = 0; i < kept; ++i) put(positions + i, kNothing);
}

bool decode_positions(const uint8_t* codes, size_t size, uint16_t* positions, size_t n, const Grid& grid,
                      unsigned rice) {
    BitReader bits(codes, size);
    const bool good = each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        if (grid.k <= kEnumerated) {
            const unsigned length = enumerated_bits(chunk.size(), kept), low = length < 32 ? length : 32;
            if (!bits.has(length)) return false;
            uint64_t number = bits.get(low);
            number |= bits.get(length - low) << low % 64;
            const uint64_t all = combinations(chunk.size(), kept);
            if (number > all) return false;
            if (number == all) nothing_of(positions, kept);
            for (size_t i = number < all ? kept : 0; i > 0; --i) {
                const size_t place = place_of(number, i, chunk.size());
                number -= combinations(place, i);
                put(positions + i - 1, static_cast<uint16_t>(place));
            }
        } else {
            size_t next = 0;
            for (size_t i = 0; i < kept; ++i) {
                size_t high;
                if (!bits.zeros(high) || !bits.has(rice) || high > kMostChunk) return false;
                next += (high << rice) + bits.get(rice);
                if (i == 0 && next == chunk.size()) {
                    nothing_of(positions, kept);
                    break;
                }
                if (next >= chunk.size()) return false;
                put(positions + i, static_cast<uint16_t>(next++));
            }
        }
        positions += kept;
        return true;
    });
    return good && bits.at_end();
}

}  // namespace

void add_sparse(Kernels& k) {
    k.select_largest = select_largest;
    k.add_to_float = add_selected<float>;
    k.add_to_double = add_selected<double>;
    k.encode_positions = encode_positions;
    k.decode_positions = decode_positions;
}

}  // namespace TW_TIER
}  // namespace tw
