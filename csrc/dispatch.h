// The instruction sets of this build and machine, and the one in use.
#pragma once

#include "kernels.h"

namespace tw {

// Tiers this machine can run, best first, up to a null pointer. Not empty: "portable" always runs.
const Kernels* const* supported();

// The table in use; the best supported one until `use` says otherwise.
const Kernels& kernels();

// Switch to a tier by name; false, and no change, if it is unknown or not supported here.
bool use(const char* isa);

}  // namespace tw
