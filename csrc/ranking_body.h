// The pairs of one group, shared by ranking_loss.cpp, ranking_loss.cu and selftest_ranking.cpp.
//
// A lane holds one output of the group and walks all outputs j of the group in order:
//
//   margin = s_winner - s_loser         cost = max(-margin, 0) + log1p(exp(-|margin|))
//   pull   = sigmoid(-margin)           d_lane -= pull as a winner, += pull as a loser
//
// A pair of equal ranks adds nothing. The cost is counted by the winner's lane. Both lanes of a pair
// compute it, so that each output's gradient is one lane's sum, in the order of j, whatever the
// number of lanes: no two lanes write one number.
//
// L names what a lane's numbers are: `Lanes<vf>` of the C++ op is a vector, `OneLane<A>` below a
// scalar, a GPU's thread.
#pragma once

#include <cstdint>

#include "common.h"

#ifndef FASTRLHF_HD
#if defined(__CUDACC__)
#define FASTRLHF_HD __host__ __device__ __forceinline__
#else
#define FASTRLHF_HD inline __attribute__((always_inline))
#endif
#endif

namespace fastrlhf {

constexpr const char* BAD_SIZES =
    "group_sizes must be at least 0 and add up to the number of scores";

}  // namespace fastrlhf

namespace fastrlhf::FASTRLHF_ISA {
namespace {

struct RankSums {  // of a group, or of many
  double loss = 0, pairs = 0, right = 0;

  FASTRLHF_HD void add(const RankSums& part) {
    loss += part.loss;
    pairs += part.pairs;
    right += part.right;
  }
};

// 1 / C(K, 2)
template <class A>
FASTRLHF_HD A pair_weight(int64_t K) {
  const A pairs = static_cast<A>(K) * static_cast<A>(K - 1) / A(2);
  return A(1) / (pairs < A(1) ? A(1) : pairs);
}

// What the lanes have against all outputs of their group; `d` is not yet weighted.
template <class L>
struct LaneSums {
  typename L::V d{};
  typename L::Loss loss{};
  typename L::Tally pairs{}, right{};

  FASTRLHF_HD void walk(typename L::V score, const typename L::Ranks& rank, typename L::M valid,
                        const typename L::A* scores, const int64_t* ranks, int64_t K) {
    using V = typename L::V;
    using M = typename L::M;
    const V zero = L::splat(0), one = L::splat(1);
    for (int64_t j = 0; j < K; ++j) {
      const M wins = valid & L::less(rank, ranks[j]), loses = valid & L::greater(rank, ranks[j]);
      const V gap = score - L::splat(scores[j]);
      const V margin = L::select(wins, gap, L::select(loses, -gap, zero));
      const M ordered = margin > zero;  // a NaN is not, nor is its negative
      const V e = L::exp(L::select(ordered, -margin, margin));  // of -|margin|: no more than 1
      loss.add(L::select(wins, L::select(ordered, zero, -margin) + L::log1p(e), zero));
      const V pull = L::select(ordered, e, one) / (one + e);
      d += L::select(wins, -pull, L::select(loses, pull, zero));
      L::count(pairs, wins);
      L::count(right, wins & ordered);
    }
  }
};

template <class A_>
struct OneLane {
  using A = A_;
  using V = A;
  using M = bool;
  using Ranks = int64_t;
  using Tally = int64_t;
  struct Loss {
    double sum = 0;
    FASTRLHF_HD void add(A x) { sum += static_cast<double>(x); }
  };

  static FASTRLHF_HD V splat(A x) { return x; }
  static FASTRLHF_HD M less(int64_t a, int64_t b) { return a < b; }
  static FASTRLHF_HD M greater(int64_t a, int64_t b) { return a > b; }
  static FASTRLHF_HD V select(M m, V a, V b) { return m ? a : b; }
  static FASTRLHF_HD void count(Tally& n, M m) { n += m ? 1 : 0; }
#if defined(__CUDA_ARCH__)
  static __device__ __forceinline__ float exp(float x) { return ::expf(x); }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ float log1p(float x) { return ::log1pf(x); }
  static __device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
#else
  static FASTRLHF_HD float exp(float x) { return __builtin_expf(x); }
  static FASTRLHF_HD double exp(double x) { return __builtin_exp(x); }
  static FASTRLHF_HD float log1p(float x) { return __builtin_log1pf(x); }
  static FASTRLHF_HD double log1p(double x) { return __builtin_log1p(x); }
#endif
};

// ---- how a warp and a block of a GPU share the work; selftest_ranking.cpp plays it on a CPU

constexpr int RANK_WARP = 32;
constexpr int RANK_SUM_THREADS = 256;  // of the block that adds the groups

// Lane `lane` of the warp that has a group: outputs lane, lane + 32, ...; their gradients too.
template <class A>
FASTRLHF_HD RankSums rank_lane(const A* scores, const int64_t* ranks, A* gradient, int64_t K,
                               int lane) {
  LaneSums<OneLane<A>> sums;
  const A weight = pair_weight<A>(K);
  for (int64_t i = lane; i < K; i += RANK_WARP) {
    sums.d = A(0);
    sums.walk(scores[i], ranks[i], true, scores, ranks, K);
    if (gradient != nullptr) gradient[i] = sums.d * weight;
  }
  RankSums result;
  result.loss = sums.loss.sum * static_cast<double>(weight);
  result.pairs = static_cast<double>(sums.pairs);
  result.right = static_cast<double>(sums.right);
  return result;
}

// Where a group begins, a lane's part of the sum: the sizes before it at lane, lane + 32, ...
FASTRLHF_HD int64_t rank_start_part(const int64_t* group_sizes, int64_t g, int lane) {
  int64_t before = 0;
  for (int64_t h = lane; h < g; h += RANK_WARP) before += group_sizes[h];
  return before;
}

// Sizes that do not fit read nothing out of bounds; their result means nothing.
FASTRLHF_HD int64_t rank_held(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Thread `thread` of the block that adds the groups: groups thread, thread + 256, ...
FASTRLHF_HD RankSums rank_thread(const RankSums* groups, int64_t G, int thread) {
  RankSums sums;
  for (int64_t g = thread; g < G; g += RANK_SUM_THREADS) sums.add(groups[g]);
  return sums;
}

// The results from the sums over all groups; stats: pair_accuracy, pairs, inverse normalizer.
template <class A>
FASTRLHF_HD void rank_results(const RankSums& all, double divisor, A* loss, A* stats) {
  const double scale = all.pairs == 0.0 ? 0.0 : 1.0 / divisor;
  *loss = static_cast<A>(all.pairs == 0.0 ? 0.0 : all.loss * scale);
  stats[0] = static_cast<A>(all.right / (all.pairs < 1.0 ? 1.0 : all.pairs));
  stats[1] = static_cast<A>(all.pairs);
  stats[2] = static_cast<A>(scale);
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
