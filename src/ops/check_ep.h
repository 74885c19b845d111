// Checks of expert parallelism's arguments; see check.h.
#pragma once

#include "phalanx/ep.h"

namespace phalanx {

void check_ep_config(const ExpertParallelConfig& config, int num_ranks);

void check_ep_handle(const char* op, const Tensor& handle, const Device& device, std::int64_t words);

/// `copy`: tokens are moved, not only their routing exchanged.
void check_ep_dispatch(const EpDispatch& args, const ExpertParallelConfig& config, const Device& device,
                       std::int64_t handle_words, int num_local_experts, bool copy);

void check_ep_combine(const EpCombine& args, const ExpertParallelConfig& config, const Device& device,
                      std::int64_t handle_words);

}  // namespace phalanx
