// One vocabulary of vector operations over every instruction set, so that a kernel's loop is written once.
//
// The tier being compiled (TW_AVX512, TW_AVX2, or neither) chooses the file. Each defines kLanes; Floats, Words and
// Mask; load, store (with their *_part forms for the first n < kLanes elements) for float, Float16 and Bfloat16,
// which convert on the way; a little arithmetic; int8 loads and rounded stores; and stream_line, a 64-byte store past
// the caches. On top of it stand two things that every kernel needs: absmax_of and Out.
//
// All of it is in unnamed namespaces: two tiers must never share a function (see floats.h).
#pragma once

#if defined(TW_AVX512)
#include "simd_avx512.h"
#elif defined(TW_AVX2)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace tw {
namespace {

// The largest magnitude as float bits. The order of magnitudes is that of their bits as integers, with infinity and
// then NaN above every finite value: kInfinityBits or more means "not all finite".
template <class T>
inline uint32_t absmax_of(const T* x, size_t n) {
    Words largest = no_words();
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) largest = max(largest, magnitude(load(x + i)));
    if (i < n) largest = max(largest, magnitude(load_part(x + i, n - i)));
    return max_lane(largest);
}

// bitsandbytes' guard against an all-zero block: 1 / 1e-38 is still finite.
inline float inverse_of(uint32_t absmax_bits) {
    const float absmax = float_of(absmax_bits);
    return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
}

// The most elements that a kernel produces in one go.
constexpr size_t kPiece = 4096;

// Where results go: straight to memory, or, when streaming, into a tile in the first-level cache that leaves in whole
// cache lines past the others, however the output is aligned.
template <class T>
class Out {
public:
    Out(T* out, bool stream) : to_(reinterpret_cast<uint8_t*>(out)), stream_(stream) {}
    Out(const Out&) = delete;
    Out& operator=(const Out&) = delete;
    ~Out() {
        if (!stream_) return;
        drain();
        memcpy(to_, tile_, filled_);
        stream_fence();
    }

    // Room for the next n <= kPiece elements, all of which are written before the next call.
    T* room(size_t n) {
        const size_t size = n * sizeof(T);
        if (!stream_) {
            uint8_t* at = to_;
            to_ += size;
            return reinterpret_cast<T*>(at);
        }
        if (filled_ + size > sizeof tile_) drain();
        uint8_t* at = tile_ + filled_;
        filled_ += size;
        return reinterpret_cast<T*>(at);
    }

private:
    void drain() {
        const size_t head = min_size((0 - reinterpret_cast<uintptr_t>(to_)) % kLine, filled_);
        memcpy(to_, tile_, head);
        to_ += head;
        size_t done = head;
        for (; done + kLine <= filled_; done += kLine, to_ += kLine) stream_line(to_, tile_ + done);
        memmove(tile_, tile_ + done, filled_ - done);
        filled_ -= done;
    }

    static constexpr size_t kLine = 64;

    uint8_t* to_;
    bool stream_;
    size_t filled_ = 0;
    alignas(64) uint8_t tile_[kPiece * sizeof(T) + kLine];
};

}  // namespace
}  // namespace tw
