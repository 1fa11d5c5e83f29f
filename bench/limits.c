// Bare loops over memory: `reads` lines in, `writes` lines out past the caches, and no work between them.
//
// What a kernel of the same ratio can at most reach. Lines are 64 bytes; `out` is aligned to them.
// Written values come from what was read: some processors store zeros at twice the speed.
#include <immintrin.h>
#include <stddef.h>

static inline __attribute__((always_inline)) void loop(const char* in, char* out, size_t steps, size_t ahead, int reads,
                                                       int writes) {
    __m512i seen = _mm512_loadu_si512(in);
    for (size_t i = 0; i < steps; ++i) {
        for (int r = 0; r < reads; ++r, in += 64) {
            if (ahead) _mm_prefetch(in + ahead, _MM_HINT_T0);
            seen = _mm512_add_epi32(seen, _mm512_loadu_si512(in));
        }
        for (int w = 0; w < writes; ++w, out += 64) _mm512_stream_si512((void*)out, seen);
    }
    _mm_sfence();
    __asm__ volatile("" ::"v"(seen));
}

#define LOOP(reads, writes)                                                               \
    void loop_##reads##_##writes(const char* in, char* out, size_t steps, size_t ahead) { \
        loop(in, out, steps, ahead, reads, writes);                                       \
    }

LOOP(1, 0)
LOOP(0, 1)
LOOP(1, 1)
LOOP(2, 1)
LOOP(1, 2)
LOOP(4, 1)
LOOP(1, 4)
LOOP(7, 1)
LOOP(1, 7)
