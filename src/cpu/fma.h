// std::fma is an instruction where the CPU has one, and a slow function elsewhere, with the same bits: functions so
// marked exist once for each.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// A level, not a processor: "arch=haswell" would be taken on Haswells alone.
#define PHALANX_FMA_CLONES [[gnu::target_clones("default", "arch=x86-64-v3")]]
#else
#define PHALANX_FMA_CLONES
#endif
