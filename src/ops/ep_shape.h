// How the ranks' operations are divided: experts among ranks, work among CTAs.
#pragma once

#include <vector>

#include "device/ep/layout.h"
#include "phalanx/ep.h"

namespace phalanx {

/// The first expert of each rank, then num_experts.
std::vector<int> first_experts(const ExpertParallelConfig& config, int num_ranks);

/// Throws Error invalid_argument if no kernel of so many SMs can number the choices of max_tokens.
EpShape make_shape(const ExpertParallelConfig& config, int num_ranks, DeviceType type);

}  // namespace phalanx
