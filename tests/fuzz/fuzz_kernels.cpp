// libFuzzer over the kernel table, without Python: any codes, scales and values, any length, block size and address that
// the bindings let through. Buffers are exactly as long as the kernels are promised, each an allocation of its own, so that
// AddressSanitizer sees the first byte too far; and every instruction set must give the bits of the portable one.
//
//     cmake -S csrc -B build/fuzz -DTENSORWIRE_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++ && cmake --build build/fuzz
//     build/fuzz/fuzz_kernels -max_total_time=60
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/dispatch.h"

namespace {

// What the fuzzer gave, taken from the front; zeros when there is no more.
class Input {
public:
    Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

    template <class T>
    T take() {
        T value{};
        const size_t size = left_ < sizeof(T) ? left_ : sizeof(T);
        memcpy(&value, data_, size);
        skip(size);
        return value;
    }

    // `size` bytes: the rest of the input again and again, so that a short input can describe a long array.
    void fill(uint8_t* out, size_t size) const {
        if (left_ == 0) {
            memset(out, 0, size);
            return;
        }
        for (size_t i = 0; i < size; ++i) out[i] = data_[i % left_];
    }

    size_t left() const { return left_; }

    void skip(size_t size) {
        size = size < left_ ? size : left_;
        data_ += size;
        left_ -= size;
    }

private:
    const uint8_t* data_;
    size_t left_;
};

// Bytes of exactly this size, at `shift` bytes after an aligned address.
class Buffer {
public:
    Buffer(size_t size, size_t shift) : memory_(new uint8_t[size + shift]), data_(memory_.get() + shift), size_(size) {}
    uint8_t* data() { return data_; }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(data_);
    }
    size_t size() const { return size_; }

private:
    std::unique_ptr<uint8_t[]> memory_;
    uint8_t* data_;
    size_t size_;
};

constexpr int kFirstOfPlanes = 11, kFirstOfSparse = 17, kFirstOfChanges = 19, kKernels = 22;

size_t size_of(int dtype) { return dtype == tw::kFloat32 ? 4 : 2; }

// What one tier made of the input: all outputs, and what it returned.
struct Result {
    std::vector<uint8_t> bytes;
    std::vector<double> sums;
    uint64_t returned = 0;
    bool keep = true;  // a quantizer that says "not finite" leaves outputs that nobody may look at
};

void keep(Result& result, Buffer& buffer) {
    result.bytes.insert(result.bytes.end(), buffer.data(), buffer.data() + buffer.size());
}

// Sums of n values and something else, at `shift` bytes after an aligned address.
template <class Add>
void accumulate(Result& result, size_t n, size_t shift, Add add) {
    Buffer sums(n * sizeof(double), shift);
    for (size_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(i) / 7;
        memcpy(sums.data() + i * sizeof value, &value, sizeof value);
    }
    add(sums.as<double>(), 0.3);
    result.sums.resize(n);
    if (n) memcpy(result.sums.data(), sums.data(), sums.size());
}

// The checksum taken along the way, which must be that of the output read again.
void keep_checksum(Result& result, const tw::Kernels& k, const uint32_t* crc, Buffer& out) {
    if (!crc) return;
    if (*crc != k.crc32c(0, out.data(), out.size())) abort();
    result.bytes.insert(result.bytes.end(), reinterpret_cast<const uint8_t*>(crc),
                        reinterpret_cast<const uint8_t*>(crc + 1));
}

size_t blocks_of(size_t n, size_t size) { return n / size + (n % size != 0); }

// Marks of the blocks of n elements, any of them; how many elements are in those that are marked.
size_t fill_marks(Input& in, Buffer& marks, size_t n) {
    in.fill(marks.data(), marks.size());
    size_t standing = 0;
    for (size_t i = 0; i < 8 * marks.size(); ++i) {
        const size_t begin = i * tw::kPlaneBlock, end = begin + tw::kPlaneBlock;
        uint8_t& bits = marks.data()[i / 8];
        if (begin >= n) bits &= static_cast<uint8_t>(~(1u << i % 8));
        if (bits >> i % 8 & 1) standing += (end < n ? end : n) - begin;
    }
    return standing;
}

// Elements to planes and back.
void split_and_merge(Result& result, const tw::Kernels& k, Input& in, size_t n, size_t shift, int log_width) {
    const size_t width = size_t{1} << log_width;
    Buffer values(n * width, shift), marks(blocks_of(blocks_of(n, tw::kPlaneBlock), 8), 0),
        merged(n * width, shift / 2);
    const size_t standing = fill_marks(in, marks, n);
    in.fill(values.data(), values.size());
    std::vector<Buffer> planes;
    uint8_t* to[8];
    for (size_t p = 0; p < width; ++p) {
        planes.emplace_back(standing, (shift + p) % 64);
        to[p] = planes[p].data();
    }
    k.split_planes[log_width](values.data(), marks.data(), to, n);
    tw::Plane from[8];
    for (size_t p = 0; p < width; ++p) from[p] = {to[p], false};
    k.merge_planes[log_width](from, marks.data(), merged.data(), n);
    for (size_t i = 0; i < n; ++i) {
        const size_t block = i / tw::kPlaneBlock;
        const bool stands = marks.data()[block / 8] >> block % 8 & 1;
        for (size_t at = i * width; at < (i + 1) * width; ++at) {
            if (merged.data()[at] != (stands ? values.data()[at] : 0)) abort();
        }
    }
    for (Buffer& plane : planes) keep(result, plane);
}

// Any planes, some of them constant, to elements.
void merge(Result& result, const tw::Kernels& k, Input& in, size_t n, size_t shift, int log_width) {
    const size_t width = size_t{1} << log_width;
    Buffer marks(blocks_of(blocks_of(n, tw::kPlaneBlock), 8), 0), merged(n * width, shift);
    const size_t standing = fill_marks(in, marks, n);
    const uint8_t constant = in.take<uint8_t>();
    std::vector<Buffer> planes;
    tw::Plane from[8];
    for (size_t p = 0; p < width; ++p) {
        const bool one = constant >> p & 1;
        planes.emplace_back(one ? 1 : standing, (shift + p) % 64);
        in.fill(planes[p].data(), planes[p].size());
        from[p] = {planes[p].data(), one};
    }
    k.merge_planes[log_width](from, marks.data(), merged.data(), n);
    keep(result, merged);
}

// Bytes to codes, in room that may be too small, and back; or back with `damage`, which may do anything but harm.
void huffman(Result& result, const tw::Kernels& k, Input& in, size_t n, size_t shift, bool damage) {
    const uint8_t kept = in.take<uint8_t>();  // bits of the bytes: few different ones are what codes are for
    const size_t room = damage || !(shift & 2) ? 2 * n + 1000 : in.take<uint16_t>();
    Buffer values(n, shift), out(room, shift / 2);
    in.fill(values.data(), n);
    if (shift & 8) {
        for (size_t i = 0; i < n; ++i) values.data()[i] &= kept;
    }
    const size_t size = k.huffman_encode(values.data(), n, out.data(), room);
    result.returned = size;
    if (size > room || (n && !size)) return;
    Buffer codes(size, shift), decoded(n, shift);
    memcpy(codes.data(), out.data(), size);
    for (int i = 0; damage && size && i < 3; ++i) {
        const size_t at = in.take<uint16_t>() % (shift & 1 ? size : size < 40 ? size : 40);
        codes.data()[at] = in.take<uint8_t>();
    }
    result.keep = k.huffman_decode(codes.data(), size, decoded.data(), n);
    if (!damage && (!result.keep || memcmp(decoded.data(), values.data(), n) != 0)) abort();
    keep(result, codes);
    keep(result, decoded);
}

Result run_planes(const tw::Kernels& k, int kernel, Input in) {
    const int log_width = in.take<uint8_t>() % tw::kPlaneWidths;
    const size_t shift = in.take<uint8_t>() % 64, times = in.take<uint8_t>() % 16 ? 1 : 32;  // several segments
    const size_t n = in.take<uint16_t>() % 9000 * times;
    Result result;
    if (kernel == kFirstOfPlanes) {
        const size_t blocksize = size_t{1} + in.take<uint16_t>() % 1024;
        Buffer values(n, shift), marks(blocks_of(blocks_of(n, blocksize), 8), shift);
        in.fill(values.data(), n);
        result.returned = k.nonzero_blocks(values.data(), n, blocksize, marks.data());
        keep(result, marks);
    } else if (kernel == kFirstOfPlanes + 1) {
        const size_t every = size_t{1} + in.take<uint8_t>();
        Buffer values(n, shift), counts(256 * sizeof(uint32_t), 0);
        in.fill(values.data(), n);
        k.byte_histogram(values.data(), n, every, counts.as<uint32_t>());
        keep(result, counts);
    } else if (kernel == kFirstOfPlanes + 2) {
        split_and_merge(result, k, in, n, shift, log_width);
    } else if (kernel == kFirstOfPlanes + 3) {
        merge(result, k, in, n, shift, log_width);
    } else {
        huffman(result, k, in, n, shift, kernel == kFirstOfPlanes + 5);
    }
    return result;
}

// Sparse slices: positions out of any codes, added; and of any values, selected and coded.
Result run_sparse(const tw::Kernels& k, Input in, bool decodes) {
    const bool transformed = in.take<uint8_t>() & 1, few = in.take<uint8_t>() & 1;
    tw::Grid grid{};
    grid.rows = 1 + in.take<uint8_t>() % 64;
    grid.cols = 1 + in.take<uint16_t>() % (transformed ? 64 : 4096 / grid.rows);
    grid.width = grid.cols + in.take<uint16_t>() % 300;
    grid.k = 1 + in.take<uint16_t>() % (few ? 6 : 4096);
    const size_t n = in.take<uint16_t>() % 9000, size = in.take<uint16_t>() % 2000, shift = in.take<uint8_t>() % 16 * 4;
    const auto band = [&](size_t height, size_t across) {
        const auto kept = [&](size_t elements) { return elements < grid.k ? elements : grid.k; };
        return across / grid.cols * kept(height * grid.cols) + kept(height * (across % grid.cols));
    };
    const size_t rows = n / grid.width;
    const size_t kept =
        rows / grid.rows * band(grid.rows, grid.width) + band(rows % grid.rows, grid.width) + band(1, n % grid.width);
    std::vector<float> tables(tw::kDctTables);
    for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<float>(i % 7) - 3.0f;
    const float* const b = transformed ? tables.data() : nullptr;
    Buffer positions(kept * 2, shift), coefficients(kept * 4, shift), codes(decodes ? size : 8 * kept + 64, shift + 1);
    Result result;
    in.fill(coefficients.data(), coefficients.size());
    if (decodes) {
        in.fill(codes.data(), codes.size());
        result.keep = k.decode_positions(codes.data(), codes.size(), positions.as<uint16_t>(), n, grid);
        for (size_t i = 0; i < kept; ++i) coefficients.as<float>()[i] = static_cast<float>(i % 5);
    } else {
        Buffer values(n * 4, shift);
        in.fill(values.data(), values.size());
        result.keep =
            k.select_largest(values.as<float>(), positions.as<uint16_t>(), coefficients.as<float>(), n, grid, b);
        if (result.keep) {
            result.returned = k.encode_positions(positions.as<uint16_t>(), codes.data(), codes.size(), n, grid);
            result.bytes.assign(codes.data(), codes.data() + result.returned);
        }
    }
    if (!result.keep) return result;
    keep(result, positions);
    accumulate(result, n, shift, [&](double* sums, double weight) {
        if (!k.add_to_double(positions.as<uint16_t>(), coefficients.as<float>(), sums, n, weight, grid, b)) abort();
    });
    Buffer weights(8, shift), out(n * 4, shift);
    const double weight = 0.75;
    memcpy(weights.data(), &weight, sizeof weight);
    const tw::Combining how{1.5, kept % 3 == 1, kept % 3 == 2};
    if (!k.combine_selected(positions.as<uint16_t>(), coefficients.as<float>(), weights.as<double>(), 1, kept,
                            out.as<float>(), n, how, grid, b))
        abort();
    keep(result, out);
    const size_t bits = n % tw::kValueBits;
    Buffer step(4, shift), packed((kept * (size_t{1} << bits) + 7) / 8, shift + 1), back(kept * 4, shift);
    in.fill(step.data(), step.size());
    k.pack_values[bits](coefficients.as<float>(), step.as<float>(), 0, packed.data(), kept);
    if (!k.unpack_values[bits](packed.data(), step.as<float>(), 0, back.as<float>(), kept)) abort();
    keep(result, packed);
    return result;
}

// Differences to a base, and added to it again.
void difference(Result& result, const tw::Kernels& k, Input& in, size_t n, size_t shift, int log_width) {
    const size_t size = n << log_width;
    Buffer base(size, shift), values(size, shift / 2), differences(size, shift / 4);
    in.fill(base.data(), size);
    in.skip(1);
    in.fill(values.data(), size);
    k.difference[log_width](base.data(), values.data(), differences.data(), n);
    keep(result, differences);
    k.add_difference[log_width](differences.data(), base.data(), n);
    if (memcmp(base.data(), values.data(), size) != 0) abort();
}

// Floats whose changes are told one by one, in room that may be too small, and made again; or made with `damage` done to
// the codes or to the base, which may do anything but harm.
void changes(Result& result, const tw::Kernels& k, Input& in, size_t n, size_t shift, bool damage) {
    const int dtype = shift & 1 ? tw::kFloat16 : tw::kBfloat16;
    const size_t aligned = shift & ~size_t{3}, every = 1 + in.take<uint8_t>();
    const uint16_t most = in.take<uint16_t>();
    const size_t room = damage || shift & 2 ? 4 * n + 100 : in.take<uint16_t>();
    Buffer base(2 * n, aligned), values(2 * n, aligned), codes(room, shift), work(8 * n, aligned);
    in.fill(base.data(), 2 * n);
    memcpy(values.data(), base.data(), 2 * n);
    size_t differ = 0;
    for (size_t i = 0; i < n; i += 1 + (in.left() ? in.take<uint8_t>() : i) % every) {
        const auto by = static_cast<uint16_t>(i % (most + size_t{1}) - most / 2);
        values.as<uint16_t>()[i] = static_cast<uint16_t>(values.as<uint16_t>()[i] + by);
        differ += by != 0;
    }
    size_t told = 0;
    const size_t size =
        k.encode_changes[dtype](base.data(), values.data(), n, work.as<uint32_t>(), codes.data(), room, &told);
    if (told != differ || size > room) abort();
    result.returned = size;
    if (size == 0) return;
    Buffer exact(size, shift / 2);
    memcpy(exact.data(), codes.data(), size);
    for (int i = 0; damage && i < 3; ++i) {
        const size_t at = in.take<uint16_t>();
        (i ? exact : base).data()[at % (i ? size : 2 * n)] ^= in.take<uint8_t>();
    }
    const size_t made = k.decode_changes[dtype](exact.data(), size, base.data(), n, work.as<uint32_t>());
    if (!damage && (made != differ || memcmp(base.data(), values.data(), 2 * n) != 0)) abort();
    result.keep = made != 0;
    keep(result, exact);
    keep(result, base);
}

Result run_changes(const tw::Kernels& k, int kernel, Input in) {
    const size_t shift = in.take<uint8_t>() % 64, n = in.take<uint16_t>() % 9000;
    Result result;
    if (kernel == kFirstOfChanges) {
        difference(result, k, in, n, shift, in.take<uint8_t>() % tw::kPlaneWidths);
    } else {
        changes(result, k, in, n, shift, kernel == kFirstOfChanges + 2);
    }
    return result;
}

Result run(const tw::Kernels& k, Input in) {
    const int kernel = in.take<uint8_t>() % kKernels;
    if (kernel >= kFirstOfChanges) return run_changes(k, kernel, in);
    if (kernel >= kFirstOfSparse) return run_sparse(k, in, kernel == kFirstOfSparse);
    if (kernel >= kFirstOfPlanes) return run_planes(k, kernel, in);
    const int dtype = in.take<uint8_t>() % tw::kDtypes;
    const int type = in.take<uint8_t>() % tw::kQuantTypes;
    const bool stream = in.take<uint8_t>() & 1;
    const size_t n = in.take<uint16_t>() % 9000;
    // Elements are at their natural alignment, as NumPy's; bytes may stand anywhere.
    const size_t shift = in.take<uint8_t>() % 64;
    const uint16_t wanted = in.take<uint16_t>();
    const bool four_bit = kernel == 3 || kernel == 4;
    size_t blocksize = four_bit ? 2 + wanted % 2048 * 2 : 1 + wanted;
    if (shift & 1) blocksize = size_t{32} << wanted % 8;
    if (four_bit && blocksize > 4096) blocksize = 4096;
    const size_t blocks = n / blocksize + (n % blocksize != 0), nibbles = n / 2 + n % 2;
    const size_t aligned = shift & ~size_t{3}, width = size_of(dtype);
    Result result;
    uint32_t checksum = 0;
    uint32_t* const crc = shift & 4 ? &checksum : nullptr;

    if (kernel == 0) {
        Buffer data(n, shift);
        in.fill(data.data(), n);
        result.returned = k.crc32c(in.take<uint32_t>(), data.data(), n);
        return result;
    }
    if (kernel == 1 || kernel == 2) {  // narrow, widen
        if (dtype == tw::kFloat32) return result;
        const bool narrows = kernel == 1;
        Buffer values(n * (narrows ? 4 : 2), aligned), out(n * (narrows ? 2 : 4), aligned);
        in.fill(values.data(), values.size());
        if (narrows) {
            result.returned = k.narrow[dtype](values.data(), out.data(), n, shift & 2, stream, crc);
        } else {
            k.widen[dtype](values.data(), out.data(), n, stream);
        }
        keep(result, out);
        if (narrows) keep_checksum(result, k, crc, out);
        return result;
    }
    if (kernel == 10) {
        Buffer values(n * width, aligned);
        in.fill(values.data(), values.size());
        accumulate(result, n, shift,
                   [&](double* sums, double weight) { k.accumulate[dtype](values.data(), sums, n, weight); });
        return result;
    }
    if (kernel == 9) {
        Buffer values(n * width, aligned), absmax(blocks * 4, aligned);
        in.fill(values.data(), values.size());
        result.keep = k.absmax[dtype](values.data(), absmax.as<float>(), n, blocksize);
        keep(result, absmax);
        return result;
    }
    const bool quantizes = kernel % 2;  // 3, 5, 7
    const bool linear = kernel == 7 || kernel == 8;
    Buffer values(n * width, aligned), codes(four_bit ? nibbles : n, shift), scales(blocks * (linear ? 2 : 4), aligned);
    if (quantizes) {
        in.fill(values.data(), values.size());
        if (four_bit) {
            result.keep =
                k.quantize_4bit[type][dtype](values.data(), codes.data(), scales.as<float>(), n, blocksize, stream);
        } else if (linear) {
            result.keep = k.quantize_linear[dtype](values.data(), codes.as<int8_t>(), scales.as<uint16_t>(), n,
                                                   blocksize, stream, crc);
        } else {
            result.keep = k.quantize_int8[dtype](values.data(), codes.data(), scales.as<float>(), n, blocksize, stream);
        }
        keep(result, codes);
        if (linear) keep_checksum(result, k, crc, codes);
        keep(result, scales);
        return result;
    }
    in.fill(codes.data(), codes.size());
    in.take<uint32_t>();
    in.fill(scales.data(), scales.size());
    if (four_bit) {
        k.dequantize_4bit[type][dtype](codes.data(), scales.as<float>(), values.data(), n, blocksize, stream);
        accumulate(result, n, shift, [&](double* sums, double weight) {
            k.accumulate_4bit[type][dtype](codes.data(), scales.as<float>(), sums, n, blocksize, weight);
        });
    } else if (linear) {
        k.dequantize_linear[dtype](codes.as<int8_t>(), scales.as<uint16_t>(), values.data(), n, blocksize, stream);
        accumulate(result, n, shift, [&](double* sums, double weight) {
            k.accumulate_linear[dtype](codes.as<int8_t>(), scales.as<uint16_t>(), sums, n, blocksize, weight);
        });
    } else {
        k.dequantize_int8[dtype](codes.data(), scales.as<float>(), values.data(), n, blocksize, stream);
        accumulate(result, n, shift, [&](double* sums, double weight) {
            k.accumulate_int8[dtype](codes.data(), scales.as<float>(), sums, n, blocksize, weight);
        });
    }
    keep(result, values);
    return result;
}

bool is_nan(const uint8_t* at, size_t width, int dtype) {
    if (width == 4) {
        uint32_t bits;
        memcpy(&bits, at, 4);
        return (bits & 0x7FFFFFFF) > 0x7F800000;
    }
    uint16_t bits;
    memcpy(&bits, at, 2);
    return (bits & 0x7FFF) > (dtype == tw::kFloat16 ? 0x7C00 : 0x7F80);
}

// Whether all sums have the same bits, or are both NaN.
bool same_sums(const std::vector<double>& a, const std::vector<double>& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
        if (memcmp(&a[i], &b[i], sizeof a[i]) != 0 && !(a[i] != a[i] && b[i] != b[i])) return false;
    }
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const tw::Kernels* const* tier = tw::supported();
    const tw::Kernels* portable = nullptr;
    for (const tw::Kernels* const* k = tier; *k; ++k) portable = *k;
    const Result wanted = run(*portable, Input(data, size));
    const int kernel = size > 0 ? data[0] % kKernels : 0, dtype = size > 1 ? data[1] % tw::kDtypes : 0;
    for (; *tier != portable; ++tier) {
        const Result got = run(**tier, Input(data, size));
        bool same = got.returned == wanted.returned && got.keep == wanted.keep && same_sums(got.sums, wanted.sums);
        if (same && wanted.keep && got.bytes != wanted.bytes) {
            // Decoders are given any scales, NaN too, which no codec lets through: which NaN comes out is nobody's promise.
            const bool decodes = kernel == 4 || kernel == 6 || kernel == 8;
            const size_t width = size_of(dtype);
            same = decodes;
            for (size_t i = 0; same && i < got.bytes.size(); i += width) {
                same = memcmp(&got.bytes[i], &wanted.bytes[i], width) == 0 ||
                       (is_nan(&got.bytes[i], width, dtype) && is_nan(&wanted.bytes[i], width, dtype));
            }
        }
        if (!same) {
            fprintf(stderr, "%s differs from portable in kernel %d\n", (*tier)->isa, kernel);
            abort();
        }
    }
    return 0;
}
