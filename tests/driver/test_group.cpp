// Groups of processes over NCCL, both pretended: threads stand for processes.
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "ep/group.h"
#include "phalanx/ep.h"
#include "tests/driver/driver.h"
#include "tests/driver/nccl.h"
#include "tests/testing.h"

namespace phalanx::test {
namespace {

constexpr GroupOptions kPatient{.timeout = 30}, kHasty{.timeout = 0.1};
constexpr ExpertParallelConfig kConfig{.hidden = 128, .num_experts = 4, .topk = 2, .max_tokens = 8};

Device device_of(int rank) { return {DeviceType::cuda, rank % kHoppers}; }

/// f(rank, its group) on every rank.
void on_group(int size, const GroupOptions& options, const std::function<void(int, Group&)>& f) {
  const std::string id = Group::nccl_id();
  on_ranks(size, [&](int rank) {
    Group group = Group::nccl(id, rank, size, device_of(rank), options);
    f(rank, group);
  });
}

TEST(GroupOverNccl, RanksGatherWhatEachHas) {
  constexpr int kRanks = 3;
  const int joined = pretended_nccl().joined, aborted = pretended_nccl().aborted;
  const auto bytes = [](int rank, int round) { return std::string(100 * ((rank + round) % kRanks), char('a' + rank)); };
  on_group(kRanks, kPatient, [&](int rank, Group& group) {
    EXPECT_EQ(group.rank(), rank);
    EXPECT_EQ(group.size(), kRanks);
    EXPECT_EQ(group.device(), device_of(rank));
    for (int round = 0; round < 5; ++round) {
      const auto all = group.state()->all_gather(bytes(rank, round), "a test");
      for (int r = 0; r < kRanks; ++r) EXPECT_EQ(all[r], bytes(r, round));
      group.barrier();
    }
  });
  EXPECT_EQ(pretended_nccl().joined - joined, kRanks);
  EXPECT_EQ(pretended_nccl().aborted - aborted, kRanks) << "a group's own communicators go with it";
}

TEST(GroupOverNccl, TheCallersCommunicatorStaysTheCallers) {
  constexpr int kRanks = 2;
  const int aborted = pretended_nccl().aborted;
  const std::string id = Group::nccl_id();
  on_ranks(kRanks, [&](int rank) {
    void* comm = pretended_comm(id, rank, kRanks, 1 - rank);
    {
      Group group = Group::nccl(comm, kPatient);
      EXPECT_EQ(group.rank(), rank);
      EXPECT_EQ(group.size(), kRanks);
      EXPECT_EQ(group.device(), (Device{DeviceType::cuda, 1 - rank}));
      group.barrier();
    }
    destroy_pretended_comm(comm);
  });
  EXPECT_EQ(pretended_nccl().aborted, aborted);
}

TEST(GroupOverNccl, WrongArgumentsAreNamedBeforeAnybodyWaits) {
  const int joined = pretended_nccl().joined;
  const std::string id = Group::nccl_id();
  const auto refused = [&](ErrorCode code, const std::vector<std::string>& words, const std::string& an_id, int rank,
                           int size, Device device = device_of(0), const GroupOptions& options = kHasty) {
    expect_error(code, words, [&] { Group::nccl(an_id, rank, size, device, options); });
  };
  refused(ErrorCode::invalid_argument, {"Group::nccl", "rank is -1", "0 to 1"}, id, -1, 2);
  refused(ErrorCode::invalid_argument, {"Group::nccl", "rank is 2", "0 to 1"}, id, 2, 2);
  refused(ErrorCode::invalid_argument, {"Group::nccl", "0 ranks", "expected 1 to"}, id, 0, 0);
  refused(ErrorCode::invalid_argument, {"Group::nccl", "100000 ranks", "expected 1 to"}, id, 0, 100000);
  refused(ErrorCode::invalid_argument, {"id has 5 bytes", "128"}, "short", 0, 2);
  refused(ErrorCode::invalid_device, {"device is the CPU", "Group::local"}, id, 0, 2, Device{});
  refused(ErrorCode::invalid_device, {"cuda:3", "there are 3"}, id, 0, 2, {DeviceType::cuda, kDevices});
  refused(ErrorCode::unsupported, {"cuda:2", "Pretended L4"}, id, 0, 2, {DeviceType::cuda, kHoppers});
  refused(ErrorCode::invalid_argument, {"options.timeout is 0"}, id, 0, 2, device_of(0), {.timeout = 0});
  expect_error(ErrorCode::invalid_argument, {"comm is null", "ncclComm_t"}, [] { Group::nccl(nullptr); });
  EXPECT_EQ(pretended_nccl().joined, joined);
}

TEST(GroupOverNccl, ErrorsOfNcclNameTheCall) {
  pretended_nccl().join_error = 2;
  expect_error(ErrorCode::cuda_error, {"ncclCommInitRankConfig", "unhandled pretended error"},
               [] { Group::nccl(Group::nccl_id(), 0, 1, device_of(0), kHasty); });
  pretended_nccl().join_error = 0;
  EXPECT_NO_THROW(Group::nccl(Group::nccl_id(), 0, 1, device_of(0), kHasty).barrier());
}

TEST(GroupOverNccl, WhoDoesNotComeIsNotAwaitedForLong) {
  on_group(2, kHasty, [](int rank, Group& group) {
    group.barrier();
    if (rank == 1) return;
    for (int call = 0; call < 2; ++call)
      expect_error(ErrorCode::timeout, {"rank 0 of 2", "did not gather"}, [&] { group.barrier(); });
  });
  on_group(2, kPatient, [](int, Group& group) { group.barrier(); });
}

TEST(GroupOverNccl, MemoryIsSharedAndSettingsAreCompared) {
  on_group(2, kPatient, [](int rank, Group& group) {
    const auto memory = group.state()->allocate(1 << 10);
    // "processes" have one address space here: what is mine there is what the peer has of me
    static_cast<char*>(memory->blocks[rank].get())[rank] = char(1 + rank);
    group.barrier();
    EXPECT_EQ(static_cast<char*>(memory->blocks[1 - rank].get())[1 - rank], char(2 - rank));
    EXPECT_EQ(static_cast<char*>(memory->blocks[rank].get())[1 - rank], 0) << "zeroed";
    group.barrier();
    ExpertParallelConfig config = kConfig;
    EXPECT_NO_THROW(ExpertParallel(group, config));
    config.hidden += 128 * rank;
    expect_error(ErrorCode::invalid_argument, {"hidden", "128", "256"}, [&] { ExpertParallel(group, config); });
    group.barrier();
  });
}

}  // namespace
}  // namespace phalanx::test
