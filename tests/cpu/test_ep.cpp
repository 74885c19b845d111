// Expert parallelism with threads as ranks: every row against the reference, whatever the delays; and every way to
// fail.
#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <thread>

#include "cpu/ep.h"
#include "ep/group.h"
#include "tests/cpu/ep_past.h"
#include "tests/cpu/ep_rounds.h"

namespace phalanx::test {
namespace {

void delay_at_random(int) {
  thread_local std::mt19937 rng(std::random_device{}());
  if (rng() % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(rng() % 300));
}

class Delays {
 public:
  Delays() { cpu::ep_delay = delay_at_random; }
  ~Delays() { cpu::ep_delay = nullptr; }
};

TEST(ExpertParallel, EveryRowAndSumIsTheReferences) {
  std::mt19937 rng(kSeed);
  const Delays delays;
  for (const int n : {1, 2, 3, 4, 8, 16}) {
    for (int variant = 0; variant < 3; ++variant) {
      ExpertParallelConfig config{.hidden = int(1 + rng() % 20) * 16,
                                  .num_experts = int(1 + rng() % 40),
                                  .topk = variant == 2 ? 32 : int(1 + rng() % 8),
                                  .max_tokens = n > 8 ? 6 : 20,
                                  .dtype = variant == 0 ? DType::e4m3 : DType::bf16,
                                  .latency = rng() % 2 == 0,
                                  .alignment = variant == 1 ? 1 : int(1 + rng() % 16)};
      if (variant == 1) {  // uneven, ranks without any among them
        config.experts_per_rank.assign(n, 0);
        for (int e = 0; e < config.num_experts; ++e) ++config.experts_per_rank[rng() % n];
      }
      SCOPED_TRACE(::testing::Message() << n << " ranks, variant " << variant << ", hidden " << config.hidden
                                        << ", topk " << config.topk << ", experts " << config.num_experts);
      auto groups = Group::local(cpus(n), kPatient);
      auto eps = make_all(groups, config);
      for (int round = 0; round < 6; ++round) {
        const EpProblem p = random_problem(n, config, rng, round == 5 ? 100 : 10, round % 2 ? 40 : 0);
        const Style style{.e4m3 = variant == 0 || round % 2 == 0,
                          .exact = rng() % 3 == 0,
                          .split = rng() % 2 == 0,
                          .residual = rng() % 2 == 0,
                          .weighted = rng() % 2 == 0,
                          .values = rng() % 2 == 0,
                          .quantized = random_x(variant == 0 || round % 2 == 0, rng)};
        run_round(eps, p, style, unsigned(rng()));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(ExpertParallel, HandlesCanBeUsedAgain) {
  std::mt19937 rng(kSeed);
  const ExpertParallelConfig config{.hidden = 48, .num_experts = 9, .topk = 3, .max_tokens = 12, .dtype = DType::bf16};
  auto groups = Group::local(cpus(3), kPatient);
  auto eps = make_all(groups, config);
  const EpProblem p = random_problem(3, config, rng);
  on_ranks(3, [&](int r) {
    const EpRows expected = reference_rows(p, r);
    Rank mine(p, r, eps[r], ssize(expected.rows), false);
    eps[r].dispatch(mine.args);
    for (int again = 0; again < 3; ++again) {
      Rank second(p, r, eps[r], ssize(expected.rows), false);
      second.handle = mine.handle;
      second.args.topk_idx.reset();
      second.args.topk_weights.reset();
      eps[r].dispatch(second.args);
      expect_rows(p, second, expected, false);
    }
  });
}

TEST(ExpertParallel, SendsGoOnBeforeWhatWasSentLastIsReceived) {
  std::mt19937 rng(kSeed);
  const ExpertParallelConfig config{
      .hidden = 48, .num_experts = 7, .topk = 3, .max_tokens = 12, .dtype = DType::bf16, .latency = true};
  auto groups = Group::local(cpus(3), kPatient);
  auto eps = make_all(groups, config);
  send_ahead(eps, rng);
}

TEST(ExpertParallel, EpochsOfMoreThan32Bits) {
  std::mt19937 rng(kSeed);
  const Delays delays;
  const ExpertParallelConfig throughput{
      .hidden = 48, .num_experts = 7, .topk = 3, .max_tokens = 12, .dtype = DType::bf16};
  for (const bool latency : {false, true}) {
    for (const EpPast& past : kEpPasts) {
      ExpertParallelConfig config = throughput;
      config.latency = latency;
      SCOPED_TRACE(::testing::Message() << "after " << past.done << " operations, latency " << latency);
      auto groups = Group::local(cpus(3), kPatient);
      auto eps = make_all(groups, config);
      begin_after(past, eps, random_problem(3, config, rng));
      for (int round = 0; round < 6; ++round) {
        const Style style{
            .e4m3 = round % 2 == 0, .exact = round == 1, .split = round % 3 == 2, .values = round % 2 == 1};
        run_round(eps, random_problem(3, config, rng), style, unsigned(rng()));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(ExpertParallel, FlagsComeInOrderAlthoughEpochsWrap) {
  for (const u64 epoch : {u64{1}, u64{1} << 31, (u64{1} << 32) - 1, u64{1} << 32, (u64{1} << 32) + 1}) {
    const u64 wanted = ep_flag(epoch, kEpSums, 5);
    for (const u32 format : {0u, u32(kEpSums), 255u}) {
      EXPECT_TRUE(ep_flag_has_come(ep_flag(epoch, format, 5), wanted));
      EXPECT_TRUE(ep_flag_has_come(ep_flag(epoch, format, 6), wanted));
      EXPECT_FALSE(ep_flag_has_come(ep_flag(epoch, format, 4), wanted));
      for (const u64 ahead : {1, 3}) EXPECT_TRUE(ep_flag_has_come(ep_flag(epoch + ahead, format, 1), wanted));
      for (const u64 ago : {u64{1}, u64{2}, u64{1} << 31, u64{3} << 30})
        EXPECT_FALSE(ep_flag_has_come(ep_flag(epoch - ago, format, 9), wanted));
    }
  }
}

TEST(ExpertParallel, OverflowIsReportedAndNothingWrittenBeyond) {
  std::mt19937 rng(kSeed);
  const ExpertParallelConfig config{.hidden = 32, .num_experts = 4, .topk = 4, .max_tokens = 16, .dtype = DType::bf16};
  auto groups = Group::local(cpus(2), kPatient);
  auto eps = make_all(groups, config);
  EpProblem p = random_problem(2, config, rng, 0);
  while (p.tokens[0] < 8 || p.tokens[1] < 8) p = random_problem(2, config, rng, 0);
  on_ranks(2, [&](int r) {
    const EpRows expected = reference_rows(p, r);
    const int room = int(expected.rows.size()) - 3;
    Rank mine(p, r, eps[r], room, false);
    try {
      eps[r].dispatch(mine.args);
      ADD_FAILURE() << "no overflow";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::capacity_exceeded);
      EXPECT_NE(std::string(error.what()).find(std::to_string(expected.rows.size())), std::string::npos)
          << error.what();
    }
    mine.rows_bf16.expect_frame_intact();
    EXPECT_EQ(eps[r].num_rows(mine.args.handle), ssize(expected.rows));
    // The handle serves with room enough.
    Rank second(p, r, eps[r], ssize(expected.rows), false);
    second.handle = mine.handle;
    second.args.topk_idx.reset();
    second.args.topk_weights.reset();
    eps[r].dispatch(second.args);
    expect_rows(p, second, expected, false);
  });
}

// --- failures -------------------------------------------------------------------------------------------------------

const ExpertParallelConfig kSmall{.hidden = 32, .num_experts = 6, .topk = 2, .max_tokens = 4, .dtype = DType::bf16};

EpProblem full_problem(int n, std::mt19937& rng) {
  EpProblem p;
  do p = random_problem(n, kSmall, rng, 0);
  while (*std::min_element(p.tokens.begin(), p.tokens.end()) < 4);
  // Everybody needs everybody.
  for (int r = 0; r < n; ++r)
    for (std::size_t i = 0; i < p.topk[r].size(); ++i) p.topk[r][i] = std::int64_t(i % 6);
  return p;
}

TEST(ExpertParallelFailures, ADeadRankIsNamedAndTheGroupCanBeBuiltAnew) {
  std::mt19937 rng(kSeed);
  for (int round = 0; round < 2; ++round) {
    auto groups = Group::local(cpus(3), kHasty);
    auto eps = make_all(groups, kSmall);
    const EpProblem p = full_problem(3, rng);
    std::vector<std::string> messages(3);
    on_ranks(3, [&](int r) {
      if (r == 1) return;  // dies before it begins
      Rank mine(p, r, eps[r], eps[r].max_rows(), false);
      expect_error(ErrorCode::timeout, {"peer 1", "routing", "operation 1", "0.3 s"},
                   [&] { eps[r].dispatch(mine.args); });
      // What failed stays failed, at once.
      expect_error(ErrorCode::timeout, {"peer 1"}, [&] { eps[r].dispatch(mine.args); });
      expect_error(ErrorCode::timeout, {"peer 1"}, [&] { groups[r].barrier(); });
      groups[r].close();
    });
  }
  auto groups = Group::local(cpus(3), kPatient);
  auto eps = make_all(groups, kSmall);
  run_round(eps, full_problem(3, rng), {}, 1);
}

TEST(ExpertParallelFailures, OperationsOfMoreThan32BitsAreNamed) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(2), kHasty);
  auto eps = make_all(groups, kSmall);
  const EpProblem p = full_problem(2, rng);
  begin_after({(u64{1} << 32) + 2, (u64{1} << 32) + 2}, eps, p);
  Rank mine(p, 0, eps[0], eps[0].max_rows(), false);
  expect_error(ErrorCode::timeout, {"peer 1", "routing", "operation 4294967299"}, [&] { eps[0].dispatch(mine.args); });
}

TEST(ExpertParallelFailures, ARankThatDiesBeforeItsCombineIsNamed) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(2), kHasty);
  auto eps = make_all(groups, kSmall);
  const EpProblem p = full_problem(2, rng);
  on_ranks(2, [&](int r) {
    Rank mine(p, r, eps[r], eps[r].max_rows(), false);
    eps[r].dispatch(mine.args);
    if (r == 0) return;
    expect_error(ErrorCode::timeout, {"rank 1 of 2", "peer 0", "sums"}, [&] { eps[r].combine(mine.combine); });
  });
}

TEST(ExpertParallelFailures, MoreSendsThanBuffersTimeOut) {
  std::mt19937 rng(kSeed);
  for (const bool latency : {false, true}) {
    ExpertParallelConfig config = kSmall;
    config.latency = latency;
    auto groups = Group::local(cpus(2), kHasty);
    auto eps = make_all(groups, config);
    const EpProblem p = full_problem(2, rng);
    on_ranks(2, [&](int r) {
      Rank mine(p, r, eps[r], eps[r].max_rows(), false);
      mine.args.part = EpPart::send;
      for (int i = 0; i < (latency ? 2 : 1); ++i) eps[r].dispatch(mine.args);
      expect_error(ErrorCode::timeout, {"finish reading an earlier dispatch"}, [&] { eps[r].dispatch(mine.args); });
    });
  }
}

TEST(ExpertParallelFailures, AWholeOperationBetweenHalvesIsRefused) {
  for (const bool latency : {false, true}) {
    ExpertParallelConfig config = kSmall;
    config.latency = latency;
    expect_refused_between_halves(config);
  }
}

TEST(ExpertParallelFailures, OtherTypesOnOtherRanksAreNamed) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(2), kHasty);
  auto eps = make_all(groups, kSmall);
  const EpProblem p = full_problem(2, rng);
  on_ranks(2, [&](int r) {
    Rank mine(p, r, eps[r], eps[r].max_rows(), r == 1);
    if (r == 0)
      expect_error(ErrorCode::invalid_argument, {"peer 1", "expected bf16 tokens", "sent e4m3 tokens"},
                   [&] { eps[r].dispatch(mine.args); });
    else
      expect_error(ErrorCode::invalid_argument, {"peer 0", "expected e4m3 tokens", "sent bf16 tokens"},
                   [&] { eps[r].dispatch(mine.args); });
  });
}

TEST(ExpertParallelFailures, OtherTypesAreNamedByThoseWhoComeLater) {
  ExpertParallelConfig config = kSmall;
  config.latency = true;
  expect_other_types_named_later(config);
}

TEST(ExpertParallelFailures, ConfigurationsThatDifferAreNamed) {
  auto groups = Group::local(cpus(3), kHasty);
  on_ranks(3, [&](int r) {
    ExpertParallelConfig config = kSmall;
    if (r == 2) config.topk = 5;
    expect_error(ErrorCode::invalid_argument, {"rank 0 has topk=2", "rank 2 has topk=5"},
                 [&] { ExpertParallel(groups[r], config); });
  });
}

TEST(ExpertParallelFailures, MemoryThatOneRankCannotHaveFailsAll) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers end the process";
#endif
  auto groups = Group::local(cpus(3), kPatient);
  on_ranks(3, [&](int r) {
    const std::size_t bytes = r == 1 ? std::size_t{1} << 62 : 4096;
    expect_error(ErrorCode::unsupported, {"rank 1 of 3", "4611686018427387904 bytes"},
                 [&] { groups[r].state()->allocate(bytes); });
    EXPECT_EQ(groups[r].state()->allocate(4096)->bytes, 4096u);
  });
}

TEST(ExpertParallelFailures, AbortWakesThoseWhoWait) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(3), kPatient);
  auto eps = make_all(groups, kSmall);
  const EpProblem p = full_problem(3, rng);
  on_ranks(3, [&](int r) {
    if (r == 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      groups[r].abort();
      return;
    }
    Rank mine(p, r, eps[r], eps[r].max_rows(), false);
    expect_error(ErrorCode::aborted, {"rank 2"}, [&] { r == 0 ? groups[r].barrier() : eps[r].dispatch(mine.args); });
  });
}

TEST(Group, WhoComesAfterAnAbortGivesUpThoughTheAborterHasBeenThere) {
  auto groups = Group::local(cpus(2), kPatient);
  std::thread waiting([&] { expect_error(ErrorCode::aborted, {"rank 0"}, [&] { groups[0].barrier(); }); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  groups[0].abort();
  waiting.join();
  expect_error(ErrorCode::aborted, {"rank 0"}, [&] { groups[1].barrier(); });
}

TEST(ExpertParallelFailures, WhatWasSentBeforeAnAbortIsNotReceived) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(2), kPatient);
  auto eps = make_all(groups, kSmall);
  const EpProblem p = full_problem(2, rng);
  Rank sender(p, 0, eps[0], eps[0].max_rows(), false), receiver(p, 1, eps[1], eps[1].max_rows(), false);
  sender.args.part = EpPart::send;
  eps[0].dispatch(sender.args);
  groups[0].abort();
  expect_error(ErrorCode::aborted, {"rank 0"}, [&] { eps[1].dispatch(receiver.args); });
}

#ifdef __SSE__
TEST(ExpertParallel, SumsKeepSubnormalsWhateverTheCallersFloatEnvironment) {
  auto groups = Group::local(cpus(1), kPatient);
  auto eps = make_all(groups, kSmall);
  std::mt19937 rng(kSeed);
  const EpProblem p = full_problem(1, rng);
  Rank mine(p, 0, eps[0], eps[0].max_rows(), false);
  eps[0].dispatch(mine.args);
  const auto combined = [&] {
    std::vector<std::uint16_t> rows(std::size_t(eps[0].max_rows()) * kSmall.hidden, 0x0040),
        out(p.tokens[0] * kSmall.hidden);
    eps[0].combine({.rows = row_major(rows.data(), DType::bf16, eps[0].max_rows(), kSmall.hidden),
                    .handle = mine.args.handle,
                    .out = row_major(out.data(), DType::bf16, p.tokens[0], kSmall.hidden),
                    .weighted = false});
    return out;
  };
  const auto expected = combined();
  EXPECT_NE(expected, std::vector<std::uint16_t>(expected.size(), 0));
  const unsigned saved = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(saved | 0x8040);  // flush to zero, denormals are zero
  const auto flushed = combined();
  __builtin_ia32_ldmxcsr(saved);
  EXPECT_EQ(flushed, expected);
}
#endif

TEST(Group, BarrierNamesWhoDidNotCome) {
  auto groups = Group::local(cpus(4), kHasty);
  on_ranks(4, [&](int r) {
    groups[r].barrier();
    if (r == 1 || r == 3) return;
    expect_error(ErrorCode::timeout, {"rank 1, 3", "barrier"}, [&] { groups[r].barrier(); });
  });
}

TEST(Group, WrongArgumentsAreRefused) {
  expect_error(ErrorCode::invalid_argument, {"0 ranks"}, [] { Group::local({}); });
  expect_error(ErrorCode::invalid_argument, {"timeout"}, [] { Group::local(cpus(1), {.timeout = 0}); });
  expect_error(ErrorCode::invalid_device, {"CPU"}, [] { Group::process(0, 1, {}, nullptr); });
}

/// The least and the most, as include/phalanx/ep.h says.
std::pair<double, double> bytes_by_formula(const ExpertParallelConfig& c, int ranks, bool few) {
  const auto padded = [](int bytes) { return (bytes + 15) / 16 * 16; };
  const int scales = (c.hidden + 127) / 128, experts = (c.num_experts + ranks - 1) / ranks;
  const int num_sms = c.num_sms ? c.num_sms : c.latency ? 128 : 32;
  const bool wide = c.dtype == DType::bf16;
  const double slot = wide ? 2 * c.hidden : c.hidden, of_scales = wide && few ? 0 : padded(4 * scales);
  const double ours = ranks, peers = ranks - 1, tokens = c.max_tokens, buffers = c.latency ? 2 : 1;
  const int pieces = c.latency ? static_cast<int>(std::bit_floor(unsigned(std::min(8, scales)))) : 1;
  const double least = buffers * (peers * tokens * (slot + 2 * c.hidden + padded(4 * c.topk)) +
                                  ours * tokens * (16 * c.topk + of_scales) + (few ? tokens * slot : 0)) +
                       (few ? 0 : 8 * ours * tokens * pieces);
  return {least, least + 4096 + num_sms * ours * (96 + 8 * buffers * experts)};
}

TEST(ExpertParallelConfig, BytesFollowTheFormula) {
  struct Case {
    int ranks, tokens, num_sms, hidden, num_experts, topk;
    bool latency, few;
  };
  const Case cases[] = {
      {1, 8192, 0, 7168, 256, 8, false, false},
      {2, 8192, 0, 7168, 256, 8, false, false},
      {8, 8192, 0, 7168, 256, 8, false, false},
      {2, 8192, 132, 7168, 256, 8, false, false},
      {2, 8192, 2, 7168, 256, 8, false, false},
      {2, 8192, 0, 7168, 256, 8, true, false},
      {2, 128, 2, 7168, 256, 8, true, false},
      {2, 8192, 64, 304, 256, 3, true, false},  // 2 pieces; weights are padded
      {1, 128, 0, 7168, 256, 8, true, true},
      {2, 128, 0, 7168, 256, 8, true, true},
      {2, 128, 0, 7168, 256, 8, false, true},
      {2, 512, 32, 7168, 256, 8, false, true},  // as many choices as SMs times experts
      {2, 513, 32, 7168, 256, 8, false, false},
      {8, 8192, 0, 7168, 4100, 8, false, true},  // too many experts to be counted
      {8, 8192, 2, 7168, 3000, 8, false, true},  // counts do not fit in shared memory
  };
  for (const Case& c : cases) {
    for (const DType dtype : {DType::e4m3, DType::bf16}) {
      const ExpertParallelConfig config{.hidden = c.hidden,
                                        .num_experts = c.num_experts,
                                        .topk = c.topk,
                                        .max_tokens = c.tokens,
                                        .dtype = dtype,
                                        .latency = c.latency,
                                        .num_sms = c.num_sms};
      SCOPED_TRACE(::testing::Message() << c.ranks << " ranks, " << c.tokens << " tokens, " << c.num_sms << " SMs, "
                                        << c.num_experts << " experts, latency " << c.latency);
      const auto [least, most] = bytes_by_formula(config, c.ranks, c.few);
      const double bytes = double(expert_parallel_bytes(config, c.ranks));
      EXPECT_GE(bytes, least);
      EXPECT_LE(bytes, most);
    }
  }
}

TEST(ExpertParallelConfig, TooFewSmsAreRefused) {
  const auto bytes = [](int tokens, int num_sms, int num_experts, int ranks) {
    return expert_parallel_bytes(
        {.hidden = 7168, .num_experts = num_experts, .topk = 8, .max_tokens = tokens, .num_sms = num_sms}, ranks);
  };
  using E = ErrorCode;
  expect_error(E::invalid_argument, {"num_sms is 1, expected 2 or more", "8192 tokens, top-8", "shared memory"},
               [&] { bytes(8192, 1, 256, 2); });
  expect_error(E::invalid_argument, {"num_sms is 2, expected 3 or more", "16384 tokens, top-8"},
               [&] { bytes(16384, 2, 256, 2); });
  bytes(8192, 2, 256, 2);
  bytes(16384, 3, 256, 2);
  expect_error(E::invalid_argument,
               {"max_tokens is 131072, expected fewer", "524287", "by 8 SMs; or config.num_sms of 25 or more"},
               [&] { bytes(1 << 17, 8, 256, 2); });
  bytes(1 << 17, 25, 256, 2);
  expect_error(E::invalid_argument, {"max_tokens is 131072, expected fewer", "among 4100 experts can be numbered"},
               [&] { bytes(1 << 17, 8, 4100, 8); });
}

TEST(ExpertParallelConfig, WrongValuesAreNamed) {
  ExpertParallelConfig config{.hidden = 7168, .num_experts = 256, .topk = 8, .max_tokens = 8192};
  EXPECT_LE(expert_parallel_bytes(config, 2), 240'000'000u);
  config.hidden = 100;
  expect_error(ErrorCode::invalid_argument, {"hidden is 100", "multiple of 16"},
               [&] { expert_parallel_bytes(config, 2); });
  for (const int ranks : {-1, 0, 65})
    expect_error(ErrorCode::invalid_argument, {"num_ranks is", "expected 1 to 64"},
                 [&] { expert_parallel_bytes({.hidden = 128, .num_experts = 4, .topk = 2}, ranks); });
  config.hidden = 128, config.topk = 33;
  expect_error(ErrorCode::invalid_argument, {"topk is 33", "1 to 32"}, [&] { expert_parallel_bytes(config, 2); });
}

TEST(ExpertParallelChecks, NameTheArgument) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(1), kPatient);
  auto eps = make_all(groups, kSmall);
  const EpProblem p = full_problem(1, rng);
  Rank mine(p, 0, eps[0], eps[0].max_rows(), false);
  const auto with = [&](auto&& change) {
    EpDispatch args = mine.args;
    change(args);
    eps[0].dispatch(args);
  };
  using E = ErrorCode;
  expect_error(E::invalid_argument, {"x is", "hidden"}, [&] { with([](auto& a) { a.x.shape[1] = 16; }); });
  expect_error(E::invalid_argument, {"topk_idx", "[T, config.topk]"},
               [&] { with([](auto& a) { a.topk_idx->shape[1] = 1; }); });
  expect_error(E::invalid_argument, {"x is", "max_tokens"}, [&] { with([](auto& a) { a.x.shape[0] = 5; }); });
  expect_error(E::invalid_dtype, {"topk_idx", "int32 or int64"},
               [&] { with([](auto& a) { a.topk_idx->dtype = DType::f32; }); });
  expect_error(E::invalid_argument, {"handle"}, [&] { with([](auto& a) { a.handle.shape[0] -= 1; }); });
  expect_error(E::invalid_argument, {"row_scales"},
               [&] { with([](auto& a) { a.rows.dtype = DType::e4m3, a.rows.strides[0] = 48; }); });
  expect_error(E::invalid_argument, {"overlaps"}, [&] { with([](auto& a) { a.rows = a.x; }); });
  expect_error(E::invalid_argument, {"offsets"}, [&] { with([](auto& a) { a.offsets->shape[0] = 2; }); });
  with([](auto&) {});
}

}  // namespace
}  // namespace phalanx::test
