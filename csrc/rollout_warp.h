// rollout_advantages by a warp a row: KL and rewards are made as the scan of gae_warp.h meets a
// step, and with it the moments of the row's advantages; and the merge of all rows' moments.
#pragma once

#ifdef FASTRLHF_ISA

#include "gae_warp.h"
#include "reward_body.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

template <class A, class V>
FASTRLHF_WARP V kl_estimate_by(int estimator, V d) {
  switch (estimator) {
    case K2: return kl_estimate<K2, A>(d);
    case K3: return kl_estimate<K3, A>(d);
    case ABS: return kl_estimate<ABS, A>(d);
    default: return kl_estimate<K1, A>(d);
  }
}

template <class W>
FASTRLHF_WARP double sum_of_lanes(lane_t<W, double> x) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) x = x + W::shuffle_down(x, offset);
  return W::broadcast(x, 0);
}

template <class W, class A>
struct RolloutWarpRow {
  using V = lane_t<W, A>;
  using M = lane_t<W, bool>;
  using Wide = lane_t<W, double>;
  using Index = lane_t<W, int64_t>;
  struct Loaded {
    V logprob, ref_logprob, value;
    M inside, valid;
  };

  const A *logprobs, *ref_logprobs, *values;
  const uint8_t* mask;
  A *adv, *ret, *rewards, *kl;
  int64_t T;
  A score, minus_beta;
  int estimator;
  // Of the advantages so far: how many, the first, sums of differences from it and their squares.
  int64_t n = 0;
  double shift = 0;
  Wide sum{}, squares{};

  FASTRLHF_WARP Loaded load(Index t) const {
    const M inside = t >= int64_t(0) && t < T;
    const M valid = W::load(mask, t, inside, uint8_t(0)) != uint8_t(0);
    return {W::load(logprobs, t, inside, A(0)), W::load(ref_logprobs, t, inside, A(0)),
            W::load(values, t, inside, A(0)), inside, valid};
  }
  FASTRLHF_WARP GaeStep<V, M> step(Index t, const Loaded& at) const {
    const V d = at.logprob - at.ref_logprob;
    const V k = select(at.valid, kl_estimate_by<A>(estimator, d), V{});
    V reward = select(at.valid, k * minus_beta, V{});
    // The first valid steps that are met hold the row's last one.
    const int last = n == 0 ? highest_bit(W::ballot(at.valid)) : -1;
    reward = select(W::lane() == last, reward + score, reward);
    W::store(kl, t, at.inside, k);
    W::store(rewards, t, at.inside, reward);
    return {reward, at.value, at.valid, at.valid, GAE_SKIP};
  }
  FASTRLHF_WARP void store(Index t, const Loaded& at, const GaeStep<V, M>& step, V advantage) {
    W::store(adv, t, at.inside, select(at.valid, advantage, V{}));
    W::store(ret, t, at.inside, select(at.valid, advantage + step.value, V{}));
    const unsigned valid = W::ballot(at.valid);
    if (valid == 0u) return;
    const Wide wide = widen(advantage);
    if (n == 0) shift = W::broadcast(wide, highest_bit(valid));
    const Wide gap = select(at.valid, wide - shift, Wide{});
    sum = sum + gap;
    squares = squares + gap * gap;
    n += count_bits(valid);
  }
};

// Count, mean and sum of squared differences from it: of lanes, or of all of them.
template <class D>
struct WarpMoments {
  D n{}, mean{}, m2{};

  // Chan, Golub and LeVeque 1983: the moments of two sets together.
  FASTRLHF_WARP void merge(D part_n, D part_mean, D part_m2) {
    const D both = n + part_n;
    const D share = part_n / select(both > 0.0, both, D{} + 1.0);
    const D gap = part_mean - mean;
    m2 = m2 + part_m2 + gap * gap * n * share;
    mean = mean + gap * share;
    n = both;
  }
};

template <class W, class A>
FASTRLHF_WARP WarpMoments<double> row_moments(const RolloutWarpRow<W, A>& row) {
  WarpMoments<double> found;
  if (row.n == 0) return found;
  const double sum = sum_of_lanes<W>(row.sum), squares = sum_of_lanes<W>(row.squares);
  found.n = static_cast<double>(row.n);
  found.mean = row.shift + sum / found.n;
  const double m2 = squares - sum * (sum / found.n);
  found.m2 = m2 < 0.0 ? 0.0 : m2;  // a NaN stays
  return found;
}

// Of P parts, three doubles each: a lane takes every 32nd, then halves are merged.
template <class W>
FASTRLHF_WARP WarpMoments<double> merge_parts(const double* parts, int64_t P) {
  using D = lane_t<W, double>;
  WarpMoments<D> mine;
  for (int64_t first = 0; first < P; first += WARP) {
    const auto p = W::steps(first);
    const auto inside = p < P;
    mine.merge(W::load(parts, p * int64_t(3), inside, 0.0),
               W::load(parts, p * int64_t(3) + int64_t(1), inside, 0.0),
               W::load(parts, p * int64_t(3) + int64_t(2), inside, 0.0));
  }
  for (int offset = WARP / 2; offset > 0; offset /= 2) {  // lanes past the half hold what is spent
    mine.merge(W::shuffle_down(mine.n, offset), W::shuffle_down(mine.mean, offset),
               W::shuffle_down(mine.m2, offset));
  }
  return {W::broadcast(mine.n, 0), W::broadcast(mine.mean, 0), W::broadcast(mine.m2, 0)};
}

// Part `w` of `warps` of the work of merge_parts.
template <class W>
FASTRLHF_WARP WarpMoments<double> merge_share(const double* parts, int64_t P, int w, int warps) {
  const int64_t share = (P + warps - 1) / warps, begin = share * w;
  const int64_t left = P - begin;
  return merge_parts<W>(parts + 3 * begin, left < share ? left : share);
}

// (x - mean) / sqrt(variance + eps), as whiten's; the mean in two parts, so that x - mean is exact.
template <class A>
struct Whitener {
  A high, low, scale;

  FASTRLHF_HD Whitener(const WarpMoments<double>& all, double eps) {
    const double spread = (all.n > 1.0 ? all.m2 / all.n : 0.0) + eps;
    scale = static_cast<A>(spread == 0.0 ? 0.0 : 1.0 / sqrt_of(spread));
    high = static_cast<A>(all.mean);
    low = static_cast<A>(all.mean - static_cast<double>(high));
  }
  FASTRLHF_HD A operator()(A x) const { return ((x - high) - low) * scale; }

 private:
  static FASTRLHF_HD double sqrt_of(double x) {
#if defined(__CUDACC__)
    return sqrt(x);
#else
    return s_sqrt(x);
#endif
  }
};

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
