// Streams of bits, from the lowest bit of the first byte on.
#pragma once

#include "floats.h"

namespace tw {
namespace {

// Nothing is written beyond the room.
class BitWriter {
public:
    BitWriter(uint8_t* out, size_t room) : out_(out), room_(room) {}

    // The lowest `count` bits, at most 56; the others are 0.
    void put(uint64_t bits, unsigned count) {
        held_ |= bits << holds_;
        holds_ += count;
        const unsigned bytes = holds_ / 8;
        flush(bytes);
        held_ >>= 8 * bytes;
        holds_ %= 8;
    }
    // As many zeros, then a one.
    void put_unary(uint64_t zeros) {
        for (; zeros >= 31; zeros -= 31) put(0, 31);
        put(uint64_t{1} << zeros, static_cast<unsigned>(zeros) + 1);
    }
    // The bytes written, the bits behind the last one 0; or 0 if there was no room for them.
    size_t finish() {
        flush(holds_ ? 1 : 0);
        return full_ ? 0 : at_;
    }

private:
    void flush(size_t bytes) {
        if (room_ - at_ >= sizeof held_) {
            memcpy(out_ + at_, &held_, sizeof held_);
        } else if (room_ - at_ >= bytes) {
            memcpy(out_ + at_, &held_, bytes);
        } else {
            full_ = true;
            return;
        }
        at_ += bytes;
    }

    uint8_t* out_;
    size_t room_, at_ = 0;
    uint64_t held_ = 0;
    unsigned holds_ = 0;
    bool full_ = false;
};

// `good` becomes false once bits are read that are not there.
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
    // How many zeros stand before the next one, which is taken, too.
    size_t take_unary() {
        size_t zeros = 0;
        while (good_) {
            const uint64_t ahead = peek(at_);
            const unsigned here = ahead ? lowest_bit(ahead) : kPeeked;
            zeros += here;
            advance(ahead ? here + 1 : here);
            if (ahead) break;
        }
        return zeros;
    }
    // A number in unary, but for its lowest k bits, at most 32, which follow.
    size_t take_rice(unsigned k) {
        const uint64_t ahead = peek(at_);
        const unsigned zeros = ahead ? lowest_bit(ahead) : kPeeked;
        if (zeros + 1 + k <= kPeeked) {
            advance(zeros + 1 + k);
            return static_cast<size_t>(uint64_t{zeros} << k | (ahead >> (zeros + 1) & ((uint64_t{1} << k) - 1)));
        }
        const size_t high = take_unary();
        return high << k | static_cast<size_t>(take(k));
    }
    // Whether all was read, and the bits behind are 0.
    bool finished() const { return good_ && end_ - at_ < 8 && peek(at_) == 0; }

protected:
    static constexpr unsigned kPeeked = 57;

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

    const uint8_t* data_;
    size_t size_, at_ = 0, end_;
    bool good_ = true;
};

}  // namespace
}  // namespace tw
