// The code tables of the quantized formats and what the encoders derive from them, all at compile time.
//
// The values are those of bitsandbytes 0.50.2 bit for bit; a format's table never changes. Everything derived is one
// float32 operation from them, rounded as IEEE 754 says: FLT_EVAL_METHOD must be 0.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>

static_assert(FLT_EVAL_METHOD == 0, "excess precision would move the thresholds");

namespace tw {
namespace {

// A value per code, relative to the block's absmax.
struct alignas(64) Code16 {
    float value[16];
};

constexpr Code16 kNf4Code = {{-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f,
                              0.0f, 0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f,
                              0.72295684f, 1.0f}};

// Code 8, "minus zero", is +0.0.
constexpr Code16 kFp4Code = {{0.0f, 0.0052083335f, 0.6666667f, 1.0f, 0.33333334f, 0.5f, 0.16666667f, 0.25f, 0.0f,
                              -0.0052083335f, -0.6666667f, -1.0f, -0.33333334f, -0.5f, -0.16666667f, -0.25f}};

// NF4's code is the number of these that lie strictly below y.
struct Nf4Thresholds {
    float t[15] = {};
    constexpr Nf4Thresholds() {
        for (int k = 0; k < 15; ++k) t[k] = (kNf4Code.value[k] + kNf4Code.value[k + 1]) * 0.5f;
    }
};
constexpr Nf4Thresholds kNf4Thresholds;

// FP4's level is the number of these that lie strictly below |y|: the literals of bitsandbytes' CUDA encoder, up to
// 14 ulp from the midpoints of the table.
constexpr float kFp4Thresholds[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                     0.4166667f,  0.583333f,  0.8333333f};

// Levels 0 to 7 are codes 0 1 6 7 4 5 2 3: bit 2 is flipped where bit 1 is set.
constexpr uint32_t fp4_code_of_level(uint32_t level) { return level ^ ((level & 2) << 1); }

// The positive half of the int8 dynamic map by level: 0, then decade i of seven holds levels 2^i to 2^(i+1) - 1,
// then 1. Code 127 + level is +kInt8Level[level]; code 127 - level is its negative, which ends at level 127: there is
// no -1.
constexpr float kInt8Level[129] = {0.0f,           5.5000004e-07f, 3.2500002e-06f,
                                   7.75e-06f,      2.1249998e-05f, 4.375e-05f,
                                   6.625e-05f,     8.875e-05f,     0.00015625001f,
                                   0.00026875004f, 0.00038125002f, 0.00049375003f,
                                   0.0006062501f,  0.00071875006f, 0.00083125f,
                                   0.0009437501f,  0.0012812499f,  0.00184375f,
                                   0.00240625f,    0.00296875f,    0.0035312497f,
                                   0.00409375f,    0.0046562497f,  0.0052187503f,
                                   0.00578125f,    0.00634375f,    0.00690625f,
                                   0.00746875f,    0.00803125f,    0.00859375f,
                                   0.009156249f,   0.00971875f,    0.01140625f,
                                   0.01421875f,    0.01703125f,    0.019843752f,
                                   0.02265625f,    0.02546875f,    0.028281251f,
                                   0.03109375f,    0.03390625f,    0.036718752f,
                                   0.03953125f,    0.042343747f,   0.04515625f,
                                   0.04796875f,    0.05078125f,    0.05359375f,
                                   0.05640625f,    0.059218753f,   0.06203125f,
                                   0.06484375f,    0.067656256f,   0.070468746f,
                                   0.07328125f,    0.07609375f,    0.07890625f,
                                   0.08171876f,    0.08453125f,    0.08734375f,
                                   0.09015625f,    0.092968754f,   0.09578126f,
                                   0.09859375f,    0.107031256f,   0.12109375f,
                                   0.13515624f,    0.14921875f,    0.16328125f,
                                   0.17734376f,    0.19140625f,    0.20546874f,
                                   0.21953125f,    0.23359375f,    0.24765624f,
                                   0.26171875f,    0.27578127f,    0.28984374f,
                                   0.30390626f,    0.31796873f,    0.33203125f,
                                   0.34609374f,    0.36015624f,    0.37421876f,
                                   0.38828123f,    0.40234375f,    0.41640624f,
                                   0.43046874f,    0.44453126f,    0.45859373f,
                                   0.47265625f,    0.4867187f,     0.50078124f,
                                   0.5148437f,     0.5289062f,     0.54296875f,
                                   0.5570313f,     0.5710938f,     0.58515626f,
                                   0.5992187f,     0.61328125f,    0.6273438f,
                                   0.6414063f,     0.65546876f,    0.6695312f,
                                   0.68359375f,    0.6976563f,     0.7117188f,
                                   0.72578126f,    0.7398437f,     0.75390625f,
                                   0.7679688f,     0.78203124f,    0.79609376f,
                                   0.8101562f,     0.82421875f,    0.8382813f,
                                   0.85234374f,    0.86640626f,    0.8804687f,
                                   0.89453125f,    0.9085938f,     0.92265624f,
                                   0.93671876f,    0.9507812f,     0.96484375f,
                                   0.9789063f,     0.99296874f,    1.0f};

struct alignas(64) Int8Code {
    float value[256] = {};
    constexpr Int8Code() {
        for (int level = 0; level < 128; ++level) {
            value[127 - level] = -kInt8Level[level];
            value[127 + level] = kInt8Level[level];
        }
        value[127] = 0.0f;
        value[255] = kInt8Level[128];
    }
};
constexpr Int8Code kInt8Code;

// |y| strictly above above[level] is beyond `level`. The midpoint itself belongs to the even one of the two codes,
// 127 +- level for odd levels; for even levels the bound is therefore the float before the midpoint, for which
// T * (1 - 2^-24) is correctly rounded.
struct Int8Bounds {
    float above[128] = {};
    constexpr Int8Bounds() {
        for (int level = 0; level < 128; ++level) {
            const float middle = (kInt8Level[level] + kInt8Level[level + 1]) * 0.5f;
            above[level] = level % 2 ? middle : middle * 0x1.fffffep-1f;
        }
    }
};
constexpr Int8Bounds kInt8Bounds;

}  // namespace
}  // namespace tw
