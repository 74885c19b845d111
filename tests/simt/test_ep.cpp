// The expert-parallel kernels themselves, simulated on the host: ranks of several CTAs, every byte checked.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <thread>

#include "cpu/ep.h"
#include "device/ep/combine.cuh"
#include "device/ep/dispatch.cuh"
#include "simt.h"
#include "tests/cpu/ep_past.h"
#include "tests/cpu/ep_rounds.h"

namespace phalanx {

namespace test {
namespace {

// Launches that are only kept, as a graph that is captured keeps them.
thread_local std::vector<EpDispatchParams>* captured = nullptr;
void dispatch(const EpDispatchParams& p) {
  if (captured != nullptr) return captured->push_back(p);
  simt::launch(p.c.shape.num_ctas, 32 * kEpDispatchWarps,
               [&] { p.c.shape.counted ? ep_dispatch<true>(p) : ep_dispatch<false>(p); });
}
thread_local bool first_cta_is_late = false;
void combine(const EpCombineParams& p) {
  const bool late = first_cta_is_late;
  simt::launch(p.c.shape.num_ctas, 32 * kEpCombineWarps, [&] {
    if (late && blockIdx.x == 0 && threadIdx.x == 0) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    ep_sums_are_few(p.c.shape) ? ep_combine<true>(p) : ep_combine<false>(p);
  });
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
                          .values = rng() % 2 == 0,
                          .quantized = random_x(round % 2 == 0, rng)};
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

// With one buffer, and another number of tokens, slots are read by one CTA of the home and then written for another.
TEST_P(Simulated, SumsWaitForWhoeverReadsTheirSlots) {
  for (const auto& [max_tokens, first, second] : {std::tuple{25, 24, 9}, {25, 25, 24}, {6, 6, 3}}) {
    SCOPED_TRACE(::testing::Message() << max_tokens << " tokens at most, " << first << ", " << second);
    const ExpertParallelConfig config{
        .hidden = 272, .num_experts = 2, .topk = 1, .max_tokens = max_tokens, .dtype = DType::bf16};
    auto groups = Group::local(cpus(2), kPatient);
    auto eps = make_all(groups, config);
    on_ranks(2, [&](int r) {
      std::vector<std::unique_ptr<Rank>> rounds;
      for (const int tokens : {first, second}) {  // of rank 0, all to rank 1
        EpProblem p{.config = config, .first = {0, 1, 2}, .tokens = {tokens, 1}};
        for (int rank = 0; rank < 2; ++rank) {
          p.topk.emplace_back(p.tokens[rank], 1 - rank);
          p.weights.emplace_back(p.tokens[rank], 1.0f);
          p.x.emplace_back(p.tokens[rank] * config.hidden, 1.0f);
        }
        rounds.push_back(std::make_unique<Rank>(p, r, eps[r], eps[r].max_rows(), false));
        eps[r].dispatch(rounds.back()->args);
      }
      for (int i = 0; i < 2; ++i) {
        Rank& mine = *rounds[i];
        mine.expert_rows.fill([&](auto, auto) { return cpu::from_f32<cpu::Bf16>(float(i + 1)); });
        mine.combine.part = EpPart::send;
        eps[r].combine(mine.combine);
        first_cta_is_late = r == 0 && i == 0;
        mine.combine.part = EpPart::recv;
        eps[r].combine(mine.combine);
        first_cta_is_late = false;
      }
      for (int i = 0; i < 2; ++i)
        for (std::int64_t t = 0; t < rounds[i]->out.rows(); ++t)
          EXPECT_EQ(float(rounds[i]->out.value(t, 0)), float(i + 1)) << "operation " << i << ", token " << t;
    });
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

// Senders number their choices, and scales that x has come apart from it.
TEST_P(Simulated, ManyTokensAndFewExperts) {
  std::mt19937 rng(kSeed + GetParam().all);
  for (const auto& [hidden, max_tokens, n] : {std::tuple{272, 150, 2}, {3 * 1024, 30, 3}, {65 * 128, 40, 2}}) {
    const ExpertParallelConfig config{.hidden = hidden,
                                      .num_experts = 5,
                                      .topk = 8,
                                      .max_tokens = max_tokens,
                                      .dtype = DType::bf16,
                                      .alignment = int(1 + rng() % 4)};
    auto groups = Group::local(cpus(n), kPatient);
    auto eps = make_all(groups, config);
    for (int round = 0; round < 6; ++round) {
      const std::optional<Order> quantized[] = {{}, Order::row_major, Order::col_major};
      const Style style{.e4m3 = round < 5,
                        .exact = round % 2 == 1,
                        .split = round == 2,
                        .quantized = round < 5 ? quantized[round % 3] : std::nullopt};
      run_round(eps, random_problem(n, config, rng, 10, round % 3 * 30), style, unsigned(rng()));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Simulated, SendsGoOnBeforeWhatWasSentLastIsReceived) {
  for (const int max_tokens : {60, 2}) {
    std::mt19937 rng(kSeed);
    const ExpertParallelConfig config{
        .hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = max_tokens, .dtype = DType::bf16, .latency = true};
    auto groups = Group::local(cpus(2), kPatient);
    auto eps = make_all(groups, config);
    send_ahead(eps, rng);
    if (HasFatalFailure()) return;
  }
}

TEST_P(Simulated, EpochsOfMoreThan32Bits) {
  std::mt19937 rng(kSeed + GetParam().all);
  for (const auto& [max_tokens, latency] : {std::pair{30, false}, {30, true}, {3, true}, {2, false}}) {
    const ExpertParallelConfig config{
        .hidden = 272, .num_experts = 7, .topk = 4, .max_tokens = max_tokens, .dtype = DType::bf16, .latency = latency};
    for (const EpPast& past : kEpPasts) {
      SCOPED_TRACE(::testing::Message() << "after " << past.done << " operations, max_tokens " << max_tokens
                                        << ", latency " << latency);
      auto groups = Group::local(cpus(2), kPatient);
      auto eps = make_all(groups, config);
      begin_after(past, eps, random_problem(2, config, rng));
      for (int round = 0; round < 5; ++round) {
        const Style style{.e4m3 = round % 2 == 0,
                          .exact = round == 1,
                          .split = round == 2,
                          .values = round % 2 == 1,
                          .quantized = random_x(round % 2 == 0, rng)};
        run_round(eps, random_problem(2, config, rng), style, unsigned(rng()));
        if (HasFatalFailure()) return;
      }
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

TEST_P(Simulated, AWholeOperationBetweenHalvesIsRefused) {
  for (const int max_tokens : {2, 40})
    expect_refused_between_halves(
        {.hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = max_tokens, .dtype = DType::bf16, .latency = true});
}

// A graph of dispatches, of which nobody looks at the status in between: when the first has waited in vain, the others
// send nothing, so that a rank that comes late does not take the second one's tokens for the first one's.
TEST_P(Simulated, KernelsBehindAFailedOneSendNothing) {
  constexpr int kOperations = 3;
  for (const auto& [max_tokens, latency] : {std::pair{40, false}, {40, true}, {2, true}}) {
    SCOPED_TRACE(::testing::Message() << "max_tokens " << max_tokens << ", latency " << latency);
    std::mt19937 rng(kSeed);
    const ExpertParallelConfig config{
        .hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = max_tokens, .dtype = DType::bf16, .latency = latency};
    auto groups = Group::local(cpus(2), kHasty);
    auto eps = make_all(groups, config);
    std::vector<EpProblem> problems;
    for (int i = 0; i < kOperations; ++i) problems.push_back(random_problem(2, config, rng));
    const auto ranks_of = [&](int r) {
      std::vector<std::unique_ptr<Rank>> ranks;
      for (const EpProblem& p : problems)
        ranks.push_back(std::make_unique<Rank>(p, r, eps[r], eps[r].max_rows(), false));
      return ranks;
    };
    const auto early = ranks_of(0), late = ranks_of(1);
    std::vector<EpDispatchParams> graph;
    captured = &graph;
    for (const auto& rank : early) eps[0].dispatch(rank->args);
    captured = nullptr;
    for (const EpDispatchParams& p : graph) dispatch(p);
    expect_error(ErrorCode::timeout, {"rank 0 of 2", "peer 1", "operation 1"}, [&] { eps[0].check(); });
    eps[1].dispatch(late[0]->args);
    expect_rows(problems[0], *late[0], reference_rows(problems[0], 1), false);
    expect_error(ErrorCode::timeout, {"rank 1 of 2", "peer 0"}, [&] { eps[1].dispatch(late[1]->args); });
  }
}

TEST_P(Simulated, OtherTypesAreNamedByThoseWhoComeLater) {
  for (const int max_tokens : {2, 40})
    expect_other_types_named_later(
        {.hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = max_tokens, .dtype = DType::bf16, .latency = true});
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

TEST_P(Simulated, AHandleOfOtherTokensIsRefused) {
  std::mt19937 rng(kSeed);
  for (const bool combines : {false, true}) {
    for (const bool latency : {false, true}) {
      const ExpertParallelConfig config{
          .hidden = 272, .num_experts = 4, .topk = 4, .max_tokens = 20, .dtype = DType::bf16, .latency = latency};
      auto groups = Group::local(cpus(1), kHasty);
      auto eps = make_all(groups, config);
      EpProblem p = random_problem(1, config, rng, 9);
      while (p.tokens[0] < 2) p = random_problem(1, config, rng, 9);
      Rank mine(p, 0, eps[0], eps[0].max_rows(), false);
      eps[0].dispatch(mine.args);
      mine.args.topk_idx.reset();
      mine.args.topk_weights.reset();
      --mine.args.x.shape[0];
      --mine.combine.out.shape[0];
      const std::string all = std::to_string(p.tokens[0]), fewer = std::to_string(p.tokens[0] - 1);
      const std::string of = (combines ? "a combine of " : "a dispatch of ") + fewer + " tokens, expected " + all;
      expect_error(ErrorCode::invalid_argument, {"rank 0 of 1", of.c_str()}, [&] {
        if (combines)
          eps[0].combine(mine.combine);
        else
          eps[0].dispatch(mine.args);
      });
    }
  }
}

TEST_P(Simulated, NanThatLooksLikeNothingArrives) {
  std::mt19937 rng(kSeed);
  const ExpertParallelConfig config{
      .hidden = 272, .num_experts = 6, .topk = 3, .max_tokens = 5, .dtype = DType::bf16, .latency = true};
  auto groups = Group::local(cpus(2), kPatient);
  auto eps = make_all(groups, config);
  const EpProblem p = random_problem(2, config, rng);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < 2; ++r) ranks.push_back(std::make_unique<Rank>(p, r, eps[r], eps[r].max_rows(), false));
  for (auto& rank : ranks) rank->x.fill([](auto, auto) { return cpu::Bf16{0xffff}; });
  on_ranks(2, [&](int r) {
    for (int again = 0; again < 3; ++again) eps[r].dispatch(ranks[r]->args);
  });
  for (int r = 0; r < 2; ++r) {
    const EpRows expected = reference_rows(p, r);
    for (std::size_t i = 0; i < expected.rows.size(); ++i)
      for (int j = 0; j < config.hidden; ++j)
        ASSERT_EQ(ranks[r]->rows_bf16.at(i, j).bits & 0x7fff, expected.rows[i].source < 0 ? 0 : 0x7fff);
  }
}

INSTANTIATE_TEST_SUITE_P(Ctas, Simulated, ::testing::Values(Ctas{1, 0}, Ctas{3, 0}, Ctas{3, 1}));

}  // namespace
}  // namespace test
}  // namespace phalanx
