// Joins the codes of several bytes for huffman.cpp, one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tw {
namespace {

struct Code {
    uint16_t bits;
    uint8_t length;
};

// Bytes that are encoded at once, and the most groups that they give.
constexpr size_t kAtOnce = 5, kGroups = 1;

// Joined codes, the first one lowest, and the number of their bits: at most 56, which leaves room for 7 bits before
// them in a word.
struct Groups {
    uint64_t codes[kGroups];
    uint64_t lengths[kGroups];
};

class Codes {
public:
    explicit Codes(const Code* codes) : codes_(codes) {}

    // Returns the number of groups.
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
