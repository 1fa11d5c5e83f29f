// The Python face of the kernels: checks every argument, releases the GIL, calls through the table.
//
// The contract is the docstring of tensorwire.kernels. Arrays are accepted by the buffer protocol, which provides all
// that must be checked (type, shape, layout, writability), and keeps their memory alive and in place during the call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "crc32c.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

enum Access { kInput, kOutput };

const char* type_name(char format) {
    switch (format) {
        case 'd': return "float64";
        case 'f': return "float32";
        case 'e': return "float16";
        case 'H': return "uint16";
        case 'I': return "uint32";
        case 'B': return "uint8";
        default: return "int8";
    }
}

// A 1-D contiguous array of one of the given formats (as in the struct module), held for the duration of a call.
class Array {
public:
    Array(const char* name, nb::handle object, const char* formats, Access access) : name_(name) {
        // A bytes object has the layout of a uint8 array, but is not an array.
        if (PyBytes_Check(object.ptr()) || PyObject_GetBuffer(object.ptr(), &view_, PyBUF_RECORDS_RO) != 0) {
            PyErr_Clear();
            view_.obj = nullptr;
            throw nb::type_error((name_ + ": expected an array of " + expected(formats)).c_str());
        }
        held_ = true;
        try {
            check(formats, access);
        } catch (...) {
            PyBuffer_Release(&view_);
            throw;
        }
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() {
        if (held_) PyBuffer_Release(&view_);
    }

    size_t size() const { return static_cast<size_t>(view_.shape[0]); }
    char format() const { return format_; }

    tw::Dtype dtype() const { return format_ == 'f' ? tw::kFloat32 : format_ == 'e' ? tw::kFloat16 : tw::kBfloat16; }

    size_t item_size() const {
        switch (format_) {
            case 'd': return 8;
            case 'f':
            case 'I': return 4;
            case 'e':
            case 'H': return 2;
            default: return 1;
        }
    }
    size_t bytes() const { return size() * item_size(); }

    // From element `begin` on.
    template <class T>
    T* data(size_t begin = 0) const {
        return reinterpret_cast<T*>(static_cast<char*>(view_.buf) + begin * item_size());
    }

    void expect_size(size_t expected) const {
        if (size() == expected) return;
        throw nb::value_error(
            (name_ + ": expected " + std::to_string(expected) + " elements, got " + std::to_string(size())).c_str());
    }

    void expect_apart_from(const Array& other) const {
        const char *a = static_cast<char*>(view_.buf), *b = static_cast<char*>(other.view_.buf);
        if (a < b + other.view_.len && b < a + view_.len) {
            throw nb::value_error((name_ + " overlaps " + other.name_).c_str());
        }
    }

private:
    static std::string expected(const char* formats) {
        std::string names = type_name(*formats);
        while (*++formats) names = names + " or " + type_name(*formats);
        return names;
    }

    void check(const char* formats, Access access) {
        const char* format = view_.format ? view_.format : "B";
        if (*format == '@' || *format == '=') ++format;
        if (*format == 'L' && view_.itemsize == 4) format = "I";  // where a long has 32 bits
        if (!*format || format[1] || !strchr(formats, *format)) {
            throw nb::type_error(
                (name_ + ": expected an array of " + expected(formats) + ", got format '" + format + "'").c_str());
        }
        format_ = *format;
        if (view_.ndim != 1) {
            throw nb::type_error((name_ + ": expected 1 dimension, got " + std::to_string(view_.ndim)).c_str());
        }
        if (!PyBuffer_IsContiguous(&view_, 'C')) throw nb::value_error((name_ + ": not contiguous").c_str());
        if (access == kOutput && view_.readonly) throw nb::value_error((name_ + ": read-only").c_str());
    }

    std::string name_;
    Py_buffer view_{};
    bool held_ = false;
    char format_ = 0;
};

constexpr const char* kFloats = "feH";

// Releases the GIL and sets the default floating-point environment: the host may have enabled flushing of subnormals
// or another rounding mode, which would change bits.
class Released {
public:
    Released() {
        std::fegetenv(&environment_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~Released() { std::fesetenv(&environment_); }

private:
    nb::gil_scoped_release gil_;
    std::fenv_t environment_;
};

// The same for calculations in NumPy: `with default_environment():`, on one thread.
class DefaultEnvironment {
public:
    void enter() {
        std::fegetenv(&environment_);
        std::fesetenv(FE_DFL_ENV);
    }
    void exit(nb::args) { std::fesetenv(&environment_); }

private:
    std::fenv_t environment_;
};

// Larger outputs bypass the caches, from which they would be evicted before being read: half of a common L3.
constexpr size_t kStreamBytes = size_t{16} << 20;

bool streams(const Array& out, std::optional<bool> uncached = {}) {
    return uncached.value_or(out.bytes() >= kStreamBytes);
}

// Calls work(begin, size) on parts of [0, n), on several threads if the pool has them.
template <class Work>
void split(size_t n, size_t granule, Work work) {
    tw::share(n, granule, [](void* w, size_t begin, size_t size) { (*static_cast<Work*>(w))(begin, size); }, &work);
}

// The same for a kernel that checks its input; returns whether every part was valid.
template <class Work>
bool all_good(size_t n, size_t granule, Work work) {
    std::atomic<bool> good{true};
    split(n, granule, [&](size_t begin, size_t size) {
        if (!work(begin, size)) good.store(false, std::memory_order_relaxed);
    });
    return good.load(std::memory_order_relaxed);
}

// The checksum that an encoder computes along the way, if it is given an array for it: of the metadata, if any,
// followed by the output, whose parts may come in any order.
class Checksum {
public:
    Checksum(nb::handle crc, const Array& out) : out_(out) {
        if (crc.is_none()) return;
        array_.emplace("crc", crc, "I", kOutput);
        array_->expect_size(1);
        array_->expect_apart_from(out);
    }

    void expect_apart_from(const Array& other) const {
        if (array_) array_->expect_apart_from(other);
    }

    bool wanted() const { return array_.has_value(); }

    // Takes in the output's bytes [begin, end).
    void add(size_t begin, size_t end) {
        if (array_) add(end, tw::kernels().crc32c(0, static_cast<char*>(out_.data<void>()) + begin, end - begin));
    }
    // Returns the result of kernel(crc), for a kernel that computes the checksum of the bytes it writes, which end at
    // `end`.
    template <class Kernel>
    auto taken_by(size_t end, Kernel kernel) {
        uint32_t crc;
        const auto result = kernel(array_ ? &crc : nullptr);
        if (array_) add(end, crc);
        return result;
    }

    void finish() {
        const uint32_t crc = sum_;
        if (array_) memcpy(array_->data<void>(), &crc, sizeof crc);  // wherever it stands
    }
    void finish(const Array& metadata) {
        if (!array_) return;
        const uint32_t crc = tw::kernels().crc32c(0, metadata.data<void>(), metadata.bytes());
        sum_ ^= tw::moved_ahead(crc, out_.bytes());
        finish();
    }

private:
    void add(size_t end, uint32_t crc) { sum_ ^= tw::moved_ahead(crc, out_.bytes() - end); }

    const Array& out_;
    std::optional<Array> array_;
    std::atomic<uint32_t> sum_{0};
};

// Calls kernel(begin, size) on parts of [0, n), in whole blocks, and computes the checksum of what each wrote, bytes
// [end_of(begin), end_of(begin + size)), while it is in the cache. Returns whether all parts were valid.
template <class EndOf, class Kernel>
bool quantize(size_t n, size_t blocksize, Checksum& checksum, EndOf end_of, Kernel kernel) {
    constexpr size_t kPiece = size_t{1} << 18;
    const size_t whole_blocks = blocksize < kPiece ? kPiece / blocksize * blocksize : blocksize;
    return all_good(n, blocksize, [&](size_t begin, size_t size) {
        const size_t piece = checksum.wanted() ? whole_blocks : size;
        bool good = true;
        for (size_t done = 0; done < size; done += piece) {
            const size_t i = begin + done, part = std::min(piece, size - done);
            good &= kernel(i, part);
            checksum.add(end_of(i), end_of(i + part));
        }
        return good;
    });
}

size_t block_count(size_t n, size_t blocksize) { return n / blocksize + (n % blocksize != 0); }

size_t checked_blocksize(Py_ssize_t blocksize) {
    if (blocksize < 1) {
        throw nb::value_error(("blocksize: expected at least 1, got " + std::to_string(blocksize)).c_str());
    }
    return static_cast<size_t>(blocksize);
}

size_t checked_blocksize_4bit(Py_ssize_t blocksize) {
    if (blocksize < 2 || blocksize > 4096 || blocksize % 2) {
        throw nb::value_error(
            ("blocksize: expected an even number, 2 to 4096, got " + std::to_string(blocksize)).c_str());
    }
    return static_cast<size_t>(blocksize);
}

tw::QuantType checked_quant_type(const char* quant_type) {
    if (strcmp(quant_type, "nf4") == 0) return tw::kNf4;
    if (strcmp(quant_type, "fp4") == 0) return tw::kFp4;
    throw nb::value_error((std::string("quant_type: expected 'nf4' or 'fp4', got '") + quant_type + "'").c_str());
}

tw::Dtype checked_dtype(const char* dtype) {
    if (strcmp(dtype, "float32") == 0) return tw::kFloat32;
    if (strcmp(dtype, "float16") == 0) return tw::kFloat16;
    if (strcmp(dtype, "bfloat16") == 0) return tw::kBfloat16;
    throw nb::value_error(
        (std::string("dtype: expected 'float32', 'float16' or 'bfloat16', got '") + dtype + "'").c_str());
}

uint32_t crc32c(nb::handle data, uint32_t seed) {
    Py_buffer view;
    if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
        PyErr_Clear();
        throw nb::value_error("data: not contiguous");
    }
    uint32_t checksum;
    {
        const Released released;
        checksum = tw::kernels().crc32c(seed, view.buf, static_cast<size_t>(view.len));
    }
    PyBuffer_Release(&view);
    return checksum;
}

uint64_t cast(nb::handle values, nb::handle out, nb::handle crc, bool saturate, std::optional<bool> uncached) {
    const Array x("values", values, kFloats, kInput), y("out", out, kFloats, kOutput);
    const bool narrows = x.format() == 'f';
    if (narrows == (y.format() == 'f')) {
        throw nb::type_error(
            (std::string("cast: no conversion from ") + type_name(x.format()) + " to " + type_name(y.format()))
                .c_str());
    }
    y.expect_size(x.size());
    y.expect_apart_from(x);
    Checksum checksum(crc, y);
    checksum.expect_apart_from(x);
    const tw::Kernels& k = tw::kernels();
    const bool stream = streams(y, uncached);
    std::atomic<uint64_t> overflows{0};
    const Released released;
    split(x.size(), 64, [&](size_t i, size_t n) {
        const size_t end = (i + n) * y.item_size();
        if (narrows) {
            overflows += checksum.taken_by(end, [&](uint32_t* part) {
                return k.narrow[y.dtype()](x.data<void>(i), y.data<void>(i), n, saturate, stream, part);
            });
        } else {
            k.widen[x.dtype()](x.data<void>(i), y.data<void>(i), n, stream);
            checksum.add(i * y.item_size(), end);
        }
    });
    checksum.finish();
    return overflows;
}

bool blockwise_absmax(nb::handle values, nb::handle absmax, Py_ssize_t blocksize) {
    const size_t bs = checked_blocksize(blocksize);
    const Array x("values", values, kFloats, kInput), m("absmax", absmax, "f", kOutput);
    m.expect_size(block_count(x.size(), bs));
    m.expect_apart_from(x);
    const auto kernel = tw::kernels().absmax[x.dtype()];
    const Released released;
    return all_good(x.size(), bs,
                    [&](size_t i, size_t n) { return kernel(x.data<void>(i), m.data<float>(i / bs), n, bs); });
}

bool quantize_4bit(nb::handle values, nb::handle codes, nb::handle absmax, nb::handle crc, Py_ssize_t blocksize,
                   const char* quant_type) {
    const size_t bs = checked_blocksize_4bit(blocksize);
    const tw::QuantType type = checked_quant_type(quant_type);
    const Array x("values", values, kFloats, kInput), q("codes", codes, "B", kOutput),
        m("absmax", absmax, "f", kOutput);
    q.expect_size(x.size() / 2 + x.size() % 2);
    m.expect_size(block_count(x.size(), bs));
    q.expect_apart_from(x);
    m.expect_apart_from(x);
    q.expect_apart_from(m);
    Checksum checksum(crc, q);
    checksum.expect_apart_from(x);
    checksum.expect_apart_from(m);
    const auto kernel = tw::kernels().quantize_4bit[type][x.dtype()];
    const bool stream = streams(q) && !checksum.wanted();
    const Released released;
    const auto end_of = [](size_t i) { return i / 2 + i % 2; };
    const bool finite = quantize(x.size(), bs, checksum, end_of, [&](size_t i, size_t n) {
        return kernel(x.data<void>(i), q.data<uint8_t>(i / 2), m.data<float>(i / bs), n, bs, stream);
    });
    checksum.finish(m);
    return finite;
}

void dequantize_4bit(nb::handle codes, nb::handle absmax, nb::handle out, Py_ssize_t blocksize, const char* quant_type,
                     std::optional<bool> uncached) {
    const size_t bs = checked_blocksize_4bit(blocksize);
    const tw::QuantType type = checked_quant_type(quant_type);
    const Array q("codes", codes, "B", kInput), m("absmax", absmax, "f", kInput), y("out", out, kFloats, kOutput);
    q.expect_size(y.size() / 2 + y.size() % 2);
    m.expect_size(block_count(y.size(), bs));
    y.expect_apart_from(q);
    y.expect_apart_from(m);
    const auto kernel = tw::kernels().dequantize_4bit[type][y.dtype()];
    const bool stream = streams(y, uncached);
    const Released released;
    split(y.size(), bs, [&](size_t i, size_t n) {
        kernel(q.data<uint8_t>(i / 2), m.data<float>(i / bs), y.data<void>(i), n, bs, stream);
    });
}

bool quantize_int8(nb::handle values, nb::handle codes, nb::handle absmax, nb::handle crc, Py_ssize_t blocksize) {
    const size_t bs = checked_blocksize(blocksize);
    const Array x("values", values, kFloats, kInput), q("codes", codes, "B", kOutput),
        m("absmax", absmax, "f", kOutput);
    q.expect_size(x.size());
    m.expect_size(block_count(x.size(), bs));
    q.expect_apart_from(x);
    m.expect_apart_from(x);
    q.expect_apart_from(m);
    Checksum checksum(crc, q);
    checksum.expect_apart_from(x);
    checksum.expect_apart_from(m);
    const auto kernel = tw::kernels().quantize_int8[x.dtype()];
    const bool stream = streams(q) && !checksum.wanted();
    const Released released;
    const auto end_of = [](size_t i) { return i; };
    const bool finite = quantize(x.size(), bs, checksum, end_of, [&](size_t i, size_t n) {
        return kernel(x.data<void>(i), q.data<uint8_t>(i), m.data<float>(i / bs), n, bs, stream);
    });
    checksum.finish(m);
    return finite;
}

void dequantize_int8(nb::handle codes, nb::handle absmax, nb::handle out, Py_ssize_t blocksize,
                     std::optional<bool> uncached) {
    const size_t bs = checked_blocksize(blocksize);
    const Array q("codes", codes, "B", kInput), m("absmax", absmax, "f", kInput), y("out", out, kFloats, kOutput);
    q.expect_size(y.size());
    m.expect_size(block_count(y.size(), bs));
    y.expect_apart_from(q);
    y.expect_apart_from(m);
    const auto kernel = tw::kernels().dequantize_int8[y.dtype()];
    const bool stream = streams(y, uncached);
    const Released released;
    split(y.size(), bs, [&](size_t i, size_t n) {
        kernel(q.data<uint8_t>(i), m.data<float>(i / bs), y.data<void>(i), n, bs, stream);
    });
}

bool quantize_linear(nb::handle values, nb::handle codes, nb::handle scales, nb::handle crc, Py_ssize_t blocksize) {
    const size_t bs = checked_blocksize(blocksize);
    const Array x("values", values, kFloats, kInput), q("codes", codes, "b", kOutput),
        s("scales", scales, "H", kOutput);
    q.expect_size(x.size());
    s.expect_size(block_count(x.size(), bs));
    q.expect_apart_from(x);
    s.expect_apart_from(x);
    q.expect_apart_from(s);
    Checksum checksum(crc, q);
    checksum.expect_apart_from(x);
    checksum.expect_apart_from(s);
    const auto kernel = tw::kernels().quantize_linear[x.dtype()];
    const bool stream = streams(q);
    const Released released;
    const bool finite = all_good(x.size(), bs, [&](size_t i, size_t n) {
        return checksum.taken_by(i + n, [&](uint32_t* part) {
            return kernel(x.data<void>(i), q.data<int8_t>(i), s.data<uint16_t>(i / bs), n, bs, stream, part);
        });
    });
    checksum.finish(s);
    return finite;
}

bool dequantize_linear(nb::handle codes, nb::handle scales, nb::handle out, Py_ssize_t blocksize,
                       std::optional<bool> uncached) {
    const size_t bs = checked_blocksize(blocksize);
    const Array q("codes", codes, "b", kInput), s("scales", scales, "H", kInput), y("out", out, kFloats, kOutput);
    q.expect_size(y.size());
    s.expect_size(block_count(y.size(), bs));
    y.expect_apart_from(q);
    y.expect_apart_from(s);
    const auto kernel = tw::kernels().dequantize_linear[y.dtype()];
    const bool stream = streams(y, uncached);
    const Released released;
    return all_good(y.size(), bs, [&](size_t i, size_t n) {
        return kernel(q.data<int8_t>(i), s.data<uint16_t>(i / bs), y.data<void>(i), n, bs, stream);
    });
}

void accumulate(nb::handle values, nb::handle sums, double weight) {
    const Array x("values", values, kFloats, kInput), s("sums", sums, "d", kOutput);
    s.expect_size(x.size());
    s.expect_apart_from(x);
    const auto kernel = tw::kernels().accumulate[x.dtype()];
    const Released released;
    split(x.size(), 64, [&](size_t i, size_t n) { kernel(x.data<void>(i), s.data<double>(i), n, weight); });
}

void accumulate_4bit(nb::handle codes, nb::handle absmax, nb::handle sums, double weight, const char* dtype,
                     Py_ssize_t blocksize, const char* quant_type) {
    const size_t bs = checked_blocksize_4bit(blocksize);
    const tw::QuantType type = checked_quant_type(quant_type);
    const Array q("codes", codes, "B", kInput), m("absmax", absmax, "f", kInput), s("sums", sums, "d", kOutput);
    q.expect_size(s.size() / 2 + s.size() % 2);
    m.expect_size(block_count(s.size(), bs));
    s.expect_apart_from(q);
    s.expect_apart_from(m);
    const auto kernel = tw::kernels().accumulate_4bit[type][checked_dtype(dtype)];
    const Released released;
    split(s.size(), bs, [&](size_t i, size_t n) {
        kernel(q.data<uint8_t>(i / 2), m.data<float>(i / bs), s.data<double>(i), n, bs, weight);
    });
}

void accumulate_int8(nb::handle codes, nb::handle absmax, nb::handle sums, double weight, const char* dtype,
                     Py_ssize_t blocksize) {
    const size_t bs = checked_blocksize(blocksize);
    const Array q("codes", codes, "B", kInput), m("absmax", absmax, "f", kInput), s("sums", sums, "d", kOutput);
    q.expect_size(s.size());
    m.expect_size(block_count(s.size(), bs));
    s.expect_apart_from(q);
    s.expect_apart_from(m);
    const auto kernel = tw::kernels().accumulate_int8[checked_dtype(dtype)];
    const Released released;
    split(s.size(), bs, [&](size_t i, size_t n) {
        kernel(q.data<uint8_t>(i), m.data<float>(i / bs), s.data<double>(i), n, bs, weight);
    });
}

bool accumulate_linear(nb::handle codes, nb::handle scales, nb::handle sums, double weight, const char* dtype,
                       Py_ssize_t blocksize) {
    const size_t bs = checked_blocksize(blocksize);
    const Array q("codes", codes, "b", kInput), m("scales", scales, "H", kInput), s("sums", sums, "d", kOutput);
    q.expect_size(s.size());
    m.expect_size(block_count(s.size(), bs));
    s.expect_apart_from(q);
    s.expect_apart_from(m);
    const auto kernel = tw::kernels().accumulate_linear[checked_dtype(dtype)];
    const Released released;
    return all_good(s.size(), bs, [&](size_t i, size_t n) {
        return kernel(q.data<int8_t>(i), m.data<uint16_t>(i / bs), s.data<double>(i), n, bs, weight);
    });
}

// The planes of elements, lowest byte first.
class Planes {
public:
    Planes(nb::handle planes, Access access) {
        if (!PySequence_Check(planes.ptr())) throw nb::type_error("planes: expected a sequence of arrays");
        count_ = nb::len(planes);
        if (count_ != 1 && count_ != 2 && count_ != 4 && count_ != 8) {
            throw nb::value_error(("planes: expected 1, 2, 4 or 8, got " + std::to_string(count_)).c_str());
        }
        for (size_t p = 0; p < count_; ++p) planes_[p].emplace("planes", planes[p], "B", access);
    }

    size_t count() const { return count_; }
    int width_index() const { return count_ == 1 ? 0 : count_ == 2 ? 1 : count_ == 4 ? 2 : 3; }
    const Array& operator[](size_t p) const { return *planes_[p]; }

    void expect_apart_from(const Array& other) const {
        for (size_t p = 0; p < count_; ++p) planes_[p]->expect_apart_from(other);
    }
    void expect_apart_from_one_another() const {
        for (size_t p = 1; p < count_; ++p) {
            for (size_t q = 0; q < p; ++q) planes_[p]->expect_apart_from(*planes_[q]);
        }
    }

private:
    size_t count_ = 0;
    std::optional<Array> planes_[8];
};

// The number of elements in marked blocks, of `elements` in all.
size_t marked_elements(const Array& marks, size_t elements) {
    const size_t blocks = block_count(elements, tw::kPlaneBlock);
    marks.expect_size(block_count(blocks, 8));
    size_t marked = 0;
    for (size_t i = 0; i < marks.size(); ++i) {
        for (unsigned bits = *marks.data<uint8_t>(i); bits; bits &= bits - 1) ++marked;
    }
    if (blocks % 8 && *marks.data<uint8_t>(marks.size() - 1) >> blocks % 8) {
        throw nb::value_error("marks: more than there are blocks");
    }
    const size_t behind = blocks * tw::kPlaneBlock - elements;
    const bool last = blocks && *marks.data<uint8_t>((blocks - 1) / 8) >> (blocks - 1) % 8 & 1;
    return marked * tw::kPlaneBlock - (last ? behind : 0);
}

size_t elements_of(const Array& values, size_t width) {
    if (values.size() % width) {
        throw nb::value_error(("elements: expected a multiple of " + std::to_string(width) + " bytes, got " +
                               std::to_string(values.size()))
                                  .c_str());
    }
    return values.size() / width;
}

size_t nonzero_blocks(nb::handle values, nb::handle marks, Py_ssize_t blocksize) {
    const size_t bs = checked_blocksize(blocksize);
    const Array x("values", values, "B", kInput), m("marks", marks, "B", kOutput);
    m.expect_size(block_count(block_count(x.size(), bs), 8));
    m.expect_apart_from(x);
    const Released released;
    return tw::kernels().nonzero_blocks(x.data<uint8_t>(), x.size(), bs, m.data<uint8_t>());
}

void byte_histogram(nb::handle values, nb::handle counts, Py_ssize_t every) {
    if (every < 1) throw nb::value_error(("every: expected at least 1, got " + std::to_string(every)).c_str());
    const Array x("values", values, "B", kInput), c("counts", counts, "I", kOutput);
    c.expect_size(256);
    c.expect_apart_from(x);
    const size_t step = std::min(static_cast<size_t>(every), x.size() / tw::kPlaneBlock + 1);
    uint32_t found[256];
    {
        const Released released;
        tw::kernels().byte_histogram(x.data<uint8_t>(), x.size(), step, found);
    }
    memcpy(c.data<void>(), found, sizeof found);  // wherever it stands
}

void split_planes(nb::handle values, nb::handle marks, nb::handle planes) {
    const Array x("values", values, "B", kInput), m("marks", marks, "B", kInput);
    const Planes to(planes, kOutput);
    const size_t n = elements_of(x, to.count()), marked = marked_elements(m, n);
    uint8_t* bytes[8];
    for (size_t p = 0; p < to.count(); ++p) {
        to[p].expect_size(marked);
        bytes[p] = to[p].data<uint8_t>();
    }
    to.expect_apart_from(x);
    to.expect_apart_from(m);
    to.expect_apart_from_one_another();
    const Released released;
    tw::kernels().split_planes[to.width_index()](x.data<uint8_t>(), m.data<uint8_t>(), bytes, n);
}

void merge_planes(nb::handle planes, nb::handle marks, nb::handle out) {
    const Planes from(planes, kInput);
    const Array m("marks", marks, "B", kInput), y("out", out, "B", kOutput);
    const size_t n = elements_of(y, from.count()), marked = marked_elements(m, n);
    tw::Plane given[8];
    for (size_t p = 0; p < from.count(); ++p) {
        const bool constant = from[p].size() == 1;
        if (!constant) from[p].expect_size(marked);
        given[p] = {from[p].data<uint8_t>(), constant};
    }
    from.expect_apart_from(y);
    m.expect_apart_from(y);
    const Released released;
    tw::kernels().merge_planes[from.width_index()](given, m.data<uint8_t>(), y.data<uint8_t>(), n);
}

size_t huffman_encode(nb::handle values, nb::handle codes) {
    const Array x("values", values, "B", kInput), c("codes", codes, "B", kOutput);
    c.expect_apart_from(x);
    const Released released;
    return tw::kernels().huffman_encode(x.data<uint8_t>(), x.size(), c.data<uint8_t>(), c.size());
}

bool huffman_decode(nb::handle codes, nb::handle out) {
    const Array c("codes", codes, "B", kInput), y("out", out, "B", kOutput);
    y.expect_apart_from(c);
    const Released released;
    return tw::kernels().huffman_decode(c.data<uint8_t>(), c.size(), y.data<uint8_t>(), y.size());
}

// How a slice of n elements is cut into chunks, with every side at least 1, and how many elements are kept.
class CheckedGrid : public tw::Grid {
public:
    CheckedGrid(Py_ssize_t width, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t k)
        : tw::Grid{positive("width", width), positive("rows", rows), positive("cols", cols), positive("k", k)} {
        if (this->cols > tw::kMostChunk || this->rows > tw::kMostChunk / this->cols) {
            throw nb::value_error("rows, cols: expected a chunk of at most 4096 elements");
        }
        if (this->width > PTRDIFF_MAX / tw::kMostChunk) throw nb::value_error("width: expected less");
    }

    // Elements that are kept of n.
    size_t kept(size_t n) const {
        const size_t whole = n / width / rows, left = n / width % rows;
        return whole * band(rows, width) + band(left, width) + band(1, n % width);
    }

private:
    static size_t positive(const char* name, Py_ssize_t value) {
        if (value >= 1) return static_cast<size_t>(value);
        throw nb::value_error((std::string(name) + ": expected at least 1, got " + std::to_string(value)).c_str());
    }
    size_t band(size_t height, size_t across) const {
        return across / cols * std::min(k, height * cols) + std::min(k, height * (across % cols));
    }
};

// The table of the DCT, for chunks that are transformed.
class Tables {
public:
    Tables(nb::handle given, const tw::Grid& grid) {
        if (given.is_none()) return;
        if (grid.rows > tw::kMostSide || grid.cols > tw::kMostSide) {
            throw nb::value_error("rows, cols: expected at most 64 to be transformed");
        }
        table_.emplace("tables", given, "f", kInput);
        table_->expect_size(tw::kDctTables);
    }

    // Or null.
    const float* data() const { return table_ ? table_->data<float>() : nullptr; }

private:
    std::optional<Array> table_;
};

size_t checked_elements(Py_ssize_t elements) {
    if (elements >= 0) return static_cast<size_t>(elements);
    throw nb::value_error(("elements: expected at least 0, got " + std::to_string(elements)).c_str());
}

float select_largest(nb::handle values, nb::handle positions, nb::handle coefficients, Py_ssize_t width,
                     Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t k, nb::handle tables) {
    const CheckedGrid grid(width, rows, cols, k);
    const Array x("values", values, "f", kInput), p("positions", positions, "H", kOutput),
        c("coefficients", coefficients, "f", kOutput);
    const Tables b(tables, grid);
    p.expect_size(grid.kept(x.size()));
    c.expect_size(grid.kept(x.size()));
    p.expect_apart_from(c);
    p.expect_apart_from(x);
    c.expect_apart_from(x);
    const Released released;
    return tw::kernels().select_largest(x.data<float>(), p.data<uint16_t>(), c.data<float>(), x.size(), grid, b.data());
}

float decay_and_select(nb::handle kept, nb::handle values, nb::handle positions, nb::handle coefficients, double beta,
                       Py_ssize_t width, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t k, nb::handle tables) {
    const CheckedGrid grid(width, rows, cols, k);
    const Array y("kept", kept, "f", kOutput), x("values", values, kFloats, kInput),
        p("positions", positions, "H", kOutput), c("coefficients", coefficients, "f", kOutput);
    const Tables b(tables, grid);
    x.expect_size(y.size());
    p.expect_size(grid.kept(y.size()));
    c.expect_size(grid.kept(y.size()));
    y.expect_apart_from(x);
    y.expect_apart_from(p);
    y.expect_apart_from(c);
    p.expect_apart_from(c);
    p.expect_apart_from(x);
    c.expect_apart_from(x);
    const Released released;
    return tw::kernels().decay_and_select[x.dtype()](y.data<float>(), x.data<void>(), p.data<uint16_t>(),
                                                     c.data<float>(), y.size(), static_cast<float>(beta), grid,
                                                     b.data());
}

bool add_selected(nb::handle positions, nb::handle coefficients, nb::handle sums, double weight, Py_ssize_t width,
                  Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t k, nb::handle tables) {
    const CheckedGrid grid(width, rows, cols, k);
    const Array p("positions", positions, "H", kInput), c("coefficients", coefficients, "f", kInput),
        s("sums", sums, "fd", kOutput);
    const Tables b(tables, grid);
    p.expect_size(grid.kept(s.size()));
    c.expect_size(grid.kept(s.size()));
    s.expect_apart_from(p);
    s.expect_apart_from(c);
    const Released released;
    const tw::Kernels& kernels = tw::kernels();
    if (s.format() == 'f') {
        return kernels.add_to_float(p.data<uint16_t>(), c.data<float>(), s.data<float>(), s.size(), weight, grid,
                                    b.data());
    }
    return kernels.add_to_double(p.data<uint16_t>(), c.data<float>(), s.data<double>(), s.size(), weight, grid,
                                 b.data());
}

bool combine_selected(nb::handle positions, nb::handle values, nb::handle weights, nb::handle out, double divisor,
                      bool present, bool signs, Py_ssize_t width, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t k,
                      nb::handle tables) {
    const CheckedGrid grid(width, rows, cols, k);
    const Array p("positions", positions, "H", kInput), v("values", values, "f", kInput),
        w("weights", weights, "d", kInput), y("out", out, "f", kOutput);
    const Tables b(tables, grid);
    const size_t kept = grid.kept(y.size());
    p.expect_size(w.size() * kept);
    v.expect_size(w.size() * kept);
    y.expect_apart_from(p);
    y.expect_apart_from(v);
    y.expect_apart_from(w);
    const Released released;
    return tw::kernels().combine_selected(p.data<uint16_t>(), v.data<float>(), w.data<double>(), w.size(), kept,
                                          y.data<float>(), y.size(), {divisor, present, signs}, grid, b.data());
}

size_t encode_positions(nb::handle positions, nb::handle codes, Py_ssize_t elements, Py_ssize_t width, Py_ssize_t rows,
                        Py_ssize_t cols, Py_ssize_t k) {
    const CheckedGrid grid(width, rows, cols, k);
    const size_t n = checked_elements(elements);
    const Array p("positions", positions, "H", kInput), c("codes", codes, "B", kOutput);
    p.expect_size(grid.kept(n));
    c.expect_apart_from(p);
    const Released released;
    return tw::kernels().encode_positions(p.data<uint16_t>(), c.data<uint8_t>(), c.size(), n, grid);
}

bool decode_positions(nb::handle codes, nb::handle positions, Py_ssize_t elements, Py_ssize_t width, Py_ssize_t rows,
                      Py_ssize_t cols, Py_ssize_t k) {
    const CheckedGrid grid(width, rows, cols, k);
    const size_t n = checked_elements(elements);
    const Array c("codes", codes, "B", kInput), p("positions", positions, "H", kOutput);
    p.expect_size(grid.kept(n));
    p.expect_apart_from(c);
    const Released released;
    return tw::kernels().decode_positions(c.data<uint8_t>(), c.size(), p.data<uint16_t>(), n, grid);
}

nb::tuple sum_magnitudes(nb::handle values) {
    const Array x("values", values, "f", kInput);
    if (x.size() >> 31) throw nb::value_error("values: expected fewer than 2^31");  // their sum has 64 bits
    float largest;
    uint64_t sum, count;
    {
        const Released released;
        tw::kernels().sum_magnitudes(x.data<float>(), x.size(), &largest, &sum, &count);
    }
    return nb::make_tuple(largest, sum, count);
}

// The place of a number of bits in the tables of kernels.
size_t bits_index(Py_ssize_t bits) {
    for (size_t i = 0; i < tw::kValueBits; ++i) {
        if (bits == Py_ssize_t{1} << i) return i;
    }
    throw nb::value_error(("bits: expected 1, 2, 4, 8 or 16, got " + std::to_string(bits)).c_str());
}

// Checks the steps and codes of n values. Returns the stride of the steps: 0 if all values share one, else 1.
size_t checked_steps(const Array& steps, const Array& codes, size_t n, Py_ssize_t bits) {
    if (steps.size() != 1) steps.expect_size(n);
    const size_t width = static_cast<size_t>(bits);
    codes.expect_size(n / 8 * width + (n % 8 * width + 7) / 8);
    return steps.size() == 1 ? 0 : 1;
}

void pack_values(nb::handle values, nb::handle steps, nb::handle codes, Py_ssize_t bits) {
    const size_t index = bits_index(bits);
    const Array x("values", values, "f", kInput), s("steps", steps, "f", kInput), c("codes", codes, "B", kOutput);
    const size_t every = checked_steps(s, c, x.size(), bits);
    c.expect_apart_from(x);
    c.expect_apart_from(s);
    const Released released;
    tw::kernels().pack_values[index](x.data<float>(), s.data<float>(), every, c.data<uint8_t>(), x.size());
}

bool unpack_values(nb::handle codes, nb::handle steps, nb::handle values, Py_ssize_t bits) {
    const size_t index = bits_index(bits);
    const Array c("codes", codes, "B", kInput), s("steps", steps, "f", kInput), x("values", values, "f", kOutput);
    const size_t every = checked_steps(s, c, x.size(), bits);
    x.expect_apart_from(c);
    x.expect_apart_from(s);
    const Released released;
    return tw::kernels().unpack_values[index](c.data<uint8_t>(), s.data<float>(), every, x.data<float>(), x.size());
}

float decay_and_add(nb::handle kept, nb::handle values, double beta) {
    const Array k("kept", kept, "f", kOutput), x("values", values, kFloats, kInput);
    x.expect_size(k.size());
    k.expect_apart_from(x);
    const Released released;
    return tw::kernels().decay_and_add[x.dtype()](k.data<float>(), x.data<void>(), k.size(), static_cast<float>(beta));
}

void divide_by_rms(nb::handle values, nb::handle roots, nb::handle out, double beta, double scale, double eps) {
    const Array x("values", values, "f", kInput), r("roots", roots, "f", kOutput), y("out", out, "f", kOutput);
    r.expect_size(x.size());
    y.expect_size(x.size());
    r.expect_apart_from(x);
    r.expect_apart_from(y);
    y.expect_apart_from(x);
    const Released released;
    tw::kernels().divide_by_rms(x.data<float>(), r.data<float>(), y.data<float>(), x.size(), beta, scale, eps);
}

// The place of a width in the tables of kernels.
size_t width_index(Py_ssize_t width) {
    for (size_t i = 0; i < tw::kPlaneWidths; ++i) {
        if (width == Py_ssize_t{1} << i) return i;
    }
    throw nb::value_error(("width: expected 1, 2, 4 or 8, got " + std::to_string(width)).c_str());
}

void difference(nb::handle base, nb::handle values, nb::handle out, Py_ssize_t width) {
    const size_t index = width_index(width);
    const Array b("base", base, "B", kInput), x("values", values, "B", kInput), y("out", out, "B", kOutput);
    const size_t n = elements_of(x, static_cast<size_t>(width));
    b.expect_size(x.size());
    y.expect_size(x.size());
    y.expect_apart_from(b);
    y.expect_apart_from(x);
    const Released released;
    tw::kernels().difference[index](b.data<uint8_t>(), x.data<uint8_t>(), y.data<uint8_t>(), n);
}

void add_difference(nb::handle differences, nb::handle values, Py_ssize_t width) {
    const size_t index = width_index(width);
    const Array d("differences", differences, "B", kInput), x("values", values, "B", kOutput);
    const size_t n = elements_of(x, static_cast<size_t>(width));
    d.expect_size(x.size());
    x.expect_apart_from(d);
    const Released released;
    tw::kernels().add_difference[index](d.data<uint8_t>(), x.data<uint8_t>(), n);
}

// Work space in which sparse changes are sorted.
void expect_work(const Array& work, size_t n) {
    work.expect_size(2 * n);
    if (reinterpret_cast<uintptr_t>(work.data<void>()) % alignof(uint32_t)) throw nb::value_error("work: not aligned");
}

nb::tuple encode_changes(nb::handle base, nb::handle values, nb::handle codes, nb::handle work) {
    const Array b("base", base, "eH", kInput), x("values", values, "eH", kInput);
    const Array c("codes", codes, "B", kOutput), w("work", work, "I", kOutput);
    if (b.format() != x.format()) throw nb::type_error("values: not of the type of base");
    x.expect_size(b.size());
    expect_work(w, x.size());
    c.expect_apart_from(b);
    c.expect_apart_from(x);
    w.expect_apart_from(b);
    w.expect_apart_from(x);
    w.expect_apart_from(c);
    size_t size, differ;
    {
        const Released released;
        size = tw::kernels().encode_changes[x.dtype()](b.data<uint8_t>(), x.data<uint8_t>(), x.size(),
                                                       w.data<uint32_t>(), c.data<uint8_t>(), c.size(), &differ);
    }
    return nb::make_tuple(size, differ);
}

size_t decode_changes(nb::handle codes, nb::handle values, nb::handle work) {
    const Array c("codes", codes, "B", kInput), x("values", values, "eH", kOutput), w("work", work, "I", kOutput);
    expect_work(w, x.size());
    x.expect_apart_from(c);
    w.expect_apart_from(c);
    w.expect_apart_from(x);
    const Released released;
    return tw::kernels().decode_changes[x.dtype()](c.data<uint8_t>(), c.size(), x.data<uint8_t>(), x.size(),
                                                   w.data<uint32_t>());
}

std::string supported_names() {
    std::string names;
    for (const tw::Kernels* const* k = tw::supported(); *k; ++k)
        names = names + (names.empty() ? "" : ", ") + (*k)->isa;
    return names;
}

nb::list supported() {
    nb::list names;
    for (const tw::Kernels* const* k = tw::supported(); *k; ++k) names.append((*k)->isa);
    return names;
}

void use(const char* tier) {
    if (tw::use(tier)) return;
    throw nb::value_error(
        (std::string("no instruction set '") + tier + "' here; supported: " + supported_names()).c_str());
}

void set_threads(int count) {
    if (count < 1) throw nb::value_error(("threads: expected at least 1, got " + std::to_string(count)).c_str());
    tw::set_threads(count);
}

// An environment variable's positive integer, or an ImportError.
int threads_asked_for(const char* text) {
    char* end;
    const long count = std::strtol(text, &end, 10);
    if (*end || count < 1 || count > 4096) {
        throw nb::import_error((std::string("TENSORWIRE_THREADS: expected 1 to 4096, got '") + text + "'").c_str());
    }
    return static_cast<int>(count);
}

}  // namespace

NB_MODULE(_native, m) {
    const char* forced = std::getenv("TENSORWIRE_ISA");
    if (forced && *forced && !tw::use(forced)) {
        throw nb::import_error((std::string("TENSORWIRE_ISA=") + forced + " is not supported here; set it to one of " +
                                supported_names() + ", numpy, or leave it unset for the fastest")
                                   .c_str());
    }

    const char* threads = std::getenv("TENSORWIRE_THREADS");
    if (threads && *threads) tw::set_threads(threads_asked_for(threads));

    m.doc() = "The kernels in C++; tensorwire.kernels has their contract.";
    m.def("crc32c", crc32c, "data"_a, "seed"_a = 0);
    m.def("cast", cast, "values"_a, "out"_a, "crc"_a = nb::none(), nb::kw_only(), "saturate"_a = false,
          "uncached"_a = nb::none());
    m.def("blockwise_absmax", blockwise_absmax, "values"_a, "absmax"_a, nb::kw_only(), "blocksize"_a);
    m.def("quantize_4bit", quantize_4bit, "values"_a, "codes"_a, "absmax"_a, "crc"_a = nb::none(), nb::kw_only(),
          "blocksize"_a, "quant_type"_a);
    m.def("dequantize_4bit", dequantize_4bit, "codes"_a, "absmax"_a, "out"_a, nb::kw_only(), "blocksize"_a,
          "quant_type"_a, "uncached"_a = nb::none());
    m.def("quantize_int8", quantize_int8, "values"_a, "codes"_a, "absmax"_a, "crc"_a = nb::none(), nb::kw_only(),
          "blocksize"_a);
    m.def("dequantize_int8", dequantize_int8, "codes"_a, "absmax"_a, "out"_a, nb::kw_only(), "blocksize"_a,
          "uncached"_a = nb::none());
    m.def("quantize_linear", quantize_linear, "values"_a, "codes"_a, "scales"_a, "crc"_a = nb::none(), nb::kw_only(),
          "blocksize"_a);
    m.def("dequantize_linear", dequantize_linear, "codes"_a, "scales"_a, "out"_a, nb::kw_only(), "blocksize"_a,
          "uncached"_a = nb::none());

    m.def("accumulate", accumulate, "values"_a, "sums"_a, nb::kw_only(), "weight"_a);
    m.def("accumulate_4bit", accumulate_4bit, "codes"_a, "absmax"_a, "sums"_a, nb::kw_only(), "weight"_a, "dtype"_a,
          "blocksize"_a, "quant_type"_a);
    m.def("accumulate_int8", accumulate_int8, "codes"_a, "absmax"_a, "sums"_a, nb::kw_only(), "weight"_a, "dtype"_a,
          "blocksize"_a);
    m.def("accumulate_linear", accumulate_linear, "codes"_a, "scales"_a, "sums"_a, nb::kw_only(), "weight"_a, "dtype"_a,
          "blocksize"_a);

    m.def("nonzero_blocks", nonzero_blocks, "values"_a, "marks"_a, nb::kw_only(), "blocksize"_a);
    m.def("byte_histogram", byte_histogram, "values"_a, "counts"_a, nb::kw_only(), "every"_a = 1);
    m.def("huffman_encode", huffman_encode, "values"_a, "codes"_a);
    m.def("huffman_decode", huffman_decode, "codes"_a, "out"_a);
    m.def("difference", difference, "base"_a, "values"_a, "out"_a, nb::kw_only(), "width"_a);
    m.def("add_difference", add_difference, "differences"_a, "values"_a, nb::kw_only(), "width"_a);
    m.def("encode_changes", encode_changes, "base"_a, "values"_a, "codes"_a, "work"_a,
          nb::sig("def encode_changes(base: object, values: object, codes: object, work: object) -> tuple[int, int]"));
    m.def("decode_changes", decode_changes, "codes"_a, "values"_a, "work"_a);
    m.def("split_planes", split_planes, "values"_a, "marks"_a, "planes"_a);
    m.def("merge_planes", merge_planes, "planes"_a, "marks"_a, "out"_a);

    m.def("select_largest", select_largest, "values"_a, "positions"_a, "coefficients"_a, nb::kw_only(), "width"_a,
          "rows"_a, "cols"_a, "k"_a, "tables"_a = nb::none());
    m.def("decay_and_select", decay_and_select, "kept"_a, "values"_a, "positions"_a, "coefficients"_a, nb::kw_only(),
          "beta"_a, "width"_a, "rows"_a, "cols"_a, "k"_a, "tables"_a = nb::none());
    m.def("add_selected", add_selected, "positions"_a, "coefficients"_a, "sums"_a, nb::kw_only(), "weight"_a, "width"_a,
          "rows"_a, "cols"_a, "k"_a, "tables"_a = nb::none());
    m.def("combine_selected", combine_selected, "positions"_a, "values"_a, "weights"_a, "out"_a, nb::kw_only(),
          "divisor"_a, "present"_a, "signs"_a, "width"_a, "rows"_a, "cols"_a, "k"_a, "tables"_a = nb::none());
    m.def("encode_positions", encode_positions, "positions"_a, "codes"_a, nb::kw_only(), "elements"_a, "width"_a,
          "rows"_a, "cols"_a, "k"_a);
    m.def("decode_positions", decode_positions, "codes"_a, "positions"_a, nb::kw_only(), "elements"_a, "width"_a,
          "rows"_a, "cols"_a, "k"_a);

    m.def("sum_magnitudes", sum_magnitudes, "values"_a,
          nb::sig("def sum_magnitudes(values: object) -> tuple[float, int, int]"));
    m.def("pack_values", pack_values, "values"_a, "steps"_a, "codes"_a, nb::kw_only(), "bits"_a);
    m.def("unpack_values", unpack_values, "codes"_a, "steps"_a, "values"_a, nb::kw_only(), "bits"_a);
    m.def("decay_and_add", decay_and_add, "kept"_a, "values"_a, nb::kw_only(), "beta"_a);
    m.def("divide_by_rms", divide_by_rms, "values"_a, "roots"_a, "out"_a, nb::kw_only(), "beta"_a, "scale"_a, "eps"_a);

    nb::class_<DefaultEnvironment>(m, "default_environment",
                                   "Round to nearest even and keep subnormals within a `with` block.")
        .def(nb::init<>())
        .def("__enter__", &DefaultEnvironment::enter)
        .def("__exit__", &DefaultEnvironment::exit, nb::sig("def __exit__(self, *args: object) -> None"));

    m.def("isa", [] { return tw::kernels().isa; }, "The instruction set in use.");
    m.def("supported", supported, "The instruction sets that run here, best first.");
    m.def("use", use, "tier"_a, "Switch to another instruction set; for tests.");
    m.def("set_threads", set_threads, "count"_a, "Threads a call may use on large arrays, its own included.");
    m.def("get_threads", tw::threads, "The number set_threads, or TENSORWIRE_THREADS at import, has set; else 1.");
}
