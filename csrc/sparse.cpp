// The sparse codec: the largest elements of chunks, or of their two-dimensional DCT; and codes of their positions.
//
// What is calculated, and in which order, is said in tensorwire/kernels/_numpy_sparse.py. Matrices are worked on in
// rows of 64 columns, with zeros behind narrower ones.
#include "bits.h"
#include "dct.h"
#include "decay.h"

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

// A chunk as strips of kWide columns, a vector for each row. (In Forward, also of kWide rows, a vector for each column.) One
// vector more than needed keeps equal rows of different strips out of the same cache set.
struct Strips {
    Wide at[kMostSide / kWide][kMostSide + 1];
};

constexpr size_t strips_of(size_t n) { return (n + kWide - 1) / kWide; }

// The factors that make the transform orthonormal. They differ only in the first row and the first column.
class Factors {
public:
    void prepare(size_t height, size_t width) {
        if (height == height_ && width == width_) return;
        height_ = height;
        width_ = width;
        for (size_t u = 0; u < 2; ++u) {
            for (size_t v = 0; v < 2; ++v) at_[u][v] = of(u, v);
            for (size_t x = 0; x < kWide; ++x) first_[u][x] = at_[u][x > 0];
        }
    }
    float at(size_t u, size_t v) const { return at_[u > 0][v > 0]; }
    // For kWide columns from `v` on, a multiple of kWide.
    Wide across(size_t u, size_t v) const { return v ? wide_of(at_[u > 0][1]) : load_wide(first_[u > 0]); }

private:
    float of(size_t u, size_t v) const {
        const double area = static_cast<double>(height_) * static_cast<double>(width_);
        return static_cast<float>(sqrt(static_cast<double>((1 + u) * (1 + v)) / area));
    }

    size_t height_ = 0, width_ = 0;
    float at_[2][2];
    float first_[2][kWide];
};

// Computes the coefficients of a chunk.
class Forward {
public:
    explicit Forward(const float* tables) : dct_(tables) {}

    // `coefficients`: row by row, without gaps.
    void operator()(const Chunk& chunk, const float* from, float* coefficients) {
        const size_t height = chunk.height, width = chunk.width;
        for (size_t i = 0; i < height; ++i) {
            const float* row = from + i * chunk.stride;
            for (size_t s = 0; s < strips_of(width); ++s) {
                prefetch<kL2>(row + s * kWide, kMostSide * sizeof(float));  // of the chunk to the right
                columns_.at[s][i] = load_wide(row + s * kWide, width - s * kWide);
            }
        }
        for (size_t s = 0; s < strips_of(width); ++s) dct_.forward(columns_.at[s], height, spare_);
        for (size_t s = 0; s < strips_of(height); ++s) {
            Wide* strip = rows_.at[s];
            for (size_t block = 0; block < strips_of(width); ++block) {
                Wide square[kWide];
                for (size_t i = 0; i < kWide; ++i) square[i] = columns_.at[block][s * kWide + i];
                transpose(square);
                for (size_t i = 0; i < kWide; ++i) strip[block * kWide + i] = square[i];
            }
            dct_.forward(strip, width, spare_);
            write(chunk, strip, s * kWide, coefficients);
        }
    }

private:
    // Writes kWide rows of coefficients, from row `first` on.
    void write(const Chunk& chunk, const Wide* strip, size_t first, float* coefficients) {
        factors_.prepare(chunk.height, chunk.width);
        const size_t rows = min_of(kWide, chunk.height - first);
        for (size_t col = 0; col < chunk.width; col += kWide) {
            Wide square[kWide];
            for (size_t i = 0; i < kWide; ++i) square[i] = strip[col + i];
            transpose(square);
            for (size_t i = 0; i < rows; ++i) {
                float* to = coefficients + (first + i) * chunk.width + col;
                store_wide(to, mul(square[i], factors_.across(first + i, col)), chunk.width - col);
            }
        }
    }

    Dct dct_;
    Factors factors_;
    Strips columns_{}, rows_{};
    Wide spare_[kMostSide];
};

// ---- selection ---------------------------------------------------------------------------------------------------

constexpr size_t kGroup = 16;  // magnitudes that have one largest
constexpr size_t kGroups = kMostChunk / kGroup;
constexpr float kLargestTaken = 0x1p100f;
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

// Calls `visit` with the place of each number that is at least `low`. `n`: a multiple of 16.
template <class Visit>
void each_reaching(const int32_t* x, size_t n, int32_t low, Visit visit) {
    for (size_t i = 0; i < n; i += 16) {
        uint32_t found = 0;
        for (size_t lane = 0; lane < 16; lane += kLanes) found |= reaching(x + i + lane, low) << lane;
        for (; found; found &= found - 1) visit(i + lowest_bit(found));
    }
}

// The k elements of a chunk of the largest magnitude, of equal ones those at lower positions.
class Selection {
public:
    // `row(i)`: where the elements of a row stand. Writes k positions, ascending.
    template <class Row>
    void operator()(const Chunk& chunk, Row row, size_t k, uint16_t* positions) {
        load_magnitudes(chunk, row);
        const int32_t low = kth_largest(largest_, kGroups, k, k + k / 4);
        size_t found = 0;  // that may be among them: at least k
        each_reaching(largest_, kGroups, low, [&](size_t group) {
            const int32_t* magnitudes = magnitudes_ + group * kGroup;
            each_reaching(magnitudes, kGroup, low, [&](size_t i) {
                values_[found] = magnitudes[i];
                places_[found++] = static_cast<uint16_t>(group * kGroup + i);
            });
        });
        const int32_t kth = kth_largest(values_, found, k, k);
        size_t above = 0;
        for (size_t i = 0; i < found; ++i) above += values_[i] > kth;
        size_t equal = k - above, taken = 0;  // of those at the threshold, and of all
        for (size_t i = 0; i < found; ++i) {
            const bool at_threshold = values_[i] == kth && equal > 0;
            chosen_[taken] = places_[i];
            taken += values_[i] > kth || at_threshold;
            equal -= at_threshold;
        }
        memcpy(positions, chosen_, k * sizeof *chosen_);
    }

private:
    template <class Row>
    void load_magnitudes(const Chunk& chunk, Row row) {
        const size_t groups = (chunk.size() + kGroup - 1) / kGroup;
        int32_t* to = magnitudes_;
        for (size_t i = 0; i < chunk.height; ++i, to += chunk.width) {
            const float* from = row(i);
            for (size_t x = 0; x < chunk.width; ++x) to[x] = static_cast<int32_t>(bits_of(get(from + x)) & ~kSignBit);
        }
        // What stands behind is equal at best, and comes last.
        for (size_t i = chunk.size(); i < groups * kGroup; ++i) magnitudes_[i] = 0;
        for (size_t group = 0; group < groups; ++group) largest_[group] = largest_of(magnitudes_ + group * kGroup);
        for (size_t group = groups; group < kGroups; ++group) largest_[group] = -1;
    }

    alignas(64) int32_t magnitudes_[kMostChunk];
    alignas(64) int32_t largest_[kGroups];
    alignas(64) int32_t values_[kMostChunk + 1];
    uint16_t places_[kMostChunk + 1], chosen_[kMostChunk + 1];
};

float largest_of(const float* x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) largest = max_of(largest, bits_of(get(x + i)) & ~kSignBit);
    return float_of(largest);
}

// `prepare(start, n)` makes a row of a chunk ready and returns its largest magnitude.
template <class Prepare>
float select_each(const float* values, uint16_t* positions, float* coefficients, size_t n, const Grid& grid,
                  const float* tables, Prepare prepare) {
    Forward forward(tables);
    Selection select;
    alignas(64) float made[kMostChunk];
    float largest = 0;
    each_chunk(grid, n, [&](const Chunk& chunk) {
        const float* from = values + chunk.start;
        for (size_t i = 0; i < chunk.height; ++i) {
            const float here = prepare(chunk.start + i * chunk.stride, chunk.width);
            if (!(here <= largest)) largest = here;
        }
        if (!(largest <= kLargestTaken)) return false;
        if (tables) forward(chunk, from, made);
        const auto row = [&](size_t i) { return tables ? made + i * chunk.width : from + i * chunk.stride; };
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
    return largest;
}

float select_largest(const float* values, uint16_t* positions, float* coefficients, size_t n, const Grid& grid,
                     const float* tables) {
    return select_each(values, positions, coefficients, n, grid, tables,
                       [&](size_t start, size_t count) { return largest_of(values + start, count); });
}

template <class T>
float decay_and_select(float* kept, const void* values, uint16_t* positions, float* coefficients, size_t n, float beta,
                       const Grid& grid, const float* tables) {
    const T* x = static_cast<const T*>(values);
    return select_each(kept, positions, coefficients, n, grid, tables, [&](size_t start, size_t count) {
        return decay_and_add<T>(kept + start, x + start, count, beta);
    });
}

// ---- adding ------------------------------------------------------------------------------------------------------

template <class Sum>
void add_row(Sum* sums, const float* elements, size_t n, Sum weight) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add_weighted(sums + i, load(elements + i), weight);
    for (; i < n; ++i) put(sums + i, get(sums + i) + weight * static_cast<Sum>(elements[i]));
}

// Computes the elements of a chunk from the few coefficients that were selected.
class Inverse {
public:
    explicit Inverse(const float* tables) : dct_(tables) {}

    // False: a position is not in the chunk.
    bool operator()(const Chunk& chunk, const uint16_t* positions, const float* coefficients, size_t kept,
                    Matrix& out) {
        const size_t height = chunk.height, width = chunk.width;
        factors_.prepare(height, width);
        prepare(width);
        for (size_t s = 0; s < strips_of(width); ++s) memset(strips_.at[s], 0, height * sizeof(Wide));
        for (size_t i = 0; i < kept; ++i) {
            const size_t position = get(positions + i);
            if (position == kNothing) continue;
            if (position >= chunk.size()) return false;
            const size_t u = position / width, v = position % width;
            const Wide coefficient = wide_of(get(coefficients + i) * factors_.at(u, v));
            for (size_t s = 0; s < strips_of(width); ++s) {
                Wide& sum = strips_.at[s][u];
                sum = add(sum, mul(coefficient, load_wide(across_.at[v] + s * kWide)));
            }
        }
        for (size_t s = 0; s < strips_of(width); ++s) {
            dct_.inverse(strips_.at[s], height, spare_);
            for (size_t i = 0; i < height; ++i) store_wide(out.at[i] + s * kWide, strips_.at[s][i], kWide);
        }
        return true;
    }

private:
    // Copies the cosines of one length, with zeros behind each row.
    void prepare(size_t width) {
        if (width == width_) return;
        memset(&across_, 0, sizeof across_);
        for (size_t v = 0; v < width; ++v) {
            memcpy(across_.at[v], dct_.cosines(width) + v * width, width * sizeof(float));
        }
        width_ = width;
    }

    Dct dct_;
    Factors factors_;
    size_t width_ = 0;
    Matrix across_;
    Strips strips_;
    Wide spare_[kMostSide];
};

template <class Sum>
bool add_selected(const uint16_t* positions, const float* coefficients, Sum* sums, size_t n, double weight,
                  const Grid& grid, const float* tables) {
    const Sum factor = static_cast<Sum>(weight);
    Inverse inverse(tables);
    Matrix elements;
    return each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        Sum* to = sums + chunk.start;
        if (tables) {
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
            for (uint64_t left = marks_[word]; left; left &= left - 1) {
                const size_t position = 64 * word + lowest_bit(left);
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
                      const float* tables) {
    Sums sums;
    Inverse inverse(tables);
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
        if (tables) inverse(chunk, places, made, taken, elements);
        for (size_t i = 0; i < chunk.height; ++i) {
            for (size_t x = 0; x < chunk.width; ++x)
                put(to + i * chunk.stride + x, tables ? 0.0f + elements.at[i][x] : 0.0f);
        }
        for (size_t i = 0; i < taken && !tables; ++i) {
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

void put_rice(BitWriter& bits, size_t number, unsigned rice) {
    const uint64_t high = number >> rice, low = number & ((uint64_t{1} << rice) - 1);
    if (high < 32) {
        bits.put((low << 1 | 1) << high, static_cast<unsigned>(high) + 1 + rice);
    } else {
        bits.put_unary(high);
        bits.put(low, rice);
    }
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
            put_rice(bits, chunk.size(), rice);
        } else {
            size_t next = 0;
            for (size_t i = 0; i < kept; ++i) {
                const size_t gap = get(positions + i) - next;
                put_rice(bits, gap, rice);
                next += gap + 1;
            }
        }
        positions += kept;
        return true;
    });
    return bits.finish();
}

void nothing_of(uint16_t* positions, size_t kept) {
    for (size_t i = 0; i < kept; ++i) put(positions + i, kNothing);
}

// Reads the positions of a chunk as one number. False: no positions have this number.
bool take_number(BitReader& bits, uint16_t* positions, size_t kept, size_t size) {
    const unsigned length = enumerated_bits(size, kept), low = length < 32 ? length : 32;
    uint64_t number = bits.take(low);
    number |= bits.take(length - low) << low % 64;
    const uint64_t all = combinations(size, kept);
    if (!bits.good() || number > all) return false;
    if (number == all) nothing_of(positions, kept);
    for (size_t i = number < all ? kept : 0; i > 0; --i) {
        const size_t place = place_of(number, i, size);
        number -= combinations(place, i);
        put(positions + i - 1, static_cast<uint16_t>(place));
    }
    return true;
}

// Reads them as gaps. Works on a copy of the reader, which the compiler keeps in registers.
bool take_gaps(BitReader& bits, uint16_t* positions, size_t kept, size_t size, unsigned rice) {
    BitReader in = bits;
    size_t next = 0;
    for (size_t i = 0; i < kept; ++i) {
        const size_t gap = in.take_rice(rice);
        if (!in.good() || gap > size - next) return false;
        next += gap;
        if (next == size) {
            if (i) return false;
            nothing_of(positions, kept);
            break;
        }
        put(positions + i, static_cast<uint16_t>(next++));
    }
    bits = in;
    return true;
}

bool decode_positions(const uint8_t* codes, size_t size, uint16_t* positions, size_t n, const Grid& grid) {
    BitReader bits(codes, size);
    const bool enumerated = grid.k <= kEnumerated;
    const unsigned rice = enumerated ? 0 : static_cast<unsigned>(bits.take(8));
    if (rice > kMostRice) return false;
    const bool good = each_chunk(grid, n, [&](const Chunk& chunk) {
        const size_t kept = min_of(grid.k, chunk.size());
        const bool taken = enumerated ? take_number(bits, positions, kept, chunk.size())
                                      : take_gaps(bits, positions, kept, chunk.size(), rice);
        positions += kept;
        return taken;
    });
    return good && bits.finished();
}

}  // namespace

void add_sparse(Kernels& k) {
    k.select_largest = select_largest;
    k.decay_and_select[kFloat32] = decay_and_select<float>;
    k.decay_and_select[kFloat16] = decay_and_select<Float16>;
    k.decay_and_select[kBfloat16] = decay_and_select<Bfloat16>;
    k.add_to_float = add_selected<float>;
    k.add_to_double = add_selected<double>;
    k.combine_selected = combine_selected;
    k.encode_positions = encode_positions;
    k.decode_positions = decode_positions;
}

}  // namespace TW_TIER
}  // namespace tw
