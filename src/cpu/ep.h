// Expert parallelism between threads: the protocol of device/ep, one thread a rank instead of CTAs and warps.
#pragma once

#include <atomic>

#include "device/ep/params.h"

namespace phalanx::cpu {

/// Both return when the work is done or has failed; `c.status` says which.
void ep_dispatch(const EpDispatchParams& p);
void ep_combine(const EpCombineParams& p);

/// For tests: the device code, simulated, in the place of the functions above, and so many CTAs as on a GPU.
struct EpStandIn {
  int num_ctas, num_senders;
  void (*dispatch)(const EpDispatchParams&);
  void (*combine)(const EpCombineParams&);
};
extern std::atomic<const EpStandIn*> ep_stand_in;

/// For tests: called before every put, signal and wait, to delay a rank there.
extern std::atomic<void (*)(int rank)> ep_delay;

}  // namespace phalanx::cpu
