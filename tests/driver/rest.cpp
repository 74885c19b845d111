// Functions of the driver of which it is enough that they are there. driver.cpp overrides some.
#include "cuda/driver.h"

using namespace phalanx::cuda;

#define PRETEND(name, symbol, arguments)                                    \
  extern "C" [[gnu::weak]] CUresult pretended_##name arguments asm(symbol); \
  extern "C" CUresult pretended_##name arguments { return kSuccess; }
PHALANX_DRIVER_FUNCTIONS(PRETEND)
