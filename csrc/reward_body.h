// KL estimates and clamped scores: what kl_penalty, shape_rewards and rollout_advantages share.
//
//   d = x - y;   k1: d   k2: d^2 / 2   k3: expm1(min(-d, 20)) + d   abs: |d|
//
// V is a vector of vec.h, the lanes of a warp (warp.h), or on a GPU a number; A its element.
#pragma once

#include "common.h"

#ifdef FASTRLHF_ISA
#if defined(__CUDACC__)
#include "warp.h"
#else
#include "vec.h"
#endif

namespace fastrlhf {
enum Estimator : int { K1 = 0, K2 = 1, K3 = 2, ABS = 3 };
constexpr const char* BAD_ESTIMATOR = "estimator must be 0 (k1), 1 (k2), 2 (k3) or 3 (abs)";
}  // namespace fastrlhf

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr float MAX_EXPONENT = 20.0f;
constexpr float NEAR = 0.69f;  // below ln 2: above it exp(x) - 1 loses less than two bits

template <int E>
struct EstimatorIs {
  static constexpr int value = E;
};

// Calls f(EstimatorIs<E>{}) for the E that is `estimator`. Returns f's error, or BAD_ESTIMATOR.
template <class F>
inline const char* with_estimator(int estimator, const F& f) {
  switch (estimator) {
    case K1: return f(EstimatorIs<K1>{});
    case K2: return f(EstimatorIs<K2>{});
    case K3: return f(EstimatorIs<K3>{});
    case ABS: return f(EstimatorIs<ABS>{});
    default: return BAD_ESTIMATOR;
  }
}

// (exp(x) - 1 - x) / x^2 for |x| < NEAR: the Taylor series, cut where the rest is below rounding.
template <class A, class V>
FASTRLHF_HD V expm1_tail(V x) {
  V q = V{} + A(1);
  for (int k = sizeof(A) == 8 ? 18 : 10; k > 2; --k) {
    q = q * x * (A(1) / static_cast<A>(k)) + A(1);
  }
  return q * A(0.5);
}

// k3's exponent -d, clamped; where it is near 0 (near != 0) again as `small`, 0 elsewhere.
template <class A, class V>
struct K3Exponent {
  V x;
  decltype(V{} < A(0)) near;
  V small;

  FASTRLHF_HD explicit K3Exponent(V d)
      : x(select(-d > A(MAX_EXPONENT), V{} + A(MAX_EXPONENT), -d)),  // a NaN stays
        near((x < A(NEAR)) & (x > A(-NEAR))),
        small(select(near, x, V{})) {}
};

template <int E, class A, class V>
FASTRLHF_HD V kl_estimate(V d) {
  if constexpr (E == K2) {
    return A(0.5) * d * d;
  } else if constexpr (E == K3) {
    // Near 0 the terms of first order have cancelled before anything is rounded.
    const K3Exponent<A, V> e(d);
    return select(e.near, e.small * e.small * expm1_tail<A>(e.small), (vexp(e.x) - A(1)) + d);
  } else if constexpr (E == ABS) {
    return select(d < A(0), -d, d);
  } else {
    return d;
  }
}

// Its derivative; in k3 -expm1(-d), or 1 where the exponent is clamped.
template <int E, class A, class V>
FASTRLHF_HD V kl_slope(V d) {
  if constexpr (E == K2) {
    return d;
  } else if constexpr (E == K3) {
    const K3Exponent<A, V> e(d);
    const V slope =
        select(e.near, -e.small - e.small * e.small * expm1_tail<A>(e.small), A(1) - vexp(e.x));
    return select(-d > A(MAX_EXPONENT), V{} + A(1), slope);
  } else if constexpr (E == ABS) {
    return select(d > A(0), V{} + A(1), V{}) - select(d < A(0), V{} + A(1), V{});
  } else {
    return V{} + A(1);
  }
}

template <class A>
FASTRLHF_HD A clamp_score(A score, A clip) {  // clip below 0: as it is; a NaN stays
  if (clip < 0) return score;
  return score > clip ? clip : score < -clip ? -clip : score;
}

// The last nonzero byte of mask[begin] to mask[end - 1]; begin - 1 if there is none.
inline int64_t last_valid(const uint8_t* mask, int64_t begin, int64_t end) {
  for (uint64_t eight; end - begin >= 8; end -= 8) {
    __builtin_memcpy(&eight, mask + end - 8, sizeof(eight));
    if (eight != 0) break;
  }
  while (end > begin && mask[end - 1] == 0) --end;
  return end - 1;
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
