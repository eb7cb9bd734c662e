// The row routine of every op with log-probs: logprobs_from_logits, the linear_* ops and sample.
//
// A row of V logits is read in tiles of ROW_TILE, aligned at absolute columns, each twice: once for
// its maximum, once, from cache, for the sums over its exponentials. With d_j = z_j - max:
//
//   total = 1 + rest,  rest = sum exp(d_j / T) over all j but one instance of the maximum
//   log p_y = d_y / T - log1p(rest)                 keeps its relative precision as p_y -> 1
//   entropy = log1p(rest) - mean / T,  mean = moment / total,  moment = sum exp(d_j / T) d_j
//
// Tiles are combined from left to right, so a row's bits depend on nothing but the row. A tile of
// nothing but -inf is passed over; a row of nothing but -inf, or with a NaN or a +inf, has rest NaN.
//
// The maximum is subtracted before scaling: exp(d / T) = 2^(d (hi + lo)), hi + lo = log2(e) / T in
// twice the precision, costs no digits for a large offset and one fused multiply-add for any T.
//
// z = cap tanh(scale (x + bias) / cap), where a cap is given, made tile by tile in a buffer.
#pragma once

#ifdef FASTRLHF_ISA

#include "vec.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t ROW_TILE = 4096;  // 16 KiB of floats: half of a small level-1 cache
constexpr int64_t SUM_BLOCK = 32;   // vectors that are summed one after another

template <class A>
constexpr A INF = static_cast<A>(__builtin_inf());
template <class A>
constexpr A NOT_A_NUMBER = static_cast<A>(__builtin_nan(""));

template <class A>
constexpr A SMALLEST = static_cast<A>(sizeof(A) == 4 ? 0x1p-126 : 0x1p-1022);  // normal number

// ---- exp(d / T) for d <= 0

template <class A>
struct Exponent {
  A temperature, hi, lo;
  explicit Exponent(A t) : temperature(t) {
    const double c = 1.4426950408889634 / static_cast<double>(t);
    hi = static_cast<A>(c);
    lo = static_cast<A>(c - static_cast<double>(hi));
  }
};

// Where the result underflows to 0, d becomes 0 too: 0 log 0 = 0, and no 0 * inf.
FASTRLHF_INLINE vf exp_scaled(vf& d, const Exponent<float>& t) {
  const vf y = d * t.hi;
  const vi zero = y < -150.0f;
  d = zero ? vf{} : d;
  const vf n = round_to_whole(zero ? vf{} : y);
  const vf f = vfma(d, vf{} + t.lo, vfma(d, vf{} + t.hi, -n));
  const vf result = exp2_of_parts(n, f);
  return zero ? vf{} : result;
}

FASTRLHF_INLINE vd exp_scaled(vd& d, const Exponent<double>& t) {
  const vd y = d / t.temperature;
  const vl zero = y < -746.0;
  d = zero ? vd{} : d;
  const vd result = vexp(zero ? vd{} : y);
  return zero ? vd{} : result;
}

// ---- tanh(a) and its derivative, both to a few ulp

FASTRLHF_INLINE vf tanh_slope(vf a, vf& slope) {
  // With e = exp(-2|a|) and E = e - 1: tanh|a| = -E / (2 + E), slope = 4 e / (1 + e)^2.
  const vf size = a < 0.0f ? -a : a;
  const vi flat = size > 40.0f;
  const vf y = flat ? vf{} : -2.0f * size;
  const vf n = round_to_whole(y * 0x1.715476p+0f);
  const vf r = vfma(n, vf{} - LN2_LO, vfma(n, vf{} - LN2_HI, y));
  const vf p = expm1_of_remainder(r);
  const vf power = scale_by_pow2(vf{} + 1.0f, n);
  const vf E = vfma(p, power, power - 1.0f);
  const vf e = vfma(p, power, power);
  const vf t = flat ? vf{} + 1.0f : -E / (2.0f + E);
  slope = flat ? vf{} : 4.0f * e / ((1.0f + e) * (1.0f + e));
  return a < 0.0f ? -t : t;
}

FASTRLHF_INLINE vd tanh_slope(vd a, vd& slope) {
  vd t{};
  for (int i = 0; i < lanes<vd>; ++i) {
    const double e = s_exp(-2.0 * s_abs(a[i]));
    t[i] = s_tanh(a[i]);
    slope[i] = 4.0 * e / ((1.0 + e) * (1.0 + e));
  }
  return t;
}

// ---- z from x

template <class A>
struct Head {
  const A* bias;  // of the first column, or nullptr
  A scale, cap;   // cap 0: none

  bool plain() const { return bias == nullptr && scale == A(1) && cap == A(0); }

  template <class V>
  V apply(V x, V b, V& slope) const {
    V z = (x + b) * scale;
    slope = splat<V>(scale);
    if (cap != A(0)) {
      V inner;
      z = cap * tanh_slope(z / cap, inner);
      slope = slope * inner;
    }
    return z;
  }

  // n values of z, and of dz/dx where `slopes` is not null.
  template <class T>
  void fill(const T* x, int64_t first, int64_t n, A* z, A* slopes) const {
    using V = vec_t<A>;
    constexpr int W = lanes<V>;
    V slope;
    for (int64_t i = 0; i < n; i += W) {
      const int64_t k = min_of<int64_t>(W, n - i);
      const V b = bias == nullptr ? V{}
                  : k == W       ? load(bias + first + i)
                                 : load_n(bias + first + i, k, A(0));
      const V y = apply(k == W ? load(x + i) : load_n(x + i, k, A(0)), b, slope);
      if (k == W) {
        store(z + i, y);
        if (slopes != nullptr) store(slopes + i, slope);
      } else {
        store_n(z + i, y, k);
        if (slopes != nullptr) store_n(slopes + i, slope, k);
      }
    }
  }

  // z of one column, the bits that `fill` gives.
  template <class T>
  A one(const T* x, int64_t column, A& slope_out) const {
    using V = vec_t<A>;
    const V b = bias == nullptr ? V{} : splat<V>(bias[column]);
    V slope;
    const V z = apply(splat<V>(to_acc(x[column])), b, slope);
    slope_out = slope[0];
    return z[0];
  }
};

// ---- the state of a row

template <class A>
struct RowState {
  A max, rest, moment;
  bool empty() const { return max == -INF<A> && rest == A(0); }
};

template <class T>
acc_t<T> tile_max(const T* x, int64_t n) {  // NaN does not count
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int W = lanes<V>;
  V top[4];
  for (V& t : top) t = splat<V>(-INF<A>);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int k = 0; k < 4; ++k) top[k] = vmax(load(x + i + k * W), top[k]);
  }
  for (; i + W <= n; i += W) top[0] = vmax(load(x + i), top[0]);
  if (i < n) top[1] = vmax(load_n(x + i, n - i, -INF<A>), top[1]);
  return hmax(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

template <bool MOMENT, class T>
RowState<acc_t<T>> tile_state(const T* x, int64_t n, const Exponent<acc_t<T>>& t) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int W = lanes<V>;
  const A max = tile_max(x, n);
  if (max == INF<A>) return {max, NOT_A_NUMBER<A>, NOT_A_NUMBER<A>};
  if (max == -INF<A>) {
    for (int64_t i = 0; i < n; ++i) {
      const A v = to_acc(x[i]);
      if (v != v) return {max, v, v};
    }
    return {max, A(0), A(0)};
  }
  // Equals of the maximum are counted, not summed: one of them is the 1 of the total. Padding lanes
  // hold -inf and give 0. Sums of sums: a thousand equal terms would all be rounded the same way.
  V rest{}, ties{}, moment{};
  for (int64_t begin = 0; begin < n; begin += SUM_BLOCK * W) {
    V rests[2] = {V{}, V{}}, moments[2] = {V{}, V{}};
    const auto add = [&](V v, int k) {
      const auto is_max = v == max;
      V d = v - max;
      const V e = exp_scaled(d, t);
      rests[k] += is_max ? V{} : e;
      ties += is_max ? splat<V>(A(1)) : V{};
      if constexpr (MOMENT) moments[k] = vfma(e, d, moments[k]);
    };
    const int64_t end = min_of(n, begin + SUM_BLOCK * W);
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) {
      add(load(x + i), 0);
      add(load(x + i + W), 1);
    }
    for (; i < end; i += W) add(i + W <= end ? load(x + i) : load_n(x + i, end - i, -INF<A>), 0);
    rest += rests[0] + rests[1];
    if constexpr (MOMENT) moment += moments[0] + moments[1];
  }
  return {max, hsum(rest) + (hsum(ties) - A(1)), MOMENT ? hsum(moment) : A(0)};
}

template <class A>
RowState<A> combine(const RowState<A>& a, const RowState<A>& b, A temperature) {
  if (b.empty()) return a;
  if (a.empty()) return b;
  const RowState<A>& big = a.max >= b.max ? a : b;
  const RowState<A>& small = a.max >= b.max ? b : a;
  const A d = small.max - big.max;
  const A e = d == A(0) ? A(1) : s_exp(d / temperature);
  const A total = A(1) + small.rest;
  const A moved = e == A(0) ? small.rest * A(0) : e * (small.moment + total * d);
  return {big.max, big.rest + total * e, big.moment + moved};
}

// The state of a row with V more columns behind it; the first of them is `first` of the bias.
template <class T>
void scan_row(RowState<acc_t<T>>& state, const T* x, int64_t V, const Head<acc_t<T>>& head,
              const Exponent<acc_t<T>>& t, bool moment) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < V; c += ROW_TILE) {
    const int64_t n = min_of(ROW_TILE, V - c);
    RowState<A> tile;
    if (head.plain()) {
      tile = moment ? tile_state<true>(x + c, n, t) : tile_state<false>(x + c, n, t);
    } else {
      A z[ROW_TILE];
      head.fill(x + c, c, n, z, static_cast<A*>(nullptr));
      tile = moment ? tile_state<true>(z, n, t) : tile_state<false>(z, n, t);
    }
    state = combine(state, tile, t.temperature);
  }
}

template <class A>
A row_logprob(const RowState<A>& state, A z, A temperature) {
  return (z - state.max) / temperature - s_log1p(state.rest);
}

template <class A>
A row_entropy(const RowState<A>& state, A temperature) {
  return s_log1p(state.rest) - state.moment / temperature / (A(1) + state.rest);
}

// ---- the gradient of a row
//
//   dz_j = (grad_j - grad p_j - grad_entropy p_j (d_j / T - mean / T)) / T
//
// grad_j the upstream gradients of labels equal to j, grad their sum over all j. log p_j + entropy
// is d_j / T - mean / T without the log-total, which cancels.

template <class A>
struct RowGradient {
  A inverse, at_zero, by_d;  // dz_j = e_j (at_zero + by_d d_j) without grad_j

  RowGradient(const RowState<A>& state, A temperature, A grad, A grad_entropy) {
    inverse = A(1) / (A(1) + state.rest);
    const A mean = state.moment / temperature * inverse;
    at_zero = -(grad - grad_entropy * mean) * inverse / temperature;
    by_d = -grad_entropy * inverse / (temperature * temperature);
  }
};

// dx may be x.
template <class T>
void gradient_tile(const T* x, int64_t n, const acc_t<T>* z, const acc_t<T>* slopes, T* dx,
                   acc_t<T> max, const RowGradient<acc_t<T>>& g, const Exponent<acc_t<T>>& t) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int W = lanes<V>;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t k = min_of<int64_t>(W, n - i);
    V d = (z != nullptr ? (k == W ? load(z + i) : load_n(z + i, k, A(0)))
                        : (k == W ? load(x + i) : load_n(x + i, k, A(0)))) -
          max;
    const V e = exp_scaled(d, t);
    V dz = e * vfma(d, splat<V>(g.by_d), splat<V>(g.at_zero));
    if (slopes != nullptr) dz = dz * (k == W ? load(slopes + i) : load_n(slopes + i, k, A(0)));
    // Denormals make the matrix products that follow up to a hundred times slower.
    dz = (dz < SMALLEST<A>) & (dz > -SMALLEST<A>) ? V{} : dz;
    if (k == W) {
      store(dx + i, dz);
    } else {
      store_n(dx + i, dz, k);
    }
  }
}

// V columns from global column `first` on; labels (K) are global. dx may be x if K <= 8.
template <class T>
void gradient_row(const RowState<acc_t<T>>& state, const T* x, T* dx, int64_t V, int64_t first,
                  const int64_t* labels, const acc_t<T>* grads, int64_t K, int64_t ignore_index,
                  acc_t<T> grad_entropy, const Head<acc_t<T>>& head,
                  const Exponent<acc_t<T>>& t) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  A grad = 0;
  bool valid = false, still = grad_entropy == A(0);
  for (int64_t k = 0; k < K; ++k) {
    if (labels[k] == ignore_index) continue;
    grad += grads[k];
    valid = true;
    still = still && grads[k] == A(0);
  }
  // Nothing flows into an ignored row, whatever it holds, nor out of one without upstream gradient;
  // but a NaN stays visible.
  if (!valid || (still && state.rest == state.rest)) {
    __builtin_memset(static_cast<void*>(dx), 0, static_cast<uint64_t>(V) * sizeof(T));
    return;
  }
  const A at = t.temperature;
  const RowGradient<A> g(state, at, grad, grad_entropy);

  // The labels' own columns: 1 - p is rest / total at the maximum, without cancellation. They are
  // computed first, since dx may be x, and written last.
  const auto own_column = [&](int64_t k) -> A {
    const int64_t j = labels[k] - first;
    A own = 0, others = 0, slope;
    for (int64_t i = 0; i < K; ++i) {
      if (labels[i] == ignore_index) continue;
      (labels[i] == labels[k] ? own : others) += grads[i];
    }
    const A z = head.one(x, j, slope);
    Vec d = splat<Vec>(z - state.max);
    const A p = exp_scaled(d, t)[0] * g.inverse;
    const A q = z == state.max ? state.rest * g.inverse : A(1) - p;
    const A mean = state.moment / at * g.inverse;
    return (own * q - others * p - grad_entropy * p * (d[0] / at - mean)) / at * slope;
  };
  const auto here = [&](int64_t k) {
    return labels[k] != ignore_index && labels[k] >= first && labels[k] < first + V;
  };
  constexpr int64_t FEW = 8;
  A columns[FEW];
  for (int64_t k = 0; k < min_of(K, FEW); ++k) columns[k] = here(k) ? own_column(k) : A(0);

  for (int64_t c = 0; c < V; c += ROW_TILE) {
    const int64_t n = min_of(ROW_TILE, V - c);
    if (head.plain()) {
      gradient_tile(x + c, n, static_cast<const A*>(nullptr), static_cast<const A*>(nullptr),
                    dx + c, state.max, g, t);
    } else {
      A z[ROW_TILE], slopes[ROW_TILE];
      head.fill(x + c, c, n, z, slopes);
      gradient_tile(x + c, n, z, slopes, dx + c, state.max, g, t);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    if (here(k)) put(dx + (labels[k] - first), k < FEW ? columns[k] : own_column(k));
  }
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
