// Rounds of dispatch and combine on threads, checked byte by byte.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>

#include "tests/cpu/ep_reference.h"
#include "tests/cpu/matrix.h"
#include "tests/testing.h"

namespace phalanx::test {

inline constexpr GroupOptions kPatient{.timeout = 30}, kHasty{.timeout = 0.3};

inline std::vector<Device> cpus(int n) { return std::vector<Device>(n); }

inline Tensor vector_of(void* data, DType dtype, std::int64_t length) { return {data, dtype, {}, 1, {length}, {1}}; }

/// One rank's arguments and results.
struct Rank {
  /// `quantized`: x is E4M3, with scales of that order.
  Rank(const EpProblem& p, int rank, ExpertParallel& ep, std::int64_t capacity, bool e4m3,
       std::optional<Order> quantized = {})
      : x(p.tokens[rank], p.config.hidden, 1),
        x_e4m3(p.tokens[rank], p.config.hidden, 1),
        x_scales(p.tokens[rank], (p.config.hidden + 127) / 128, 1, quantized.value_or(Order::row_major)),
        out(p.tokens[rank], p.config.hidden, 1),
        residual(p.tokens[rank], p.config.hidden),
        rows_bf16(e4m3 ? 0 : capacity, p.config.hidden, 1),
        expert_rows(capacity, p.config.hidden, 1),
        rows_e4m3(e4m3 ? capacity : 0, p.config.hidden, 1),
        scales(e4m3 ? capacity : 0, (p.config.hidden + 127) / 128, 1, Order::col_major),
        topk(p.topk[rank]),
        weights(p.weights[rank]),
        handle(ep.handle_words(), -77),
        offsets(p.num_local(rank) + 1, -77),
        counts(p.num_local(rank), -77),
        row_weights(capacity, -77),
        row_values(capacity),
        topk_values(p.tokens[rank] * p.config.topk, -77) {
    x.fill([&](auto i, auto j) { return cpu::from_f32<cpu::Bf16>(p.x[rank][i * p.config.hidden + j]); });
    args.x = x.tensor();
    if (quantized) {
      quantize_rows(x.tensor(), {x_e4m3.tensor(), x_scales.tensor()});
      args.x = x_e4m3.tensor();
      args.x_scales = x_scales.tensor();
    }
    args.topk_idx = row_major(topk.data(), DType::int64, p.tokens[rank], p.config.topk);
    args.topk_weights = row_major(weights.data(), DType::f32, p.tokens[rank], p.config.topk);
    args.handle = vector_of(handle.data(), DType::int32, ssize(handle));
    args.rows = e4m3 ? rows_e4m3.tensor() : rows_bf16.tensor();
    if (e4m3) args.row_scales = scales.tensor();
    args.row_weights = vector_of(row_weights.data(), DType::f32, capacity);
    args.offsets = vector_of(offsets.data(), DType::int32, ssize(offsets));
    args.counts = vector_of(counts.data(), DType::int32, ssize(counts));
    combine.rows = expert_rows.tensor();
    combine.handle = args.handle;
    combine.out = out.tensor();
  }

  Matrix<cpu::Bf16> x;
  Matrix<cpu::E4m3> x_e4m3;
  Matrix<float> x_scales;
  Matrix<cpu::Bf16> out, residual, rows_bf16, expert_rows;
  Matrix<cpu::E4m3> rows_e4m3;
  Matrix<float> scales;
  std::vector<std::int64_t> topk;
  std::vector<float> weights;
  std::vector<int> handle, offsets, counts;
  std::vector<float> row_weights, row_values, topk_values;
  EpDispatch args;
  EpCombine combine;
};

inline void expect_rows(const EpProblem& p, Rank& mine, const EpRows& expected, bool e4m3) {
  const int hidden = p.config.hidden;
  ASSERT_EQ(mine.offsets, expected.offsets);
  ASSERT_EQ(mine.counts, expected.counts);
  for (std::size_t i = 0; i < expected.rows.size(); ++i) {
    const EpRow& row = expected.rows[i];
    const bool padding = row.source < 0;
    ASSERT_EQ(mine.row_weights[i], padding ? 0 : p.weights[row.source][row.token * p.config.topk + row.k]);
    Matrix<cpu::Bf16> x(1, hidden);
    x.fill([&](auto, auto j) {
      return cpu::from_f32<cpu::Bf16>(padding ? 0.0f : p.x[row.source][row.token * hidden + j]);
    });
    if (!e4m3) {
      for (int j = 0; j < hidden; ++j) ASSERT_EQ(mine.rows_bf16.at(i, j).bits, x.at(0, j).bits) << "row " << i;
      continue;
    }
    Matrix<cpu::E4m3> q(1, hidden);
    Matrix<float> scales(1, (hidden + 127) / 128);
    quantize_rows(x.tensor(), {q.tensor(), scales.tensor()});
    for (int j = 0; j < hidden; ++j) ASSERT_EQ(mine.rows_e4m3.at(i, j).bits, padding ? 0 : q.at(0, j).bits);
    for (int b = 0; b < scales.cols(); ++b) ASSERT_EQ(mine.scales.at(i, b), padding ? 1 : scales.at(0, b));
  }
  // Rows behind the last are as they were.
  for (std::int64_t i = ssize(expected.rows); i < mine.args.rows.rows(); ++i) {
    if (e4m3)
      ASSERT_EQ(mine.rows_e4m3.at(i, 0).bits, 0xff);
    else
      ASSERT_EQ(mine.rows_bf16.at(i, 0).bits, 0xffff);
  }
  mine.rows_bf16.expect_frame_intact();
  mine.rows_e4m3.expect_frame_intact();
  mine.scales.expect_frame_intact();
}

/// How one round is made.
struct Style {
  bool e4m3 = false, exact = false, split = false, residual = false, weighted = true, values = false;
  std::optional<Order> quantized = {};  ///< x is E4M3, with scales of that order
};

/// x is BF16, to be quantised on the way, or E4M3.
inline std::optional<Order> random_x(bool e4m3, std::mt19937& rng) {
  const unsigned kind = rng() % 3;
  if (!e4m3 || kind == 0) return {};
  return kind == 1 ? Order::row_major : Order::col_major;
}

inline void run_round(std::vector<ExpertParallel>& eps, const EpProblem& p, const Style& style, unsigned seed) {
  const int n = p.num_ranks();
  std::vector<EpRows> expected;
  for (int r = 0; r < n; ++r) expected.push_back(reference_rows(p, r));
  std::vector<std::unique_ptr<Rank>> ranks(n);
  on_ranks(n, [&](int r) {
    ExpertParallel& ep = eps[r];
    std::vector<int> handle(ep.handle_words(), -77);
    std::int64_t capacity = std::min<std::int64_t>(ep.max_rows(), ssize(expected[r].rows) + 3);
    if (style.exact) {
      Rank probe(p, r, ep, 0, style.e4m3);
      probe.args.handle = vector_of(handle.data(), DType::int32, ssize(handle));
      ep.route(probe.args);
      capacity = ep.num_rows(probe.args.handle);
      ASSERT_EQ(capacity, ssize(expected[r].rows));
    }
    ranks[r] = std::make_unique<Rank>(p, r, ep, capacity, style.e4m3, style.quantized);
    Rank& mine = *ranks[r];
    if (style.exact) {
      mine.handle = handle;
      mine.args.topk_idx.reset();
      mine.args.topk_weights.reset();
    }
    if (style.split) {
      mine.args.part = EpPart::send;
      ep.dispatch(mine.args);
      mine.args.part = EpPart::recv;
    }
    ep.dispatch(mine.args);
    expect_rows(p, mine, expected[r], style.e4m3);

    std::mt19937 rng(seed + r);
    mine.expert_rows.fill([&](auto, auto) { return cpu::from_f32<cpu::Bf16>(random_bf16(rng)); });
    mine.residual.fill([&](auto, auto) { return cpu::from_f32<cpu::Bf16>(random_bf16(rng)); });
    for (float& value : mine.row_values) value = random_bf16(rng);
    if (style.residual) mine.combine.residual = mine.residual.tensor();
    mine.combine.weighted = style.weighted;
    if (style.values) {
      mine.combine.row_values = vector_of(mine.row_values.data(), DType::f32, capacity);
      mine.combine.topk_values = row_major(mine.topk_values.data(), DType::f32, p.tokens[r], p.config.topk);
    }
    if (style.split) {
      mine.combine.part = EpPart::send;
      ep.combine(mine.combine);
      mine.combine.part = EpPart::recv;
    }
    ep.combine(mine.combine);
  });
  if (::testing::Test::HasFatalFailure()) return;

  for (int r = 0; r < n; ++r) {
    Rank& mine = *ranks[r];
    std::vector<float> residual, row_buffer(p.config.hidden);
    for (int i = 0; i < p.tokens[r] * p.config.hidden; ++i)
      residual.push_back(float(mine.residual.value(i / p.config.hidden, i % p.config.hidden)));
    const auto row = [&](int rank, int i) {
      return [&, rank, i](int h) { return float(ranks[rank]->expert_rows.value(i, h)); };
    };
    struct Lookup {
      std::function<float(int)> f;
      float operator[](int h) const { return f(h); }
    };
    const auto sums = reference_sums(
        p, r, expected, [&](int rank, int i) { return Lookup{row(rank, i)}; }, style.residual ? &residual : nullptr,
        style.weighted);
    for (std::size_t i = 0; i < sums.size(); ++i)
      ASSERT_EQ(mine.out.at(i / p.config.hidden, i % p.config.hidden).bits, sums[i])
          << "rank " << r << " element " << i;
    mine.out.expect_frame_intact();
    if (!style.values) continue;
    std::vector<float> values(mine.topk_values.size(), 0);
    for (int q = 0; q < n; ++q)
      for (std::size_t i = 0; i < expected[q].rows.size(); ++i)
        if (const EpRow& at = expected[q].rows[i]; at.source == r)
          values[at.token * p.config.topk + at.k] = ranks[q]->row_values[i];
    ASSERT_EQ(mine.topk_values, values);
  }
}

inline std::vector<ExpertParallel> make_all(std::vector<Group>& groups, const ExpertParallelConfig& config) {
  std::vector<std::optional<ExpertParallel>> made(groups.size());
  on_ranks(int(groups.size()), [&](int r) { made[r].emplace(groups[r], config); });
  std::vector<ExpertParallel> eps;
  for (auto& ep : made) eps.push_back(std::move(*ep));
  return eps;
}

/// With two buffers: each rank sends the next tokens, and the next sums, before it receives the last ones.
inline void send_ahead(std::vector<ExpertParallel>& eps, std::mt19937& rng) {
  constexpr int kRounds = 6;
  const ExpertParallelConfig& config = eps.front().config();
  const int n = static_cast<int>(eps.size());
  std::vector<EpProblem> problems;
  for (int i = 0; i < kRounds; ++i) problems.push_back(random_problem(n, config, rng));
  on_ranks(n, [&](int r) {
    std::vector<std::unique_ptr<Rank>> rounds;
    for (const EpProblem& p : problems)
      rounds.push_back(std::make_unique<Rank>(p, r, eps[r], eps[r].max_rows(), false));
    const auto in_turns = [&](auto run) {
      run(0, EpPart::send);
      for (int i = 1; i < kRounds; ++i) run(i, EpPart::send), run(i - 1, EpPart::recv);
      run(kRounds - 1, EpPart::recv);
    };
    in_turns([&](int i, EpPart part) {
      rounds[i]->args.part = part;
      eps[r].dispatch(rounds[i]->args);
    });
    for (int i = 0; i < kRounds; ++i) expect_rows(problems[i], *rounds[i], reference_rows(problems[i], r), false);
    in_turns([&](int i, EpPart part) {
      Rank& mine = *rounds[i];
      mine.expert_rows.fill([&](auto, auto) { return cpu::from_f32<cpu::Bf16>(1.0f); });
      mine.combine.weighted = false;
      mine.combine.part = part;
      eps[r].combine(mine.combine);
    });
    for (int i = 0; i < kRounds; ++i)  // a token's sum is how many experts it has
      for (int t = 0; t < problems[i].tokens[r]; ++t) {
        const auto* topk = &problems[i].topk[r][t * config.topk];
        const auto has_expert = [&](std::int64_t e) { return e >= 0 && e < config.num_experts; };
        ASSERT_EQ(float(rounds[i]->out.value(t, 0)), std::count_if(topk, topk + config.topk, has_expert)) << t;
      }
  });
}

/// With two buffers: rank 0 has sent BF16 and then E4M3 when rank 1 first expects E4M3.
inline void expect_other_types_named_later(const ExpertParallelConfig& config) {
  std::mt19937 rng(kSeed);
  auto groups = Group::local(cpus(2), kPatient);
  auto eps = make_all(groups, config);
  const EpProblem p = random_problem(2, config, rng);
  const auto quantized = [](bool e4m3) { return e4m3 ? std::optional(Order::row_major) : std::nullopt; };
  on_ranks(2, [&](int r) {
    std::vector<std::unique_ptr<Rank>> sent;
    for (const bool e4m3 : {false, true}) {
      if (r != 0) break;
      Rank& mine = *sent.emplace_back(std::make_unique<Rank>(p, r, eps[r], eps[r].max_rows(), e4m3, quantized(e4m3)));
      mine.args.part = EpPart::send;
      eps[r].dispatch(mine.args);
    }
    groups[r].barrier();
    Rank mine(p, r, eps[r], eps[r].max_rows(), true, quantized(true));
    if (r == 1)
      expect_error(ErrorCode::invalid_argument, {"peer 0", "expected e4m3 tokens", "sent bf16 tokens"},
                   [&] { eps[r].dispatch(mine.args); });
  });
}

/// A dispatch, or a combine, whose two halves are one call, while a send of the same kind has not been received.
inline void expect_refused_between_halves(const ExpertParallelConfig& config) {
  std::mt19937 rng(kSeed);
  for (const bool combines : {false, true}) {
    auto groups = Group::local(cpus(2), kPatient);
    auto eps = make_all(groups, config);
    const EpProblem p = random_problem(2, config, rng);
    on_ranks(2, [&](int r) {
      Rank mine(p, r, eps[r], eps[r].max_rows(), false);
      const auto run = [&](EpPart part) {
        mine.args.part = mine.combine.part = part;
        combines ? eps[r].combine(mine.combine) : eps[r].dispatch(mine.args);
      };
      if (combines) eps[r].dispatch(mine.args);
      run(EpPart::send);
      expect_error(ErrorCode::invalid_argument,
                   {combines ? "a combine while 1 of its sends" : "a dispatch while 1 of its sends", "expected none"},
                   [&] { run(EpPart::both); });
    });
  }
}

}  // namespace phalanx::test
