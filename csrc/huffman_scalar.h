// Codes of several bytes put together as huffman.cpp takes them, one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tw {
namespace {

struct Code {
    uint16_t bits;
    uint8_t length;
};

// Bytes that are encoded at once, in so many groups at most.
constexpr size_t kAtOnce = 5, kGroups = 1;

// Codes that stand one behind the other, the first lowest, and their bits: at most 56, which leaves a word room for 7
// before them.
struct Groups {
    uint64_t codes[kGroups];
    uint64_t lengths[kGroups];
};

class Codes {
public:
    explicit Codes(const Code* codes) : codes_(codes) {}

    // How many groups there are.
    size_t encode(const uint8_t* x, Groups& groups) const {
        uint64_t codes = 0, length = 0;
        for (size_t i = 0; i < kAtOnce; ++i) {
            codes |= uint64_t{codes_[x[i]].bits} << length;
            length += codes_[x[i]].length;
        }
        groups.codes[0] = codes;
        groups.lengths[0] = length;
        return kGroups;
    }

private:
    const Code* codes_;
};

}  // namespace
}  // namespace tw
