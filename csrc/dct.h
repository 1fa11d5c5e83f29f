// The two-dimensional DCT-II of chunks, and its inverse, by Lee's recursion (IEEE Trans. ASSP 32, 1984).
//
// tensorwire/kernels/_numpy_dct.py defines the arithmetic and its order. kWide columns are transformed at a time; rows are
// transposed first.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace tw {
namespace {

// kWide columns: one vector, or for the portable tier an array whose loops compilers vectorize.
#if defined(TW_AVX512) || defined(TW_AVX2)

constexpr size_t kWide = kLanes;
using Wide = Floats;

inline Wide wide_of(float v) { return splat(v); }
inline Wide load_wide(const float* p) { return load(p); }
inline Wide load_wide(const float* p, size_t n) { return n < kWide ? load_part(p, n) : load(p); }
inline void store_wide(float* p, Wide v, size_t n) {
    if (n < kWide) {
        store_bytes(reinterpret_cast<uint8_t*>(p), narrow(v, float{}), n * sizeof(float));
    } else {
        store(p, v);
    }
}

#else

constexpr size_t kWide = 8;
struct Wide {
    float at[kWide];
};

template <class Of>
inline Wide each_lane(Of of) {
    Wide made;
    for (size_t i = 0; i < kWide; ++i) made.at[i] = of(i);
    return made;
}
inline Wide wide_of(float v) {
    return each_lane([&](size_t) { return v; });
}
inline Wide load_wide(const float* p) {
    return each_lane([&](size_t i) { return get(p + i); });
}
inline Wide load_wide(const float* p, size_t n) {
    return n < kWide ? each_lane([&](size_t i) { return i < n ? get(p + i) : 0.0f; }) : load_wide(p);
}
inline void store_wide(float* p, Wide v, size_t n) { memcpy(p, v.at, (n < kWide ? n : kWide) * sizeof(float)); }
inline Wide add(const Wide& a, const Wide& b) {
    return each_lane([&](size_t i) { return a.at[i] + b.at[i]; });
}
inline Wide sub(const Wide& a, const Wide& b) {
    return each_lane([&](size_t i) { return a.at[i] - b.at[i]; });
}
inline Wide mul(const Wide& a, const Wide& b) {
    return each_lane([&](size_t i) { return a.at[i] * b.at[i]; });
}
inline void interleave(Wide a, Wide b, Wide& low, Wide& high) {
    for (size_t i = 0; i < kWide / 2; ++i) {
        low.at[2 * i] = a.at[i], low.at[2 * i + 1] = b.at[i];
        high.at[2 * i] = a.at[kWide / 2 + i], high.at[2 * i + 1] = b.at[kWide / 2 + i];
    }
}

#endif

// Transposes a square of vectors: each round interleaves the upper half of the rows with the lower half.
inline void transpose(Wide (&rows)[kWide]) {
    for (size_t round = 1; round < kWide; round *= 2) {
        Wide next[kWide];
        for (size_t i = 0; i < kWide / 2; ++i) interleave(rows[i], rows[i + kWide / 2], next[2 * i], next[2 * i + 1]);
        for (size_t i = 0; i < kWide; ++i) rows[i] = next[i];
    }
}

// The one-dimensional transform of columns, without the factors that make it orthonormal.
class Dct {
public:
    explicit Dct(const float* tables) : tables_(tables) {}

    const float* cosines(size_t n) const { return tables_ + (n - 1) * n * (2 * n - 1) / 6; }

    // In place. `spare`: room for as many.
    void forward(Wide* x, size_t n, Wide* spare) const {
        switch (n) {
            case 1: return;
            case 2: return forward_of<2>(x);
            case 4: return forward_of<4>(x);
            case 8: return forward_of<8>(x);
            case 16: return forward_of<16>(x);
            default: break;
        }
        if (n % 4 == 0) return forward_by_quarters(x, n, spare);
        if (n % 2) return by_cosines(x, n, n, 1, spare);
        const size_t half = n / 2;
        const float* factors = secants(n);
        for (size_t i = 0; i < half; ++i) {
            const Wide a = x[i], b = x[n - 1 - i];
            spare[i] = add(a, b);
            spare[half + i] = mul(sub(a, b), wide_of(get(factors + i)));
        }
        forward(spare, half, x);
        forward(spare + half, half, x);
        for (size_t i = 0; i < half; ++i) x[2 * i] = spare[i];
        for (size_t i = 0; i + 1 < half; ++i) x[2 * i + 1] = add(spare[half + i], spare[half + i + 1]);
        x[n - 1] = spare[n - 1];
    }

    void inverse(Wide* x, size_t n, Wide* spare) const {
        switch (n) {
            case 1: return;
            case 2: return inverse_of<2>(x);
            case 4: return inverse_of<4>(x);
            case 8: return inverse_of<8>(x);
            case 16: return inverse_of<16>(x);
            default: break;
        }
        if (n % 4 == 0) return inverse_by_quarters(x, n, spare);
        if (n % 2) return by_cosines(x, n, 1, n, spare);
        const size_t half = n / 2;
        const float* factors = secants(n);
        for (size_t i = 0; i < half; ++i) spare[i] = x[2 * i];
        spare[half] = x[1];
        for (size_t i = 1; i < half; ++i) spare[half + i] = add(x[2 * i + 1], x[2 * i - 1]);
        inverse(spare, half, x);
        inverse(spare + half, half, x);
        for (size_t i = 0; i < half; ++i) {
            const Wide even = spare[i], odd = mul(spare[half + i], wide_of(get(factors + i)));
            x[i] = add(even, odd);
            x[n - 1 - i] = sub(even, odd);
        }
    }

private:
    const float* secants(size_t n) const { return tables_ + kCosines + n / 2 * (n / 2 - 1) / 2; }

    template <size_t kN>
    void forward_of(Wide* x) const {
        constexpr size_t kHalf = kN / 2;
        const float* factors = secants(kN);
        Wide sums[kHalf], differences[kHalf];
        for (size_t i = 0; i < kHalf; ++i) {
            sums[i] = add(x[i], x[kN - 1 - i]);
            differences[i] = mul(sub(x[i], x[kN - 1 - i]), wide_of(get(factors + i)));
        }
        if constexpr (kHalf > 1) {
            forward_of<kHalf>(sums);
            forward_of<kHalf>(differences);
        }
        for (size_t i = 0; i < kHalf; ++i) {
            x[2 * i] = sums[i];
            x[2 * i + 1] = i + 1 < kHalf ? add(differences[i], differences[i + 1]) : differences[i];
        }
    }

    template <size_t kN>
    void inverse_of(Wide* x) const {
        constexpr size_t kHalf = kN / 2;
        const float* factors = secants(kN);
        Wide even[kHalf], odd[kHalf];
        for (size_t i = 0; i < kHalf; ++i) {
            even[i] = x[2 * i];
            odd[i] = i ? add(x[2 * i + 1], x[2 * i - 1]) : x[1];
        }
        if constexpr (kHalf > 1) {
            inverse_of<kHalf>(even);
            inverse_of<kHalf>(odd);
        }
        for (size_t i = 0; i < kHalf; ++i) {
            const Wide product = mul(odd[i], wide_of(get(factors + i)));
            x[i] = add(even[i], product);
            x[kN - 1 - i] = sub(even[i], product);
        }
    }

    // Two steps of the recursion in one, so that intermediate results are stored half as often.
    void forward_by_quarters(Wide* x, size_t n, Wide* spare) const {
        const size_t half = n / 2, q = n / 4;
        const float *outer = secants(n), *inner = secants(half);
        Wide *ee = spare, *eo = ee + q, *oe = eo + q, *oo = oe + q;
        for (size_t i = 0; i < q; ++i) {
            const size_t j = half - 1 - i;
            const Wide a = x[i], b = x[j], c = x[half + i], d = x[n - 1 - i], factor = wide_of(get(inner + i));
            const Wide even = add(a, d), even_back = add(b, c);
            const Wide odd = mul(sub(a, d), wide_of(get(outer + i)));
            const Wide odd_back = mul(sub(b, c), wide_of(get(outer + j)));
            ee[i] = add(even, even_back);
            eo[i] = mul(sub(even, even_back), factor);
            oe[i] = add(odd, odd_back);
            oo[i] = mul(sub(odd, odd_back), factor);
        }
        for (size_t part = 0; part < n; part += q) forward(spare + part, q, x + part);
        for (size_t i = 0; i < q; ++i) {
            const bool last = i + 1 == q;
            const Wide odd = last ? oo[i] : add(oo[i], oo[i + 1]);
            x[4 * i] = ee[i];
            x[4 * i + 1] = add(oe[i], odd);
            x[4 * i + 2] = last ? eo[i] : add(eo[i], eo[i + 1]);
            x[4 * i + 3] = last ? odd : add(odd, oe[i + 1]);
        }
    }

    void inverse_by_quarters(Wide* x, size_t n, Wide* spare) const {
        const size_t half = n / 2, q = n / 4;
        const float *outer = secants(n), *inner = secants(half);
        Wide *ee = spare, *eo = ee + q, *oe = eo + q, *oo = oe + q;
        Wide before = add(x[1], x[3]);
        ee[0] = x[0];
        eo[0] = x[2];
        oe[0] = x[1];
        oo[0] = before;
        for (size_t i = 1; i < q; ++i) {
            const Wide odd = add(x[4 * i + 1], x[4 * i + 3]);
            ee[i] = x[4 * i];
            eo[i] = add(x[4 * i - 2], x[4 * i + 2]);
            oe[i] = add(x[4 * i - 1], x[4 * i + 1]);
            oo[i] = add(before, odd);
            before = odd;
        }
        for (size_t part = 0; part < n; part += q) inverse(spare + part, q, x + part);
        for (size_t i = 0; i < q; ++i) {
            const size_t j = half - 1 - i;
            const Wide factor = wide_of(get(inner + i));
            const Wide even = mul(eo[i], factor), odd = mul(oo[i], factor);
            const Wide even_front = add(ee[i], even), even_back = sub(ee[i], even);
            const Wide odd_front = mul(add(oe[i], odd), wide_of(get(outer + i)));
            const Wide odd_back = mul(sub(oe[i], odd), wide_of(get(outer + j)));
            x[i] = add(even_front, odd_front);
            x[n - 1 - i] = sub(even_front, odd_front);
            x[j] = add(even_back, odd_back);
            x[half + i] = sub(even_back, odd_back);
        }
    }

    // For odd lengths: result i is the sum of x[j] * cosines[i * by_row + j * by_sum] over ascending j.
    void by_cosines(Wide* x, size_t n, size_t by_row, size_t by_sum, Wide* spare) const {
        const float* table = cosines(n);
        for (size_t i = 0; i < n; ++i) {
            Wide sum = wide_of(0.0f);
            for (size_t j = 0; j < n; ++j) sum = add(sum, mul(wide_of(get(table + i * by_row + j * by_sum)), x[j]));
            spare[i] = sum;
        }
        for (size_t i = 0; i < n; ++i) x[i] = spare[i];
    }

    const float* tables_;
};

}  // namespace
}  // namespace tw
