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

// Columns that are worked on together, of all 64 or of half of them, and rows as fill the registers.
constexpr size_t kWide = kLanes == 16 ? 4 : kLanes == 8 ? 4 : 32;
constexpr size_t kRowsOfTile = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;

// Rows of the product of two matrices: row r of `a` begins at a + r * a_stride, row r of the result at out + r * out_stride.
struct Product {
    const float* a;
    size_t a_stride, rows, inner, cols;
    float* out;
    size_t out_stride;
};

// out[r][x] = the sum of a[r][i] * y[i][x] over ascending i, for kRows rows and kVectors vectors of columns.
template <size_t kRows, size_t kVectors>
void multiply_tile(const Product& p, const Matrix& y, size_t row, size_t col) {
    Floats sums[kRows][kVectors];
    for (size_t r = 0; r < kRows; ++r) {
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = splat(0.0f);
    }
    const float* factors = p.a + row * p.a_stride;
    for (size_t i = 0; i < p.inner; ++i) {
        const float* from = y.at[i] + col;
        for (size_t r = 0; r < kRows; ++r) {
            const Floats factor = splat(get(factors + r * p.a_stride + i));
            for (size_t v = 0; v < kVectors; ++v) {
                sums[r][v] = add(sums[r][v], mul(factor, load(from + v * kLanes)));
            }
        }
    }
    for (size_t r = 0; r < kRows; ++r) {
        for (size_t v = 0; v < kVectors; ++v) store(p.out + (row + r) * p.out_stride + col + v * kLanes, sums[r][v]);
    }
}

template <size_t kRows, size_t kVectors>
void multiply_by_tiles(const Product& p, const Matrix& y) {
    for (size_t col = 0; col < p.cols; col += kVectors * kLanes) {
        size_t row = 0;
        for (; row + kRows <= p.rows; row += kRows) multiply_tile<kRows, kVectors>(p, y, row, col);
        for (; row < p.rows; ++row) multiply_tile<1, kVectors>(p, y, row, col);
    }
}

// Rows of `out` are written up to the next multiple of 32 columns.
void multiply(const Product& p, const Matrix& y) {
    if (kLanes == 16 && p.cols <= kMostSide / 2) {
        multiply_by_tiles<2 * kRowsOfTile, kWide / 2>(p, y);
    } else {
        multiply_by_tiles<kRowsOfTile, kWide>(p, y);
    }
}

// The DCT of one length: row u for frequency u, with zeros behind.
class Side {
public:
    const Matrix& of(const float* basis, size_t n) {
        if (n != n_) {
            const float* from = of_length(basis, n);
            memset(&matrix_, 0, sizeof matrix_);
            for (size_t u = 0; u < n; ++u) memcpy(matrix_.at[u], from + u * n, n * sizeof(float));
            n_ = n;
        }
        return matrix_;
    }

private:
    size_t n_ = 0;
    Matrix matrix_;
};

// The DCT of one length, turned: column j of `even` is frequency 2 * j, of `odd` frequency 2 * j + 1.
class TurnedSide {
public:
    void prepare(const float* basis, size_t n) {
        if (n == n_) return;
        const float* from = of_length(basis, n);
        memset(&even, 0, sizeof even);
        memset(&odd, 0, sizeof odd);
        for (size_t u = 0; u < n; ++u) {
            for (size_t x = 0; x < (n + 1) / 2; ++x) (u % 2 ? odd : even).at[x][u / 2] = get(from + u * n + x);
        }
        n_ = n;
    }

    Matrix even, odd;

private:
    size_t n_ = 0;
};

// The DCT of chunks. Both ends of a row or column are added, for even frequencies, and subtracted, for odd ones.
class Forward {
public:
    explicit Forward(const float* basis) : basis_(basis) {}

    // Coefficients, row by row, `chunk.width` apart.
    void operator()(const Chunk& chunk, const float* from, float* coefficients) {
        const size_t height = chunk.height, width = chunk.width, rows = (height + 1) / 2, cols = (width + 1) / 2;
        const float* down = of_length(basis_, height);
        fold_rows(chunk, from);
        multiply({down, 2 * height, rows, rows, width, turned_.at[0], 2 * kMostSide}, sums_);
        multiply({down + height, 2 * height, height / 2, height / 2, width, turned_.at[1], 2 * kMostSide},
                 differences_);
        across_.prepare(basis_, width);
        for (size_t u = 0; u < height; ++u) fold_row(turned_.at[u], width, sums_.at[u], differences_.at[u]);
        multiply({sums_.at[0], kMostSide, height, cols, cols, even_.at[0], kMostSide}, across_.even);
        multiply({differences_.at[0], kMostSide, height, width / 2, width / 2, odd_.at[0], kMostSide}, across_.odd);
        for (size_t u = 0; u < height; ++u, coefficients += width) {
            for (size_t j = 0; j < width / 2; ++j) {
                coefficients[2 * j] = even_.at[u][j];
                coefficients[2 * j + 1] = odd_.at[u][j];
            }
            if (width % 2) coefficients[width - 1] = even_.at[u][cols - 1];
        }
    }

private:
    void fold_rows(const Chunk& chunk, const float* from) {
        for (size_t i = 0; i < chunk.height / 2; ++i) {
            const float *top = from + i * chunk.stride, *bottom = from + (chunk.height - 1 - i) * chunk.stride;
            for (size_t x = 0; x < chunk.width; ++x) {
                sums_.at[i][x] = get(top + x) + get(bottom + x);
                differences_.at[i][x] = get(top + x) - get(bottom + x);
            }
        }
        if (chunk.height % 2) {
            const size_t middle = chunk.height / 2;
            memcpy(sums_.at[middle], from + middle * chunk.stride, chunk.width * sizeof(float));
        }
    }
    static void fold_row(const float* __restrict row, size_t n, float* __restrict sums, float* __restrict differences) {
        float back[kMostSide / 2];
        for (size_t x = 0; x < n / 2; ++x) back[x] = row[n - 1 - x];
        for (size_t x = 0; x < n / 2; ++x) {
            sums[x] = row[x] + back[x];
            differences[x] = row[x] - back[x];
        }
        if (n % 2) sums[n / 2] = row[n / 2];
    }

    const float* basis_;
    TurnedSide across_;
    Matrix sums_{}, differences_{}, turned_, even_, odd_;
};

// ---- selection ---------------------------------------------------------------------------------------------------

constexpr size_t kGroup = 16;  // magnitudes that have one largest
constexpr size_t kGroups = kMostChunk / kGroup;
constexpr int32_t kLargestBits = 0x71800000;  // 2^100
constexpr int kMagnitudeBits = 31;

int32_t largest_of(const int32_t* group) {
    const float* x = reinterpret_cast<const float*>(group);
    Words largest = no_words();
    for (size_t i = 0; i < kGroup; i += kLanes) largest = max(largest, magnitude(load(x + i)));
    return static_cast<int32_t>(max_lane(largest));
}

// The largest number that at least k of these reach; a lower one, if no more than `enough` exceed that; 0 where there are
// fewer than k.
int32_t kth_largest(const int32_t* x, size_t n, size_t k, size_t enough) {
    int32_t found = 0;
    for (int bit = kMagnitudeBits - 1; bit >= 0; --bit) {
        const int32_t tried = found | static_cast<int32_t>(1u << bit);
        uint32_t reach = 0;
        for (size_t i = 0; i < n; ++i) reach += x[i] >= tried;
        if (reach < k) continue;
        if (reach <= enough) return tried - 1;
        found = tried;
    }
    return found;
}

// The k elements of a chunk of the largest magnitude, of equal ones those at lower positions.
class Selection {
public:
    // `row(i)`: where the elements of a row stand. Writes k positions, ascending.
    template <class Row>
    void operator()(const Chunk& chunk, Row row, size_t k, uint16_t* positions) {
        const size_t groups = load_magnitudes(chunk, row);
        const int32_t low = kth_largest(largest_, kGroups, k, k + k / 4);
        size_t found = 0;  // that may be among them: at least k
        for (size_t group = 0; group < groups; ++group) {
            if (largest_[group] < low) continue;
            for (size_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
                values_[found] = magnitudes_[i];
                places_[found] = static_cast<uint16_t>(i);
                found += magnitudes_[i] >= low;
            }
        }
        const int32_t kth = kth_largest(values_, found, k, k);
        size_t above = 0;
        for (size_t i = 0; i < found; ++i) above += values_[i] > kth;
        size_t equal = k - above;  // that are taken of those
        for (size_t i = 0; i < found; ++i) {
            const bool taken = values_[i] > kth || (values_[i] == kth && equal > 0);
            equal -= values_[i] == kth && equal > 0;
            if (taken) put(positions++, places_[i]);
        }
    }

private:
    template <class Row>
    size_t load_magnitudes(const Chunk& chunk, Row row) {
        const size_t groups = (chunk.size() + kGroup - 1) / kGroup;
        int32_t* to = magnitudes_;
        for (size_t i = 0; i < chunk.height; ++i, to += chunk.width) {
            const float* from = row(i);
            for (size_t x = 0; x < chunk.width; ++x) to[x] = static_cast<int32_t>(bits_of(get(from + x)) & ~kSignBit);
        }
        // What stands behind is equal at best, and comes last.
        for (size_t i = chunk.size(); i < groups * kGroup; ++i) magnitudes_[i] = 0;
        for (size_t group = 0; group < groups; ++group) largest_[group] = largest_of(magnitudes_ + group * kGroup);
        for (size_t group = groups; group < kGroups; ++group) largest_[group] = 0;
        return groups;
    }

    alignas(64) int32_t magnitudes_[kMostChunk];
    alignas(64) int32_t largest_[kGroups];
    alignas(64) int32_t values_[kMostChunk + 1];
    uint16_t places_[kMostChunk + 1];
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
    Forward forward(basis);
    Selection select;
    alignas(64) float made[kMostChunk];
    return each_chunk(grid, n, [&](const Chunk& chunk) {
        const float* from = values + chunk.start;
        bool good = true;
        for (size_t i = 0; i < chunk.height; ++i) good &= all_taken(from + i * chunk.stride, chunk.width);
        if (!good) return false;
        if (basis) forward(chunk, from, made);
        const auto row = [&](size_t i) { return basis ? made + i * chunk.width : from + i * chunk.stride; };
        const size_t kept = min_of(grid.k, chunk.size());
        select(chunk, row, kept, positions);
        bool something = false;
        for (size_t i = 0; i < kept; ++i) {
            const size_t position = get(positions + i);
            const float value = get(row(position / chunk.width) + position % chunk.width);
            put(coefficients + i, value);
            something |= value != 0;
        }
        for (size_t i = 0; i < kept && !something; ++i) {
            put(positions + i, kNothing);
            put(coefficients + i, 0.0f);
        }
        positions += kept;
        coefficients += kept;
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

// What has been selected of one chunk, transformed back. Rows at both ends have the same factors, up to the sign.
class Inverse {
public:
    explicit Inverse(const float* basis) : basis_(basis) {}

    // False: a position is not in the chunk.
    bool operator()(const Chunk& chunk, const uint16_t* positions, const float* coefficients, size_t kept,
                    Matrix& out) {
        const Matrix& b = across_.of(basis_, chunk.width);
        const size_t half = (chunk.height + 1) / 2;
        size_t last = kMostSide;
        float* turned = nullptr;
        even_.rows = odd_.rows = 0;
        for (size_t i = 0; i < kept; ++i) {
            const size_t position = get(positions + i);
            const float coefficient = get(coefficients + i);
            if (position == kNothing) continue;
            if (position >= chunk.size()) return false;
            const size_t u = position / chunk.width, v = position % chunk.width;
            if (coefficient == 0) continue;
            if (u != last)
                turned = (u % 2 ? odd_ : even_).begin_row(of_length(basis_, chunk.height) + u * chunk.height, half);
            last = u;
            for (size_t x = 0; x < kMostSide; ++x) turned[x] += coefficient * b.at[v][x];
        }
        even_.multiply_into(half, chunk.width);
        odd_.multiply_into(half, chunk.width);
        for (size_t i = 0; i < half; ++i) {
            float *top = out.at[i], *bottom = out.at[chunk.height - 1 - i];
            for (size_t x = 0; x < kMostSide; ++x) {
                const float even = even_.product.at[i][x], odd = odd_.product.at[i][x];
                bottom[x] = even - odd;
                top[x] = even + odd;  // last: the middle is both, and has nothing odd
            }
        }
        return true;
    }

private:
    // The frequencies of one kind that a chunk has, as rows; and what they make of its upper half.
    struct Half {
        // The next row, of zeros. `factors`: by which it counts in each row of the chunk.
        float* begin_row(const float* factors, size_t half) {
            for (size_t i = 0; i < half; ++i) factors_[i * kMostSide + rows] = get(factors + i);
            memset(turned_.at[rows], 0, sizeof turned_.at[rows]);
            return turned_.at[rows++];
        }
        void multiply_into(size_t half, size_t width) {
            multiply({factors_, kMostSide, half, rows, width, product.at[0], kMostSide}, turned_);
        }

        size_t rows = 0;
        Matrix product{};

    private:
        Matrix turned_;
        float factors_[kMostSide * kMostSide / 2];
    };

    const float* basis_;
    Side across_;
    Half even_, odd_;
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
            for (size_t i = 0; i < chunk.height; ++i)
                add_row(to + i * chunk.stride, elements.at[i], chunk.width, factor);
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

// ---- combining ---------------------------------------------------------------------------------------------------

// The sums of what messages hold of one chunk.
class Sums {
public:
    // False: a position is not in the chunk.
    bool add(const Chunk& chunk, const uint16_t* positions, const float* values, size_t kept, double weight,
             bool signs) {
        for (size_t i = 0; i < kept; ++i) {
            const size_t position = get(positions + i);
            if (position == kNothing) continue;
            if (position >= chunk.size()) return false;
            const double value = get(values + i);
            const uint64_t mark = uint64_t{1} << position % 64;
            if (!(marks_[position / 64] & mark)) sums_[position] = weights_[position] = 0;
            marks_[position / 64] |= mark;
            sums_[position] += weight * (signs ? sign(value) : value);
            weights_[position] += weight;
        }
        return true;
    }

    // What has become of them, by ascending position: how many. Begins anew.
    size_t take(const Combining& how, uint16_t* positions, float* values) {
        size_t taken = 0;
        for (size_t word = 0; word < kMostChunk / 64; ++word) {
            if (!marks_[word]) continue;
            for (size_t bit = 0; bit < 64; ++bit) {
                if (!(marks_[word] >> bit & 1)) continue;
                const size_t position = 64 * word + bit;
                const double sum = sums_[position];
                positions[taken] = static_cast<uint16_t>(position);
                values[taken++] = static_cast<float>(how.signs     ? sign(sum)
                                                     : how.present ? sum / weights_[position]
                                                                   : sum / how.divisor);
            }
            marks_[word] = 0;
        }
        return taken;
    }

private:
    static double sign(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : 0.0; }

    uint64_t marks_[kMostChunk / 64] = {};
    double sums_[kMostChunk], weights_[kMostChunk];
};

bool combine_selected(const uint16_t* positions, const float* values, const double* weights, size_t messages,
                      size_t kept_of_each, float* out, size_t n, const Combining& how, const Grid& grid,
                      const float* basis) {
    Sums sums;
    Inverse inverse(basis);
    Matrix elements;
    uint16_t places[kMostChunk];
    float made[kMostChunk];
    return each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        for (size_t m = 0; m < messages; ++m) {
            const size_t at = m * kept_of_each;
            if (!sums.add(chunk, positions + at, values + at, kept, get(weights + m), how.signs)) return false;
        }
        const size_t taken = sums.take(how, places, made);
        float* to = out + chunk.start;
        if (basis) inverse(chunk, places, made, taken, elements);
        for (size_t i = 0; i < chunk.height; ++i) {
            for (size_t x = 0; x < chunk.width; ++x)
                put(to + i * chunk.stride + x, basis ? 0.0f + elements.at[i][x] : 0.0f);
        }
        for (size_t i = 0; i < taken && !basis; ++i) {
            put(to + places[i] / chunk.width * chunk.stride + places[i] % chunk.width, 0.0f + made[i]);
        }
        positions += kept;
        values += kept;
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

// The parameter under which these positions take the fewest bits, of equal ones the smallest.
unsigned best_rice(const uint16_t* positions, size_t n, const Grid& grid) {
    uint64_t bits[kMostRice + 1] = {};
    each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        const bool nothing = get(positions) == kNothing;
        size_t next = 0;
        for (size_t i = 0; i < (nothing ? 1 : kept); ++i) {
            const size_t position = nothing ? chunk.size() : get(positions + i), gap = position - next;
            for (size_t rice = 0; rice <= kMostRice; ++rice) bits[rice] += (gap >> rice) + 1 + rice;
            next = position + 1;
        }
        positions += kept;
        return true;
    });
    unsigned best = 0;
    for (unsigned rice = 1; rice <= kMostRice; ++rice) best = bits[rice] < bits[best] ? rice : best;
    return best;
}

size_t encode_positions(const uint16_t* positions, uint8_t* codes, size_t room, size_t n, const Grid& grid) {
    BitWriter bits(codes, room);
    unsigned rice = 0;
    if (grid.k > kEnumerated) {
        rice = best_rice(positions, n, grid);
        bits.put(rice, 8);
    }
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

bool decode_positions(const uint8_t* codes, size_t size, uint16_t* positions, size_t n, const Grid& grid) {
    BitReader bits(codes, size);
    unsigned rice = 0;
    if (grid.k > kEnumerated) {
        if (!bits.has(8)) return false;
        rice = static_cast<unsigned>(bits.get(8));
        if (rice > kMostRice) return false;
    }
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
    k.combine_selected = combine_selected;
    k.encode_positions = encode_positions;
    k.decode_positions = decode_positions;
}

}  // namespace TW_TIER
}  // namespace tw
