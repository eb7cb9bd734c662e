// The row routine of every op with log-probs: logprobs_from_logits, the linear_* ops and sample.
//
// A row of V logits is read once, in blocks of 32 vectors: each for its maximum and then, from the
// level-1 cache, for the sums over its exponentials, while the blocks behind it are prefetched. With
// d_j = z_j - max, max the maximum so far:
//
//   total = 1 + rest,  rest = sum exp(d_j / T) over all j but one instance of the maximum
//   log p_y = d_y / T - log1p(rest)                 keeps its relative precision as p_y -> 1
//   entropy = log1p(rest) - mean / T,  mean = moment / total,  moment = sum exp(d_j / T) d_j
//
// A block with a new maximum rescales the sums, which happens a few times a row. Blocks are aligned
// at absolute columns and added from left to right, so a row's bits depend on nothing but the row. A
// row of nothing but -inf, or with a NaN or a +inf, has rest NaN at its end.
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

constexpr int64_t ROW_TILE = 4096;  // columns whose sums are folded into the row's: 16 KiB of z
constexpr int64_t SUM_BLOCK = 32;   // vectors that are summed one after another
// Ahead of the sums, which keep the processor too busy to run into the next block's cache misses.
// 2 to 8 KiB were equally good.
constexpr int64_t PREFETCH_BYTES = 4096;

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
  A zero_at;  // here and below the result is 0
  explicit Exponent(A t) : temperature(t) {
    const double normal = static_cast<double>(max_of(t, SMALLEST<A>));  // hi stays finite
    const double c = 1.4426950408889634 / normal;
    hi = static_cast<A>(c);
    lo = static_cast<A>(c - static_cast<double>(hi));
    zero_at = normal < 0x1p116 ? static_cast<A>(-151.0 / c) : -INF<A>;  // the float nearest to it
  }
};

#if defined(__AVX512F__)
alignas(64) constexpr float EXP2_OF_32NDS[32] = {  // 2^(k / 32)
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f,
    0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f,
    0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f,
    0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
    0x1.ea4afap+0f, 0x1.f50766p+0f};
#endif

// Where the result underflows to 0, d becomes 0 too: 0 log 0 = 0, and no 0 * inf. Those lanes compute
// 2^0: a denormal product may trap to microcode.
FASTRLHF_INLINE vf exp_scaled(vf& d, const Exponent<float>& t) {
#if defined(__AVX512F__)
  // d log2(e) / T = n + f, n whole 32nds: a table, a polynomial of degree 2 (minimax, 5.4e-8), and
  // scalef, which takes the floor of n. In all 1.7e-7 relative, and exactly 1 at d = 0. Two
  // multiply-adds fewer than a polynomial as good without the table.
  const __mmask16 some = _mm512_cmp_ps_mask(d, vf{} + t.zero_at, _CMP_NLE_UQ);
  d = _mm512_maskz_mov_ps(some, d);
  const vf shifted = vfma(d, vf{} + t.hi, vf{} + 0x1.8p18f);  // its last bits count 32nds
  const vf n = shifted - 0x1.8p18f;
  const vf f = vfma(d, vf{} + t.lo, vfma(d, vf{} + t.hi, -n));
  const vf entry = _mm512_permutex2var_ps(_mm512_load_ps(EXP2_OF_32NDS), bits_as<__m512i>(shifted),
                                          _mm512_load_ps(EXP2_OF_32NDS + 16));
  const vf q = vfma(f, vf{} + 0x1.ebfbdep-3f, vf{} + 0x1.62e584p-1f);
  return _mm512_maskz_scalef_ps(some, vfma(entry * f, q, entry), n);
#else
  const vi zero = d <= t.zero_at;
  d = zero ? vf{} : d;
  const vf n = round_to_whole(d * t.hi);
  const vf f = vfma(d, vf{} + t.lo, vfma(d, vf{} + t.hi, -n));
  const vf result = exp2_of_parts(n, f);
  return zero ? vf{} : result;
#endif
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
  A max, rest, moment;  // -inf, 0, 0 before the first column
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
    V v[4];
    load_pair(x + i, v[0], v[1]);
    load_pair(x + i + 2 * W, v[2], v[3]);
    for (int k = 0; k < 4; ++k) top[k] = vmax(v[k], top[k]);
  }
  for (; i + W <= n; i += W) top[0] = vmax(load(x + i), top[0]);
  if (i < n) top[1] = vmax(load_n(x + i, n - i, -INF<A>), top[1]);
  return hmax(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

// Adds the exponentials of a block to `rest` and `moment`. With TOP the block holds the maximum's
// first instance: equals of it are counted, not summed, since one of them is the 1 of the total.
// Returns what the others count.
template <bool MOMENT, bool TOP, class T>
FASTRLHF_INLINE acc_t<T> add_block(const T* x, int64_t n, acc_t<T> max,
                                   const Exponent<acc_t<T>>& t, vec_t<acc_t<T>>& rest,
                                   vec_t<acc_t<T>>& moment) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int W = lanes<V>;
  V rests[2] = {V{}, V{}}, moments[2] = {V{}, V{}}, ties{};
  const auto add = [&](V v, int k) {
    V d = v - max;
    const V e = exp_scaled(d, t);
    if constexpr (TOP) {
      const auto is_max = v == max;
      rests[k] += is_max ? V{} : e;
      ties += is_max ? splat<V>(A(1)) : V{};
    } else {
      rests[k] += e;
    }
    if constexpr (MOMENT) moments[k] = vfma(e, d, moments[k]);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const char* ahead = reinterpret_cast<const char*>(x + i) + PREFETCH_BYTES;
    constexpr int STEP = 2 * W * static_cast<int>(sizeof(T));
    for (int at = 0; at < STEP; at += 64) __builtin_prefetch(ahead + at);
    V a, b;
    load_pair(x + i, a, b);
    add(a, 0);
    add(b, 1);
  }
  // Padding lanes hold -inf and give 0.
  for (; i < n; i += W) add(i + W <= n ? load(x + i) : load_n(x + i, n - i, -INF<A>), 0);
  // Sums of sums: a thousand equal terms would all be rounded the same way.
  rest += rests[0] + rests[1];
  if constexpr (MOMENT) moment += moments[0] + moments[1];
  return TOP ? hsum(ties) - A(1) : A(0);
}

template <class T>
bool has_nan(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> v = to_acc(x[i]);
    if (v != v) return true;
  }
  return false;
}

// The state of a row with n more columns behind it, n <= ROW_TILE.
template <bool MOMENT, class T>
void add_tile(RowState<acc_t<T>>& s, const T* x, int64_t n, const Exponent<acc_t<T>>& given) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t BLOCK = SUM_BLOCK * lanes<V>;
  const Exponent<A> t = given;  // a local, so that its parts stay in registers
  V rest{}, moment{};           // this tile's part of the sums
  for (int64_t c = 0; c < n; c += BLOCK) {
    const int64_t size = min_of(BLOCK, n - c);
    const A top = tile_max(x + c, size);
    if (!(top > s.max)) {
      if (s.max == -INF<A>) {  // nothing but -inf so far
        if (has_nan(x + c, size)) s.rest = NOT_A_NUMBER<A>;
      } else {
        add_block<MOMENT, false>(x + c, size, s.max, t, rest, moment);
      }
      continue;
    }
    if (s.max != -INF<A>) {
      const A d = s.max - top;
      const A k = s_exp(d / t.temperature);
      if constexpr (MOMENT) {  // d may be -inf where k is 0
        moment = k == A(0) ? rest * k : (moment + rest * d) * k;
        s.moment = k == A(0) ? s.rest * k : (s.moment + (A(1) + s.rest) * d) * k;
      }
      rest = rest * k;
      s.rest = (A(1) + s.rest) * k;
    }
    s.max = top;
    s.rest += add_block<MOMENT, true>(x + c, size, top, t, rest, moment);
    if (top == INF<A>) s.rest = NOT_A_NUMBER<A>;
  }
  s.rest += hsum(rest);
  if constexpr (MOMENT) s.moment += hsum(moment);
}

// The state of a row with V more columns behind it; the first of them is `first` of the bias.
template <class T>
void scan_row(RowState<acc_t<T>>& state, const T* x, int64_t V, const Head<acc_t<T>>& head,
              const Exponent<acc_t<T>>& t, bool moment) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < V; c += ROW_TILE) {
    const int64_t n = min_of(ROW_TILE, V - c);
    if (head.plain()) {
      moment ? add_tile<true>(state, x + c, n, t) : add_tile<false>(state, x + c, n, t);
    } else {
      A z[ROW_TILE];
      head.fill(x + c, c, n, z, static_cast<A*>(nullptr));
      moment ? add_tile<true>(state, z, n, t) : add_tile<false>(state, z, n, t);
    }
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
  A inverse, at_zero, by_d, inverse_temperature;  // dz_j = e_j (at_zero + by_d d_j / T), no grad_j

  RowGradient(const RowState<A>& state, A temperature, A grad, A grad_entropy) {
    inverse = A(1) / (A(1) + state.rest);
    const A mean = state.moment / temperature * inverse;
    at_zero = -(grad - grad_entropy * mean) * inverse / temperature;
    by_d = -grad_entropy * inverse / temperature;
    inverse_temperature = A(1) / max_of(temperature, SMALLEST<A>);  // apart: 1 / T^2 may be no float
  }
};

template <class A>
struct Gradient {
  using V = vec_t<A>;
  A max;
  RowGradient<A> g;
  Exponent<A> t;

  __attribute__((always_inline)) V operator()(V z) const {
    V d = z - max;
    const V e = exp_scaled(d, t);
    return e * vfma(d * g.inverse_temperature, splat<V>(g.by_d), splat<V>(g.at_zero));
  }
};

// Denormals make the matrix products that follow up to a hundred times slower.
template <class V>
FASTRLHF_INLINE V without_denormals(V dz) {
  const elem_t<V> s = SMALLEST<elem_t<V>>;
  return (dz < s) & (dz > -s) ? V{} : dz;
}

// From z and its slopes, dz/dx, of a tile; dx may be x.
template <class T>
void gradient_tile(const acc_t<T>* z, const acc_t<T>* slopes, int64_t n, T* dx,
                   const Gradient<acc_t<T>>& given) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int W = lanes<V>;
  const Gradient<A> gradient = given;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    store(dx + i, without_denormals(gradient(load(z + i)) * load(slopes + i)));
  }
  if (i < n) {
    const V dz = gradient(load_n(z + i, n - i, A(0))) * load_n(slopes + i, n - i, A(0));
    store_n(dx + i, without_denormals(dz), n - i);
  }
}

// Of a whole row where z is x; dx may be x, without STREAM.
template <bool STREAM, class T>
void gradient_of_plain_row(const T* x, int64_t n, T* dx, const Gradient<acc_t<T>>& given) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int W = lanes<V>;
  const Gradient<A> gradient = given;  // a local: dx could alias what is behind a reference
  const auto few = [&](int64_t i, int64_t k) {
    store_n(dx + i, without_denormals(gradient(load_n(x + i, k, A(0)))), k);
  };
  int64_t i = 0;
  if constexpr (STREAM) {
    const uint64_t past = reinterpret_cast<uint64_t>(dx) % VEC_BYTES;
    const int64_t head = past == 0 ? 0 : static_cast<int64_t>((VEC_BYTES - past) / sizeof(T));
    for (const int64_t end = min_of(n, head); i < end; i += W) few(i, min_of<int64_t>(W, end - i));
    i = min_of(n, head);
  }
  for (; i + 2 * W <= n; i += 2 * W) {
    V a, b;
    load_pair(x + i, a, b);
    store_pair<STREAM>(dx + i, without_denormals(gradient(a)), without_denormals(gradient(b)));
  }
  for (; i < n; i += W) few(i, min_of<int64_t>(W, n - i));
  if constexpr (STREAM) fence_stores();
}

// V columns from global column `first` on; labels (K) are global. dx may be x if K <= 8 and not
// `stream`: store past the caches.
template <class T>
void gradient_row(const RowState<acc_t<T>>& state, const T* x, T* dx, int64_t V, int64_t first,
                  const int64_t* labels, const acc_t<T>* grads, int64_t K, int64_t ignore_index,
                  acc_t<T> grad_entropy, const Head<acc_t<T>>& head,
                  const Exponent<acc_t<T>>& t, bool stream) {
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

  const Gradient<A> gradient{state.max, g, t};
  if (head.plain()) {
    stream ? gradient_of_plain_row<true>(x, V, dx, gradient)
           : gradient_of_plain_row<false>(x, V, dx, gradient);
  } else {
    for (int64_t c = 0; c < V; c += ROW_TILE) {
      const int64_t n = min_of(ROW_TILE, V - c);
      A z[ROW_TILE], slopes[ROW_TILE];
      head.fill(x + c, c, n, z, slopes);
      gradient_tile(z, slopes, n, dx + c, gradient);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    if (here(k)) put(dx + (labels[k] - first), k < FEW ? columns[k] : own_column(k));
  }
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
