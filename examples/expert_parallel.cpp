// Expert parallelism from C++. Without arguments, ranks are threads on the CPU. With "RANK SIZE FILE", each is a
// process with its GPU, and they meet over NCCL: rank 0 leaves the id in FILE.
//   for r in 0 1; do ./expert_parallel $r 2 /tmp/nccl_id & done; wait
#include <phalanx/phalanx.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"

namespace {

using memory::Vector;

constexpr int kHidden = 64, kExperts = 8, kTopk = 2, kTokens = 16;
const phalanx::ExpertParallelConfig kConfig{
    .hidden = kHidden, .num_experts = kExperts, .topk = kTopk, .max_tokens = kTokens, .dtype = phalanx::DType::bf16};

phalanx::Tensor vector_of(Vector<int>& v) {
  return {v.data(), phalanx::DType::int32, memory::device, 1, {static_cast<std::int64_t>(v.size())}, {1}};
}
phalanx::Tensor matrix_of(Vector<std::uint16_t>& v) {
  return phalanx::row_major(v.data(), phalanx::DType::bf16, std::int64_t(v.size()) / kHidden, kHidden, memory::device);
}

/// Every token goes to two experts, which leave it as it is; weighted by 1 each it comes back doubled.
void dispatch_and_combine(phalanx::Group group) {
  phalanx::ExpertParallel ep(group, kConfig);
  constexpr std::uint16_t kOne = 0x3f80, kTwo = 0x4000;  // BF16
  Vector<std::uint16_t> x(kTokens * kHidden, kOne), out(x.size()), rows(ep.max_rows() * kHidden);
  Vector<int> experts, handle(ep.handle_words()), offsets(ep.num_local_experts() + 1);
  for (int i = 0; i < kTokens * kTopk; ++i) experts.push_back((i * 3 + group.rank()) % kExperts);

  phalanx::EpDispatch dispatch;
  dispatch.x = matrix_of(x);
  dispatch.topk_idx = phalanx::row_major(experts.data(), phalanx::DType::int32, kTokens, kTopk, memory::device);
  dispatch.handle = vector_of(handle);
  dispatch.offsets = vector_of(offsets);
  dispatch.rows = matrix_of(rows);
  ep.dispatch(dispatch);

  phalanx::EpCombine combine;
  combine.rows = dispatch.rows;
  combine.handle = dispatch.handle;
  combine.out = matrix_of(out);
  ep.combine(combine);
  memory::synchronize();
  ep.check();
  for (const std::uint16_t value : out)
    if (value != kTwo) std::exit(1);
  std::printf("rank %d of %d: %d rows for %d experts, all came back\n", group.rank(), group.size(), offsets.back(),
              ep.num_local_experts());
  group.barrier();  // peers may still write to this rank's memory
}

/// The same between processes with a GPU each.
void over_nccl(int rank, int size, const std::string& path) {
  if (rank == 0) {
    std::ofstream(path + ".part", std::ios::binary) << phalanx::Group::nccl_id();
    std::filesystem::rename(path + ".part", path);
  }
  while (!std::filesystem::exists(path)) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  std::ifstream file(path, std::ios::binary);
  const std::string id(std::istreambuf_iterator<char>(file), {});
  phalanx::Group group = phalanx::Group::nccl(id, rank, size, {phalanx::DeviceType::cuda, rank});
  memory::use_gpu(rank);
  dispatch_and_combine(group);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 4) {
      over_nccl(std::atoi(argv[1]), std::atoi(argv[2]), argv[3]);
      return 0;
    }
    std::vector<std::thread> threads;
    for (const phalanx::Group& group : phalanx::Group::local(std::vector<phalanx::Device>(4)))
      threads.emplace_back(dispatch_and_combine, group);
    for (std::thread& thread : threads) thread.join();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
