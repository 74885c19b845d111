// The expert-parallel kernels themselves, simulated on the host: ranks of several CTAs, every byte checked.
#include <gtest/gtest.h>

#include "cpu/ep.h"
#include "device/ep/combine.cuh"
#include "device/ep/dispatch.cuh"
#include "simt.h"
#include "tests/cpu/ep_rounds.h"

namespace phalanx {

namespace test {
namespace {

void dispatch(const EpDispatchParams& p) {
  simt::launch(p.c.shape.num_ctas, 32 * kEpDispatchWarps,
               [&] { p.c.shape.counted ? ep_dispatch<true>(p) : ep_dispatch<false>(p); });
}
void combine(const EpCombineParams& p) {
  simt::launch(p.c.shape.num_ctas, 32 * kEpCombineWarps, [&] { ep_sums_are_few(p.c.shape) ? ep_combine<true>(p) : ep_combine<false>(p); });
}

struct Ctas {
  int all, senders;  // senders: where tokens are many
};

class Simulated : public ::testing::TestWithParam<Ctas> {
 protected:
  void SetUp() override { cpu::ep_stand_in = &stand_in_; }
  void TearDown() override { cpu::ep_stand_in = nullptr; }

 private:
  const cpu::EpStandIn stand_in_{GetParam().all, GetParam().senders, dispatch, combine};
};

TEST_P(Simulated, EveryRowAndSumIsTheReferences) {
  std::mt19937 rng(kSeed + GetParam().all);
  for (const int n : {1, 3}) {
    for (const auto& [max_tokens, latency] : {std::pair{24, false}, {5, true}, {2, false}}) {
      const ExpertParallelConfig config{.hidden = int(1 + rng() % 40) * 16,
                                        .num_experts = int(1 + rng() % 20),
                                        .topk = int(1 + rng() % 8),
                                        .max_tokens = max_tokens,
                                        .dtype = DType::bf16,
                                        .latency = latency,
                                        .alignment = int(1 + rng() % 8)};
      SCOPED_TRACE(::testing::Message() << n << " ranks, hidden " << config.hidden << ", topk " << config.topk
                                        << ", experts " << config.num_experts);
      auto groups = Group::local(cpus(n), kPatient);
      auto eps = make_all(groups, config);
      for (int round = 0; round < 3; ++round) {
        const EpProblem p = random_problem(n, config, rng, 10, round % 2 ? 40 : 0);
        const Style style{.e4m3 = round % 2 == 0,
                          .exact = round == 1,
                          .split = round == 2,
                          .residual = rng() % 2 == 0,
                          .weighted = rng() % 2 == 0,
                          .values = rng() % 2 == 0};
        run_round(eps, p, style, unsigned(rng()));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Simulated, MoreRowsOfATokenThanStages) {
  std::mt19937 rng(kSeed + GetParam().all);
  const ExpertParallelConfig config{.hidden = 272,
                                    .num_experts = 40,
                                    .topk = 32,
                                    .max_tokens = 6,
                                    .dtype = DType::bf16,
                                    .latency = GetParam().all > 1};
  for (const int n : {1, 2}) {
    auto groups = Group::local(cpus(n), kPatient);
    auto eps = make_all(groups, config);
    run_round(eps, random_problem(n, config, rng), {.weighted = true, .values = true}, unsigned(rng()));
  }
}

TEST_P(Simulated, RowsLongerThanTheRings) {
  std::mt19937 rng(kSeed);
  const ExpertParallelConfig config{
      .hidden = 9 * 1024 + 16, .num_experts = 5, .topk = 3, .max_tokens = 4, .dtype = DType::bf16};
  auto groups = Group::local(cpus(2), kPatient);
  auto eps = make_all(groups, config);
  for (const bool e4m3 : {false, true}) run_round(eps, random_problem(2, config, rng), {.e4m3 = e4m3}, 1);
}

// Senders number their choices, and scales are staged.
TEST_P(Simulated, ManyTokensAndFewExperts) {
  std::mt19937 rng(kSeed + GetParam().all);
  for (const int hidden : {272, 3 * 1024}) {
    const ExpertParallelConfig config{.hidden = hidden,
                                      .num_experts = 5,
                                      .topk = 8,
                                      .max_tokens = 30,
                                      .dtype = DType::bf16,
                                      .alignment = int(1 + rng() % 4)};
    const int n = hidden == 272 ? 2 : 3;
    auto groups = Group::local(cpus(n), kPatient);
    auto eps = make_all(groups, config);
    for (int round = 0; round < 3; ++round) {
      run_round(eps, random_problem(n, config, rng, 10, round * 30), {.e4m3 = round < 2, .exact = round == 1},
                unsigned(rng()));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Simulated, AMissingRankIsNamed) {
  std::mt19937 rng(kSeed);
  for (const bool latency : {false, true}) {
    const ExpertParallelConfig config{
        .hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = 40, .dtype = DType::bf16, .latency = latency};
    auto groups = Group::local(cpus(2), kHasty);
    auto eps = make_all(groups, config);
    const EpProblem p = random_problem(2, config, rng);
    Rank mine(p, 0, eps[0], eps[0].max_rows(), false);
    expect_error(ErrorCode::timeout, {"rank 0 of 2", "peer 1", "routing", "operation 1", "0.3 s"},
                 [&] { eps[0].dispatch(mine.args); });
    expect_error(ErrorCode::timeout, {"peer 1"}, [&] { eps[0].combine(mine.combine); });
  }
}

TEST_P(Simulated, ARankThatDoesNotCombineIsNamed) {
  std::mt19937 rng(kSeed);
  for (const bool latency : {false, true}) {
    const ExpertParallelConfig config{
        .hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = 20, .dtype = DType::bf16, .latency = latency};
    auto groups = Group::local(cpus(2), kHasty);
    auto eps = make_all(groups, config);
    const EpProblem p = random_problem(2, config, rng);
    std::vector<std::unique_ptr<Rank>> ranks;
    for (int r = 0; r < 2; ++r) ranks.push_back(std::make_unique<Rank>(p, r, eps[r], eps[r].max_rows(), false));
    on_ranks(2, [&](int r) { eps[r].dispatch(ranks[r]->args); });
    expect_error(ErrorCode::timeout, {"rank 0 of 2", "peer 1", "sums", "operation 1", "0.3 s"},
                 [&] { eps[0].combine(ranks[0]->combine); });
  }
}

INSTANTIATE_TEST_SUITE_P(Ctas, Simulated, ::testing::Values(Ctas{1, 0}, Ctas{3, 0}, Ctas{3, 1}));

}  // namespace
}  // namespace test
}  // namespace phalanx
