// One vocabulary of vector operations over every instruction set, so that a kernel's loop is written once.
//
// The tier being compiled (TW_AVX512, TW_AVX2, or neither) chooses the file. Each defines kLanes; Floats, Words and
// Mask; load for float, Float16 and Bfloat16, and load_part for the first n < kLanes of them; narrow, back to those
// types; a little arithmetic, in which NaN stays NaN; int8 loads; and store_bytes, for the first bytes of a vector.
// Results of fewer than 32 bits fill a vector together: narrowed returns kHalves of them, rounded kInt8s.
//
// Built on these are the sinks, which take a kernel's results in order: put(v), and put_part(v, size) for a shorter
// end. Plain stores them at the given address. Stream stores whole aligned vectors past the caches, whatever the
// alignment of the output. Summed computes the checksum of what it passes on to another sink. Added stores nothing: it
// adds each value, times a weight, to sums in float64.
//
// All of it is in unnamed namespaces: two tiers must never share a function (see floats.h).
#pragma once

#include "crc32c.h"
#include "kernels.h"

#if defined(TW_AVX512)
#include "simd_avx512.h"
#elif defined(TW_AVX2)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace tw {
namespace {

class Plain {
public:
    explicit Plain(void* out) : to_(static_cast<uint8_t*>(out)) {}

    template <class V>
    void put(V v) {
        memcpy(to_, &v, sizeof v);
        to_ += sizeof v;
    }
    template <class V>
    void put_part(V v, size_t size) {
        store_bytes(to_, v, size);
        to_ += size;
    }

private:
    uint8_t* to_;
};

#if defined(TW_AVX512) || defined(TW_AVX2)

// The output begins `late` bytes after a border between vectors. Each aligned vector is therefore joined from the
// last `late` bytes of one result and the first bytes of the next; both ends are stored plainly.
template <class V>
class Stream {
public:
    explicit Stream(void* out)
        : to_(static_cast<uint8_t*>(out)), late_(reinterpret_cast<uintptr_t>(out) % sizeof(V)), joint_(late_) {}
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() {
        finish();
        _mm_sfence();
    }

    static bool takes(const void* out) { return Joint<V>::takes(reinterpret_cast<uintptr_t>(out) % sizeof(V)); }

    void put(V v) {
        if (begun_) {
            stream(to_, joint_(last_, v));
            to_ += sizeof v;
        } else {
            memcpy(to_, &v, sizeof v);
            to_ += sizeof v - late_;
            begun_ = true;
        }
        last_ = v;
    }

    // Ends the output.
    void put_part(V v, size_t size) {
        finish();
        store_bytes(to_, v, size);
    }

private:
    void finish() {
        if (!begun_) return;
        uint8_t bytes[sizeof(V)];
        memcpy(bytes, &last_, sizeof bytes);
        memcpy(to_, bytes + sizeof bytes - late_, late_);
        to_ += late_;
        begun_ = false;
    }

    uint8_t* to_;
    size_t late_;
    Joint<V> joint_;
    V last_{};
    bool begun_ = false;
};

#endif

#if defined(TW_AVX512)

// Everything so far is kept as one vector with the same remainder: multiplied by x^(bits of V) and added to the next.
template <class V, class Sink>
class Summed {
public:
    explicit Summed(Sink& sink) : sink_(sink) {
        constexpr uint32_t kStart[sizeof(V) / 4] = {over_x_to_the(8 * sizeof(V), ~uint32_t{0})};
        memcpy(&sum_, kStart, sizeof sum_);
    }

    void put(V v) {
        sum_ = folded<8 * sizeof(V)>(sum_, v);
        sink_.put(v);
    }
    // Ends the output.
    void put_part(V v, size_t size) {
        sink_.put_part(v, size);
        part_ = v;
        part_size_ = size;
    }
    uint32_t checksum() const {
        const V message[] = {sum_, part_};
        return TW_TIER::crc32c(~uint32_t{0}, message, sizeof sum_ + part_size_);
    }

private:
    Sink& sink_;
    V sum_, part_{};
    size_t part_size_ = 0;
};

// Returns the checksum of what body(sink) puts into a sink.
template <class V, class Sink, class Body>
inline uint32_t sum_of(Sink& sink, Body body) {
    Summed<V, Sink> summed(sink);
    body(summed);
    return summed.checksum();
}

#endif

// Calls body(sink) with the sink for results of type V. To stream, only the last of them may be partial.
template <class V, class Body>
inline void write_to(void* out, bool stream, Body body) {
#if defined(TW_AVX512) || defined(TW_AVX2)
    if constexpr (sizeof(V) >= sizeof(__m128i)) {
        if (stream && Stream<V>::takes(out)) {
            Stream<V> sink(out);
            return body(sink);
        }
    }
#endif
    (void)stream;
    Plain sink(out);
    body(sink);
}

// The same, with the checksum of the whole output of `size` bytes if `crc` is not null. `whole`: only the last result
// may be partial.
template <class V, class Body>
inline void write_to(void* out, size_t size, bool whole, bool stream, uint32_t* crc, Body body) {
#if defined(TW_AVX512)
    if (crc && whole) return write_to<V>(out, stream, [&](auto& sink) { *crc = sum_of<V>(sink, body); });
#endif
    write_to<V>(out, stream && whole, body);
    if (crc) *crc = TW_TIER::crc32c(0, out, size);
}

// The types of results: kLanes, kHalves and kInt8s of them.
template <class T>
using Packed = decltype(narrow(Floats{}, T{}));
using AnyGroup = Floats (*)(size_t);
template <class Half>
using Halves = decltype(narrowed(AnyGroup{}, Half{}));
using Int8s = decltype(rounded(AnyGroup{}));

// The decoded element for a code's value and the scale of its block: their product, rounded to T with saturation.
// Saturating takes up to a third of the time, so it is done only if a scale is large enough to need it: hardly ever.
template <class T, bool kSaturate>
inline Packed<T> decoded(Floats value, Floats scale) {
    const Floats product = mul(value, scale);
    return narrow(kSaturate ? clamp(product, kLargest<T>) : product, T{});
}

// For each result, sum = fl64(sum + fl64(weight * value)).
template <class T>
class Added {
public:
    Added(double* sums, double weight) : sums_(sums), weight_(weight) {}

    void put(Packed<T> v) {
        add_weighted(sums_, widen(v, T{}), weight_);
        sums_ += kLanes;
    }
    void put_part(Packed<T> v, size_t size) {
        T values[kLanes];
        memcpy(values, &v, sizeof v);
        for (size_t i = 0; i < size / sizeof(T); ++i, ++sums_) {
            ::tw::put(sums_, get(sums_) + weight_ * to_float(values[i]));
        }
    }

private:
    double* sums_;
    double weight_;
};

// Group k of the first n values at x, n less than a full vector of results; groups beyond are zeros.
template <class T>
inline Floats load_group(const T* x, size_t n, size_t k) {
    const size_t before = k * kLanes;
    if (n >= before + kLanes) return load(x + before);
    return n > before ? load_part(x + before, n - before) : splat(0);
}

}  // namespace
}  // namespace tw
