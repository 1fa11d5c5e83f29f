// Chooses the tier to run: asks once what the processor has and which registers the operating system saves.
#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(_M_X64)
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tw {
namespace {

constexpr int kMaxTiers = 4;

#if defined(__x86_64__) || defined(_M_X64)

struct Registers {
    uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf) {
    Registers r{};
#if defined(_MSC_VER)
    int v[4];
    __cpuidex(v, static_cast<int>(leaf), 0);
    r = {uint32_t(v[0]), uint32_t(v[1]), uint32_t(v[2]), uint32_t(v[3])};
#else
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

// The register states that the operating system saves on a context switch.
uint64_t saved_states() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
#endif
}

constexpr bool has(uint64_t flags, uint64_t wanted) { return (flags & wanted) == wanted; }
constexpr uint32_t bit(int n) { return uint32_t{1} << n; }

// The flags are those that CMakeLists.txt compiles the tiers with.
struct Cpu {
    bool avx2 = false;
    bool avx512 = false;

    Cpu() {
        if (cpuid(0).a < 7) return;  // another processor
        const Registers one = cpuid(1), seven = cpuid(7);
        constexpr uint32_t kPclmul = bit(1), kFma = bit(12), kSse42 = bit(20), kPopcnt = bit(23), kOsxsave = bit(27),
                           kAvx = bit(28), kF16c = bit(29);
        constexpr uint32_t kBmi1 = bit(3), kAvx2 = bit(5), kBmi2 = bit(8);
        constexpr uint32_t kF = bit(16), kDq = bit(17), kBw = bit(30), kVl = bit(31);
        constexpr uint32_t kVbmi = bit(1), kVpclmul = bit(10);
        constexpr uint64_t kYmmSaved = 0x6, kZmmSaved = 0xE6;
        if (!has(one.c, kPclmul | kFma | kSse42 | kPopcnt | kOsxsave | kAvx | kF16c)) return;  // another processor
        const uint64_t saved = saved_states();
        avx2 = has(seven.b, kBmi1 | kAvx2 | kBmi2) && has(saved, kYmmSaved);  // another processor
        avx512 = avx2 && has(seven.b, kF | kDq | kBw | kVl) && has(seven.c, kVbmi | kVpclmul) &&  // another processor
                 has(saved, kZmmSaved);  // another processor
    }
};

#endif

#define TW_FILL(tier)         \
    [](Kernels& k) {          \
        k.isa = #tier;        \
        tier::add_crc32c(k);  \
        tier::add_cast(k);    \
        tier::add_absmax(k);  \
        tier::add_fourbit(k); \
        tier::add_int8(k);    \
        tier::add_linear(k);  \
        tier::add_planes(k);  \
        tier::add_huffman(k); \
        tier::add_sparse(k);  \
        tier::add_values(k);  \
        tier::add_changes(k); \
    }

struct Tiers {
    Kernels table[kMaxTiers] = {};
    const Kernels* list[kMaxTiers + 1] = {};
    int count = 0;

    Tiers() {
#if defined(__x86_64__) || defined(_M_X64)
        const Cpu cpu;
        if (cpu.avx512) add(TW_FILL(avx512));  // another processor
        if (cpu.avx2) add(TW_FILL(avx2));  // another processor
#elif defined(__aarch64__) && defined(__linux__)
        if (getauxval(AT_HWCAP) & HWCAP_CRC32) add(TW_FILL(neon));
#elif defined(__aarch64__) && defined(__APPLE__)
        add(TW_FILL(neon));  // every Apple core has the CRC32 instructions
#endif
        add(TW_FILL(portable));
    }

    template <class Fill>
    void add(Fill fill) {
        fill(table[count]);
        list[count] = &table[count];
        ++count;
    }
};

const Tiers& tiers() {
    static const Tiers instance;
    return instance;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels* const* supported() { return tiers().list; }

const Kernels& kernels() {
    const Kernels* k = in_use.load(std::memory_order_acquire);
    return k ? *k : *tiers().list[0];
}

bool use(const char* isa) {
    for (const Kernels* const* k = supported(); *k; ++k) {
        if (strcmp((*k)->isa, isa) != 0) continue;
        in_use.store(*k, std::memory_order_release);
        return true;
    }
    return false;
}

}  // namespace tw
