// Symbols are hidden by default; PHALANX_API marks the public ones.
#pragma once

#if defined(_WIN32)
#error "phalanx supports Linux only"
#else
#define PHALANX_API __attribute__((visibility("default")))
#endif
