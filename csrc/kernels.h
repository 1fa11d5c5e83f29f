// The kernel table: one function per kernel and element type, filled once per instruction set ("tier").
//
// Kernels are pure loops over memory that the caller owns. They contain no Python, allocate nothing, start no threads
// and check nothing: the caller (bindings.cpp) guarantees sizes and types. It does not guarantee contents: a decoder
// accepts any codes and any scales. Pointers need not be aligned. The arithmetic is defined by
// tensorwire/kernels/_numpy.py, bit for bit, under the default floating-point environment (round to nearest even,
// subnormals kept).
//
// n counts elements; block i is elements [i * blocksize, (i + 1) * blocksize), the last one may be shorter.
// `stream` asks for stores that bypass the caches: right for an output that will not stay in them anyway.
// `crc`, if not null, receives the CRC-32C of all bytes of `codes` or `out`. Only kernels that are bound by memory
// have it, where it costs little or nothing; for the others, a second reading of fresh codes costs no more.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tw {

enum Dtype { kFloat32, kFloat16, kBfloat16, kDtypes };
enum QuantType { kNf4, kFp4, kQuantTypes };

// Elements that share a mark, and bytes that are counted together.
constexpr size_t kPlaneBlock = 64;
// Widths of elements that have planes: 1, 2, 4 and 8 bytes.
constexpr int kPlaneWidths = 4;
// Sizes of codes of numbers: 1, 2, 4, 8 and 16 bits.
constexpr int kValueBits = 5;

// One byte of every element; or a single byte, if it is the same for all.
struct Plane {
    const uint8_t* bytes;
    bool constant;
};

// How a slice is cut into chunks, and how many elements of each are kept (tensorwire/kernels/_numpy_sparse.py).
struct Grid {
    size_t width, rows, cols, k;
};
// What is made of the sums of many messages: their signs, which then are those of signs; or they are divided, by what
// the messages weigh together that are present there, or by a number.
struct Combining {
    double divisor;
    bool present, signs;
};
constexpr size_t kMostChunk = 4096, kMostSide = 64, kMostRice = 12;
// Numbers in the tables of the DCT: the cosines of all lengths, then the secants of the even ones.
constexpr size_t kCosines = kMostSide * (kMostSide + 1) * (2 * kMostSide + 1) / 6;
constexpr size_t kDctTables = kCosines + kMostSide / 2 * (kMostSide / 2 + 1) / 2;

struct Kernels {
    const char* isa;

    // Takes the checksum of the preceding bytes, 0 at the beginning; returns that including `data`.
    uint32_t (*crc32c)(uint32_t checksum, const void* data, size_t size);

    // float32 to dtype; the number of finite values that overflowed. kFloat32 has no entry.
    uint64_t (*narrow[kDtypes])(const void* values, void* out, size_t n, bool saturate, bool stream, uint32_t* crc);
    // dtype to float32. kFloat32 has no entry.
    void (*widen[kDtypes])(const void* values, void* out, size_t n, bool stream);

    // Accumulating kernels add weight * value to `sums`, for the values that a decoder would have given.
    void (*accumulate[kDtypes])(const void* values, double* sums, size_t n, double weight);

    // The block statistic alone; like the quantizers, returns whether all values are finite.
    bool (*absmax[kDtypes])(const void* values, float* absmax, size_t n, size_t blocksize);

    // 4 bits: blocksize is even, so that blocks are whole bytes.
    bool (*quantize_4bit[kQuantTypes][kDtypes])(const void* values, uint8_t* codes, float* absmax, size_t n,
                                                size_t blocksize, bool stream);
    void (*dequantize_4bit[kQuantTypes][kDtypes])(const uint8_t* codes, const float* absmax, void* out, size_t n,
                                                  size_t blocksize, bool stream);
    void (*accumulate_4bit[kQuantTypes][kDtypes])(const uint8_t* codes, const float* absmax, double* sums, size_t n,
                                                  size_t blocksize, double weight);

    bool (*quantize_int8[kDtypes])(const void* values, uint8_t* codes, float* absmax, size_t n, size_t blocksize,
                                   bool stream);
    void (*dequantize_int8[kDtypes])(const uint8_t* codes, const float* absmax, void* out, size_t n, size_t blocksize,
                                     bool stream);
    void (*accumulate_int8[kDtypes])(const uint8_t* codes, const float* absmax, double* sums, size_t n,
                                     size_t blocksize, double weight);

    // `scales` are bfloat16 bit patterns. Decoding returns whether no code was -128.
    bool (*quantize_linear[kDtypes])(const void* values, int8_t* codes, uint16_t* scales, size_t n, size_t blocksize,
                                     bool stream, uint32_t* crc);
    bool (*dequantize_linear[kDtypes])(const int8_t* codes, const uint16_t* scales, void* out, size_t n,
                                       size_t blocksize, bool stream);
    bool (*accumulate_linear[kDtypes])(const int8_t* codes, const uint16_t* scales, double* sums, size_t n,
                                       size_t blocksize, double weight);

    // Sets bit i of `marks` if block i has a byte that is not 0, and clears the others up to the end of the byte.
    // Returns how many are set.
    size_t (*nonzero_blocks)(const uint8_t* data, size_t n, size_t blocksize, uint8_t* marks);
    // Counts how often each byte occurs in every `every`th block of 64.
    void (*byte_histogram)(const uint8_t* data, size_t n, size_t every, uint32_t* counts);
    // Bytes to Huffman codes; returns their size, or 0 for more than `room`. Decoding returns whether an encoder writes
    // such
    // codes.
    size_t (*huffman_encode)(const uint8_t* data, size_t n, uint8_t* out, size_t room);
    bool (*huffman_decode)(const uint8_t* codes, size_t size, uint8_t* out, size_t n);
    // The bytes of n elements to planes and back, for the blocks of 64 whose bit in `marks` is set.
    void (*split_planes[kPlaneWidths])(const uint8_t* values, const uint8_t* marks, uint8_t* const* planes, size_t n);
    void (*merge_planes[kPlaneWidths])(const Plane* planes, const uint8_t* marks, uint8_t* out, size_t n);

    // The k largest of each chunk of n elements, with `tables`, where not null, of their DCT. The largest magnitude of
    // all; where one is not finite or beyond 2^100, that, and the outputs hold anything.
    float (*select_largest)(const float* values, uint16_t* positions, float* coefficients, size_t n, const Grid& grid,
                            const float* tables);
    // The same of beta * kept + values, each rounded, which replaces what is kept.
    float (*decay_and_select[kDtypes])(float* kept, const void* values, uint16_t* positions, float* coefficients,
                                       size_t n, float beta, const Grid& grid, const float* tables);
    // Adds weight times what was selected to n sums; false, with part of them added, for a position outside its chunk.
    bool (*add_to_float)(const uint16_t* positions, const float* coefficients, float* sums, size_t n, double weight,
                         const Grid& grid, const float* tables);
    bool (*add_to_double)(const uint16_t* positions, const float* coefficients, double* sums, size_t n, double weight,
                          const Grid& grid, const float* tables);
    // What has been selected by so many messages, one behind the other, weighted and combined, to n elements; false for a
    // position outside its chunk.
    bool (*combine_selected)(const uint16_t* positions, const float* values, const double* weights, size_t messages,
                             size_t kept_of_each, float* out, size_t n, const Combining& how, const Grid& grid,
                             const float* tables);
    // Positions to codes: the bytes that they take, or 0 for more than `room`. Back: whether an encoder writes such codes.
    size_t (*encode_positions)(const uint16_t* positions, uint8_t* codes, size_t room, size_t n, const Grid& grid);
    bool (*decode_positions)(const uint8_t* codes, size_t size, uint16_t* positions, size_t n, const Grid& grid);
    // The largest magnitude of n numbers; all of them in units of 2^-32 of it, each rounded, together; how many are not 0.
    void (*sum_magnitudes)(const float* values, size_t n, float* largest, uint64_t* sum, uint64_t* count);
    // Numbers to codes of 1, 2, 4, 8 or 16 bits and back, whether nothing stands behind the last one. Number i has the step
    // i * `every`.
    void (*pack_values[kValueBits])(const float* values, const float* steps, size_t every, uint8_t* codes, size_t n);
    bool (*unpack_values[kValueBits])(const uint8_t* codes, const float* steps, size_t every, float* values, size_t n);
    // kept = beta * kept + values, which are finite; the largest magnitude of what is kept then.
    float (*decay_and_add[kDtypes])(float* kept, const void* values, size_t n, float beta);
    // Updates the root mean square of each of n values, and divides it by `scale` times that, plus eps.
    void (*divide_by_rms)(const float* values, float* roots, float* out, size_t n, double beta, double scale,
                          double eps);
    // The differences of n numbers to those of a base, as zig-zag, turned as planes turn back; and added again.
    void (*difference[kPlaneWidths])(const uint8_t* base, const uint8_t* values, uint8_t* out, size_t n);
    void (*add_difference[kPlaneWidths])(const uint8_t* differences, uint8_t* values, size_t n);
    // What changed of n floats: how many (`differ`), and the bytes it takes, or 0 for more than `room`, none, or over half
    // of them. Back, in place: how many changed, or 0 where no encoder writes such codes about these values. `work` has
    // 2 n elements, and n is below 2^32. kFloat32 has no entry.
    size_t (*encode_changes[kDtypes])(const uint8_t* base, const uint8_t* values, size_t n, uint32_t* work,
                                      uint8_t* codes, size_t room, size_t* differ);
    size_t (*decode_changes[kDtypes])(const uint8_t* codes, size_t size, uint8_t* values, size_t n, uint32_t* work);
};

// Each family file is compiled once per tier, with TW_TIER naming it, and adds its entries to that tier's table.
#define TW_DECLARE_TIER(tier)                                          \
    namespace tier {                                                   \
    void add_crc32c(Kernels&);                                         \
    void add_cast(Kernels&);                                           \
    void add_absmax(Kernels&);                                         \
    void add_fourbit(Kernels&);                                        \
    void add_int8(Kernels&);                                           \
    void add_linear(Kernels&);                                         \
    void add_planes(Kernels&);                                         \
    void add_huffman(Kernels&);                                        \
    void add_sparse(Kernels&);                                         \
    void add_values(Kernels&);                                         \
    void add_changes(Kernels&);                                        \
    uint32_t crc32c(uint32_t checksum, const void* data, size_t size); \
    }

TW_DECLARE_TIER(portable)
TW_DECLARE_TIER(avx2)
TW_DECLARE_TIER(avx512)
TW_DECLARE_TIER(neon)

}  // namespace tw
