// Expert parallelism, obviously: every rank's tokens in one place, sorted. Exact, but for the weighted sums, which
// follow the definition in include/phalanx/ep.h step by step.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "cpu/convert.h"
#include "phalanx/phalanx.h"

namespace phalanx::test {

/// What every rank has, for one operation.
struct EpProblem {
  ExpertParallelConfig config;
  std::vector<int> first;   // expert of each rank
  std::vector<int> tokens;  // of each rank
  std::vector<std::vector<std::int64_t>> topk;
  std::vector<std::vector<float>> weights;
  std::vector<std::vector<float>> x;  // [T, H], values that are BF16

  int num_ranks() const { return static_cast<int>(tokens.size()); }
  int rank_of(std::int64_t expert) const {
    for (int r = 0; r < num_ranks(); ++r)
      if (expert >= first[r] && expert < first[r + 1]) return r;
    return -1;
  }
  int num_local(int rank) const { return first[rank + 1] - first[rank]; }
};

inline float random_bf16(std::mt19937& rng) {
  return cpu::to_f32(cpu::from_f32<cpu::Bf16>(std::normal_distribution<float>()(rng)));
}

/// `none`: how many of 100 choices are -1 or out of range. `hot`: how many go to expert 0.
inline EpProblem random_problem(int num_ranks, const ExpertParallelConfig& config, std::mt19937& rng, int none = 10,
                                int hot = 0) {
  EpProblem p;
  p.config = config;
  p.first.assign(1, 0);
  for (int r = 0; r < num_ranks; ++r) {
    const int even = config.num_experts / num_ranks + (r < config.num_experts % num_ranks);
    p.first.push_back(p.first[r] + (config.experts_per_rank.empty() ? even : config.experts_per_rank[r]));
  }
  for (int r = 0; r < num_ranks; ++r) {
    const int tokens = rng() % 5 == 0 ? 0 : rng() % 5 == 1 ? config.max_tokens : int(rng() % (config.max_tokens + 1));
    p.tokens.push_back(tokens);
    auto& topk = p.topk.emplace_back();
    for (int i = 0; i < tokens * config.topk; ++i) {
      const int dice = int(rng() % 100);
      topk.push_back(dice < none         ? (dice % 2 ? -1 : config.num_experts + 7)
                     : dice < none + hot ? 0
                                         : std::int64_t(rng() % config.num_experts));
    }
    auto& weights = p.weights.emplace_back();
    for (int i = 0; i < tokens * config.topk; ++i) weights.push_back(std::uniform_real_distribution<float>()(rng));
    auto& x = p.x.emplace_back();
    for (int i = 0; i < tokens * config.hidden; ++i) x.push_back(random_bf16(rng));
  }
  return p;
}

/// A row of a rank: where it comes from.
struct EpRow {
  int expert, source, token, k;
};

/// Rank r's rows; padding has source -1.
struct EpRows {
  std::vector<EpRow> rows;
  std::vector<int> offsets, counts;
};

inline EpRows reference_rows(const EpProblem& p, int rank) {
  std::vector<std::tuple<int, int, int, int>> sorted;
  for (int s = 0; s < p.num_ranks(); ++s)
    for (int t = 0; t < p.tokens[s]; ++t)
      for (int k = 0; k < p.config.topk; ++k)
        if (const std::int64_t e = p.topk[s][t * p.config.topk + k]; p.rank_of(e) == rank)
          sorted.emplace_back(int(e) - p.first[rank], s, t, k);
  std::sort(sorted.begin(), sorted.end());
  EpRows result;
  result.offsets.push_back(0);
  std::size_t next = 0;
  for (int e = 0; e < p.num_local(rank); ++e) {
    int count = 0;
    for (; next < sorted.size() && std::get<0>(sorted[next]) == e; ++next, ++count) {
      const auto [expert, source, token, k] = sorted[next];
      result.rows.push_back({expert, source, token, k});
    }
    result.counts.push_back(count);
    while (result.rows.size() % p.config.alignment) result.rows.push_back({e, -1, -1, -1});
    result.offsets.push_back(static_cast<int>(result.rows.size()));
  }
  return result;
}

/// What combine gives for a rank's tokens: `row(rank, i)` is row i of a rank, H floats.
template <class Row>
std::vector<std::uint16_t> reference_sums(const EpProblem& p, int rank, const std::vector<EpRows>& rows, const Row& row,
                                          const std::vector<float>* residual, bool weighted) {
  const int hidden = p.config.hidden, topk = p.config.topk;
  // The row of each choice, by (rank that holds it): found by search.
  std::vector<int> row_of(p.tokens[rank] * topk, -1);
  for (int r = 0; r < p.num_ranks(); ++r)
    for (std::size_t i = 0; i < rows[r].rows.size(); ++i)
      if (const EpRow& at = rows[r].rows[i]; at.source == rank) row_of[at.token * topk + at.k] = int(i);
  std::vector<std::uint16_t> out;
  for (int t = 0; t < p.tokens[rank]; ++t) {
    for (int h = 0; h < hidden; ++h) {
      float total = 0.0f;
      for (int turn = -1; turn < p.num_ranks(); ++turn) {  // its own, then the others'
        const int r = turn < 0 ? rank : turn;
        if (turn == rank) continue;
        float sum = 0;
        bool any = false;
        for (int k = 0; k < topk; ++k) {
          const int i = t * topk + k;
          if (row_of[i] < 0 || p.rank_of(p.topk[rank][i]) != r) continue;
          any = true;
          sum = std::fma(weighted ? p.weights[rank][i] : 1.0f, row(r, row_of[i])[h], sum);
        }
        if (any) total += r == rank ? sum : cpu::to_f32(cpu::from_f32<cpu::Bf16>(sum));
      }
      if (residual) total += (*residual)[t * hidden + h];
      out.push_back(cpu::from_f32<cpu::Bf16>(total).bits);
    }
  }
  return out;
}

}  // namespace phalanx::test
