// What kernels find wrong with groups: a word of pinned host memory for each device, written by the kernels, read here.
#pragma once

#include "device/types.h"

namespace phalanx {

/// The word of a device, for GroupParams::fault. Allocated once, zero, and never freed.
u64* fault_word(int ordinal);

/// Throws Error invalid_argument if the word is set, and clears it.
void throw_fault(int ordinal);

}  // namespace phalanx
