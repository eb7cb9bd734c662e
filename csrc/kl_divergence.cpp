// KL(p || q) of two rows of logits, and its gradients; kernels/fastrlhf_kernels/kl_divergence.py has
// the mathematics.
//
// p and q hold N rows of V columns of one type, f32, f64, bf16 or f16, dense along the columns; row n
// of each is at (n / inner) outer + (n % inner) stride. All else is dense and of the type of
// arithmetic: kl (N) and state (5, N): p's maximum and rest, q's, and the shift of the log-ratio.
//
// A pair of rows is read twice: for the two log-sums, then, mostly from the level-2 cache, for the
// terms.
#include "op.h"

FASTRLHF_OP(kl_divergence, "KL(p || q) of each row, in nats.",
            const void* p, const void* q, void* state, void* kl, int64_t N, int64_t V,
            int64_t inner, int64_t p_outer, int64_t p_stride, int64_t q_outer, int64_t q_stride,
            double temperature, int dtype, int nthreads)
FASTRLHF_OP(kl_divergence_backward,
            "dp and dq, contiguous, either of which may be null, from the gradient (N).",
            const void* p, const void* q, const void* state, const void* kl, const void* grad,
            void* dp, void* dq, int64_t N, int64_t V, int64_t inner, int64_t p_outer,
            int64_t p_stride, int64_t q_outer, int64_t q_stride, double temperature, int dtype,
            int nthreads)

#ifdef FASTRLHF_ISA
#include "logprob_row.h"
#include "pool.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_COLUMNS = 8192;  // worth waking a thread for; about 10 us

int64_t offset_of(int64_t n, int64_t inner, int64_t outer, int64_t stride) {
  if (n < inner) return n * stride;
  return (n / inner) * outer + (n % inner) * stride;
}

// (w + exp(-w) - 1) / w^2 for |w| <= 1. vf: minimax in relative error by Remez exchange, 5.4e-9.
FASTRLHF_INLINE vf bregman_series(vf w) {
  vf s = vfma(w, vf{} - 0x1.72d484p-19f, vf{} + 0x1.a8e4c4p-16f);
  s = vfma(s, w, vf{} - 0x1.a031ccp-13f);
  s = vfma(s, w, vf{} + 0x1.6c02f2p-10f);
  s = vfma(s, w, vf{} - 0x1.1110ccp-7f);
  s = vfma(s, w, vf{} + 0x1.55556ep-5f);
  s = vfma(s, w, vf{} - 0x1.555556p-3f);
  return vfma(s, w, vf{} + 0.5f);
}
FASTRLHF_INLINE vd bregman_series(vd w) {
  vd s{};
  for (int k = 20; k >= 2; --k) s = (1.0 - s * w) / static_cast<double>(k);
  return s;
}

template <class A>
struct Rows {
  A max_p, max_q, inverse_p, inverse_q;  // 1 / total
  A offset, offset_error;                // max_p - max_q, exactly, in two parts
  A inverse_temperature, shift;
};

template <class A>
struct Two {
  A high, low;
};

// a - b = high + low exactly (Knuth).
template <class V>
FASTRLHF_INLINE Two<V> exact_difference(V a, V b) {
  const V high = a - b;
  const V back = high - a;
  return {high, (a - (high - back)) - (b + back)};
}

template <class A>
struct Entry {
  using V = vec_t<A>;
  V p, q, w;  // w = log(p / q), 2 where p or q is 0 by a logit of -inf
  V term;     // p w - p + q, never negative
  V p_minus_q;

  Entry(V a, V b, const Rows<A>& r, const Exponent<A>& t) {
    V d = a - r.max_p;
    p = exp_scaled(d, t) * r.inverse_p;
    d = b - r.max_q;
    q = exp_scaled(d, t) * r.inverse_q;
    Two<V> x = exact_difference(a, b);
    x.low = x.low == x.low ? x.low : V{};  // past the largest number
    w = vfma((x.high - r.offset) + (x.low - r.offset_error), splat<V>(r.inverse_temperature),
             splat<V>(-r.shift));
    const A most = static_cast<A>(1e38);  // 0 times it is 0
    w = vmax(splat<V>(-most), vmin(splat<V>(most), w));  // a NaN stays
    w = (a == -INF<A>) | (b == -INF<A>) ? splat<V>(A(2)) : w;
    const auto near = (w < A(1)) & (w > A(-1));
    const V y = near ? w : V{};
    const V k = y * y * bregman_series(y);
    term = near ? p * k : vfma(p, w - A(1), q);
    p_minus_q = near ? p * (y - k) : p - q;
  }
};

template <class T>
void load_both(const T* p, const T* q, int64_t i, int64_t k, vec_t<acc_t<T>>& a,
               vec_t<acc_t<T>>& b) {
  using V = vec_t<acc_t<T>>;
  const bool whole = k >= lanes<V>;
  a = whole ? load(p + i) : load_n(p + i, k, -INF<acc_t<T>>);
  b = whole ? load(q + i) : load_n(q + i, k, -INF<acc_t<T>>);
}

template <class A>
struct Sums {
  A term, p_minus_q;
  bool infinite;
};

template <class T>
Sums<acc_t<T>> sum_terms(const T* p, const T* q, int64_t V, const Rows<acc_t<T>>& rows,
                         const Exponent<acc_t<T>>& given) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  constexpr int W = lanes<Vec>;
  const Rows<A> r = rows;
  const Exponent<A> t = given;
  Sums<A> sums{A(0), A(0), false};
  for (int64_t c = 0; c < V; c += ROW_TILE) {
    const int64_t tile = min_of(V, c + ROW_TILE);
    Vec term{}, difference{}, gone{};
    for (int64_t block = c; block < tile; block += SUM_BLOCK * W) {
      const int64_t end = min_of(tile, block + SUM_BLOCK * W);
      Vec terms{}, differences{};
      for (int64_t i = block; i < end; i += W) {
        Vec a, b;
        load_both(p, q, i, end - i, a, b);
        const Entry<A> e(a, b, r, t);
        terms += e.term;
        differences += e.p_minus_q;
        gone += (b == -INF<A>) & (a > -INF<A>) ? splat<Vec>(A(1)) : Vec{};
      }
      term += terms;
      difference += differences;
    }
    sums.term += hsum(term);
    sums.p_minus_q += hsum(difference);
    sums.infinite = sums.infinite || hsum(gone) > A(0);
  }
  return sums;
}

template <class A>
Rows<A> rows_of(const RowState<A>& p, const RowState<A>& q, A temperature, A shift) {
  const Two<A> offset = exact_difference(p.max, q.max);
  return {p.max, q.max, A(1) / (A(1) + p.rest), A(1) / (A(1) + q.rest), offset.high, offset.low,
          A(1) / max_of(temperature, SMALLEST<A>), shift};
}

// One of the gradients of a row, where kl is finite.
template <bool TO_P, class T>
void gradient(const T* p, const T* q, T* dx, int64_t V, const Rows<acc_t<T>>& rows, acc_t<T> kl,
              acc_t<T> grad, const Exponent<acc_t<T>>& given) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  constexpr int W = lanes<Vec>;
  const Rows<A> r = rows;
  const Exponent<A> t = given;
  const A scale = grad / t.temperature;
  for (int64_t i = 0; i < V; i += W) {
    Vec a, b;
    load_both(p, q, i, V - i, a, b);
    const Entry<A> e(a, b, r, t);
    Vec dz;
    if constexpr (TO_P) {
      dz = e.p * (e.w - kl);
      dz = e.p == A(0) ? Vec{} : dz;  // 0 log 0 = 0
    } else {
      dz = -e.p_minus_q;
    }
    dz = without_denormals(dz * scale);
    i + W <= V ? store(dx + i, dz) : store_n(dx + i, dz, V - i);
  }
}

template <class T>
void fill_row(T* dx, int64_t V, acc_t<T> value) {
  if (dx == nullptr) return;
  for (int64_t i = 0; i < V; ++i) put(dx + i, value);
}

}  // namespace

FASTRLHF_KERNEL(kl_divergence)(const void* p, const void* q, void* state, void* kl, int64_t N,
                               int64_t V, int64_t inner, int64_t p_outer, int64_t p_stride,
                               int64_t q_outer, int64_t q_stride, double temperature, int dtype,
                               int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Head<A> plain{nullptr, A(1), A(0)};
    const Exponent<A> t(static_cast<A>(temperature));
    A* states = static_cast<A*>(state);
    parallel_for(N, GRAIN_COLUMNS / (V + 1) + 1, nthreads, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        const T* row_p = static_cast<const T*>(p) + offset_of(n, inner, p_outer, p_stride);
        const T* row_q = static_cast<const T*>(q) + offset_of(n, inner, q_outer, q_stride);
        RowState<A> s{-INF<A>, A(0), A(0)}, u{-INF<A>, A(0), A(0)};
        scan_row(s, row_p, V, plain, t, false);
        scan_row(u, row_q, V, plain, t, false);
        A shift = s_log1p(s.rest) - s_log1p(u.rest);
        A value = NOT_A_NUMBER<A>;
        const bool empty = s.max == -INF<A> || u.max == -INF<A>;
        if (!empty && s.rest == s.rest && u.rest == u.rest) {
          const Rows<A> rows = rows_of(s, u, t.temperature, shift);
          const Sums<A> sums = sum_terms(row_p, row_q, V, rows, t);
          // p and q both sum to 1. What their difference is off by says by how much the log-sums are:
          // e, which adds e + exp(-e) - 1, or e^2 / 2, to the sum of the terms.
          const A off = -s_log1p(-sums.p_minus_q);
          shift += off;
          value = max_of(sums.term - A(0.5) * off * off, A(0));
          if (sums.infinite) value = INF<A>;
        }
        static_cast<A*>(kl)[n] = value;
        states[n] = s.max;
        states[N + n] = s.rest;
        states[2 * N + n] = u.max;
        states[3 * N + n] = u.rest;
        states[4 * N + n] = shift;
      }
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(kl_divergence_backward)(const void* p, const void* q, const void* state,
                                        const void* kl, const void* grad, void* dp, void* dq,
                                        int64_t N, int64_t V, int64_t inner, int64_t p_outer,
                                        int64_t p_stride, int64_t q_outer, int64_t q_stride,
                                        double temperature, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Exponent<A> t(static_cast<A>(temperature));
    const A* states = static_cast<const A*>(state);
    parallel_for(N, GRAIN_COLUMNS / (V + 1) + 1, nthreads, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        const T* row_p = static_cast<const T*>(p) + offset_of(n, inner, p_outer, p_stride);
        const T* row_q = static_cast<const T*>(q) + offset_of(n, inner, q_outer, q_stride);
        T* row_dp = dp == nullptr ? nullptr : static_cast<T*>(dp) + n * V;
        T* row_dq = dq == nullptr ? nullptr : static_cast<T*>(dq) + n * V;
        const A value = static_cast<const A*>(kl)[n], g = static_cast<const A*>(grad)[n];
        if (!(value < INF<A>) || g == A(0)) {
          const A filling = g == A(0) && value == value ? A(0) : NOT_A_NUMBER<A>;
          fill_row(row_dp, V, filling);
          fill_row(row_dq, V, filling);
          continue;
        }
        const RowState<A> s{states[n], states[N + n], A(0)};
        const RowState<A> u{states[2 * N + n], states[3 * N + n], A(0)};
        const Rows<A> rows = rows_of(s, u, t.temperature, states[4 * N + n]);
        if (row_dp != nullptr) gradient<true>(row_p, row_q, row_dp, V, rows, value, g, t);
        if (row_dq != nullptr) gradient<false>(row_p, row_q, row_dq, V, rows, value, g, t);
      }
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
