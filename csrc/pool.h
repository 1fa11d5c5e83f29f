// A small pool of helper threads that share the work of the calling one.
//
// Off (one thread) by default. The caller takes part and never waits for a helper that is not running: it waits only
// for chunks that were taken. On a busy machine, where a barrier would stall for a scheduler slice, this stays near the
// speed of one thread. The pool survives fork: a child starts its own.
#pragma once

#include <cstddef>

namespace tw {

// Threads per call, the caller included; at most the processors that this process may use take part.
int threads();
void set_threads(int count);

// Calls work(context, begin, size) for parts that cover [0, n) elements, each beginning at a multiple of `granule`.
// Below 2 MB of float32 there is one part: waking a helper takes as long.
void share(size_t n, size_t granule, void (*work)(void* context, size_t begin, size_t size), void* context);

}  // namespace tw
