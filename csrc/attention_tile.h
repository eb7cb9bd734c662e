// What decode_attention does with a tile of at most TILE_T tokens of one key-value head, for up to
// MAX_HEADS query heads that share the reads.
//
// over_heads(heads, f)         f(Count<NH>{}, h) for blocks of NH of the heads
// Rows<T>                      where the tile's keys and values are
// dots<NH>(...)                scores of NH heads; meanwhile the next tile's rows are fetched
// exponentials(...)            one head's scores to weights, and its State and sums onto their scale
// weigh<NH>(...)               adds the weighted values of NH heads
//
// Queries, scores and sums of a head lie MAX_D, TILE_T and MAX_D numbers from the next one's. bf16
// is read in pairs (load_pair): queries and sums are kept in the order that this gives.
#pragma once

#ifdef FASTRLHF_ISA

#include "logprob_row.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t TILE_T = 64;         // tokens
constexpr int64_t MAX_HEADS = 8;       // query heads that share a read
constexpr int64_t MAX_D = 256;         // numbers from one query head's to the next one's
constexpr bool WIDE = VEC_BYTES == 64;  // 32 registers, else 16

// Of some tokens, beside the sum of their weighted values: the largest score, and the sum of the
// weights exp(score - max).
template <class A>
struct State {
  A max, total;
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// Blocks of fours, then a two, then a one.
template <class F>
FASTRLHF_INLINE void over_heads(int64_t heads, const F& f) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) f(Count<4>{}, h);
  if (h + 2 <= heads) {
    f(Count<2>{}, h);
    h += 2;
  }
  if (h < heads) f(Count<1>{}, h);
}

template <class T>
struct Rows {
  int64_t n;
  const T *keys[TILE_T], *values[TILE_T];  // keys has a whole number of fours

  void fetch(int64_t t, int64_t D) const {
    for (int64_t i = t; i < min_of(t + 4, n); ++i) {
      const char* k = reinterpret_cast<const char*>(keys[i]);
      const char* v = reinterpret_cast<const char*>(values[i]);
      for (int64_t at = 0; at < D * static_cast<int64_t>(sizeof(T)); at += 64) {
        __builtin_prefetch(k + at, 0, 2);
        __builtin_prefetch(v + at, 0, 2);
      }
    }
  }
};

// ---- scores: NH heads by four tokens at once

// The sums over the lanes of four vectors.
FASTRLHF_INLINE void sum_lanes(const vd* v, double* sums) {
  for (int t = 0; t < 4; ++t) sums[t] = hsum(v[t]);
}
FASTRLHF_INLINE void sum_lanes(const vf* v, float* sums) {
#if defined(__x86_64__)
  // Transposed by fours and added, then the quarters of what is left: a third of four hsums' steps.
  typedef float quad __attribute__((vector_size(16)));
  constexpr int QUADS = VEC_BYTES / 16;
  quad total{};
  quad part[4][QUADS];
  for (int t = 0; t < 4; ++t) __builtin_memcpy(part[t], v + t, sizeof(vf));
  for (int i = 0; i < QUADS; ++i) {
    const quad a = _mm_unpacklo_ps(part[0][i], part[1][i]) + _mm_unpackhi_ps(part[0][i], part[1][i]);
    const quad b = _mm_unpacklo_ps(part[2][i], part[3][i]) + _mm_unpackhi_ps(part[2][i], part[3][i]);
    total += quad(_mm_movelh_ps(a, b)) + quad(_mm_movehl_ps(b, a));
  }
  __builtin_memcpy(sums, &total, sizeof(total));
#else
  for (int t = 0; t < 4; ++t) sums[t] = hsum(v[t]);
#endif
}

template <int NH, class V>
FASTRLHF_INLINE void add_products(const elem_t<V>* q, const V* keys, V (&sums)[NH][4]) {
#pragma GCC unroll 4
  for (int h = 0; h < NH; ++h) {
    const V x = load(q + h * MAX_D);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) sums[h][t] = vfma(x, keys[t], sums[h][t]);
  }
}

template <int NH, class T>
FASTRLHF_INLINE void dot_block(const acc_t<T>* q, const T* const* rows, int64_t D, acc_t<T> scale,
                               acc_t<T>* scores) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t W = lanes<V>;
  V sums[NH][4], a[4], b[4];
#pragma GCC unroll 4
  for (int h = 0; h < NH; ++h) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) sums[h][t] = V{};
  }
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) load_pair(rows[t] + d, a[t], b[t]);
    add_products<NH>(q + d, a, sums);
    add_products<NH>(q + d + W, b, sums);
  }
  if (d + W <= D) {
    for (int t = 0; t < 4; ++t) a[t] = load(rows[t] + d);
    add_products<NH>(q + d, a, sums);
    d += W;
  }
  if (d < D) {
    for (int t = 0; t < 4; ++t) a[t] = load_n(rows[t] + d, D - d, A(0));
    add_products<NH>(q + d, a, sums);
  }
#pragma GCC unroll 4
  for (int h = 0; h < NH; ++h) {
    A lane_sums[4];
    sum_lanes(sums[h], lane_sums);
    for (int t = 0; t < 4; ++t) scores[h * TILE_T + t] = lane_sums[t] * scale;
  }
}

// Of n tokens, rounded up to fours: `rows` has as many.
template <int NH, class T>
void dots(const acc_t<T>* q, const T* const* rows, const Rows<T>* next, int64_t n, int64_t D,
          acc_t<T> scale, acc_t<T>* scores) {
  constexpr int N = WIDE || NH < 4 ? NH : 2;  // as many as there are registers for
  for (int64_t t = 0; t < n; t += 4) {
    if (next != nullptr) next->fetch(t, D);
    for (int h = 0; h < NH; h += N) {
      dot_block<N>(q + h * MAX_D, rows + t, D, scale, scores + h * TILE_T + t);
    }
  }
}

// ---- weighted values: NH heads by NV pairs of vectors at once

template <int NH, int NV, class T>
FASTRLHF_INLINE void weigh_block(const acc_t<T>* weights, const T* const* rows, int64_t n,
                                 int64_t d, acc_t<T>* sums) {
  using V = vec_t<acc_t<T>>;
  constexpr int64_t W = lanes<V>;
  V s[NH][2 * NV];
#pragma GCC unroll 4
  for (int h = 0; h < NH; ++h) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * NV; ++j) s[h][j] = load(sums + h * MAX_D + d + j * W);
  }
  for (int64_t t = 0; t < n; ++t) {
    V v[2 * NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) load_pair(rows[t] + d + 2 * j * W, v[2 * j], v[2 * j + 1]);
#pragma GCC unroll 4
    for (int h = 0; h < NH; ++h) {
      const V w = splat<V>(weights[h * TILE_T + t]);
#pragma GCC unroll 4
      for (int j = 0; j < 2 * NV; ++j) s[h][j] = vfma(w, v[j], s[h][j]);
    }
  }
  for (int h = 0; h < NH; ++h) {
    for (int j = 0; j < 2 * NV; ++j) store(sums + h * MAX_D + d + j * W, s[h][j]);
  }
}

template <int NH, class T>
void weigh(const acc_t<T>* weights, const T* const* rows, int64_t n, int64_t D, acc_t<T>* sums) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t W = lanes<V>;
  constexpr int NV = WIDE || NH == 1 ? 2 : 1;
  int64_t d = 0;
  for (; d + 2 * NV * W <= D; d += 2 * NV * W) weigh_block<NH, NV>(weights, rows, n, d, sums);
  for (; d + 2 * W <= D; d += 2 * W) weigh_block<NH, 1>(weights, rows, n, d, sums);
  for (; d < D; d += W) {
    const int64_t k = min_of(W, D - d);
    V s[NH];
    for (int h = 0; h < NH; ++h) s[h] = load(sums + h * MAX_D + d);
    for (int64_t t = 0; t < n; ++t) {
      const V v = k == W ? load(rows[t] + d) : load_n(rows[t] + d, k, A(0));
      for (int h = 0; h < NH; ++h) s[h] = vfma(splat<V>(weights[h * TILE_T + t]), v, s[h]);
    }
    for (int h = 0; h < NH; ++h) store(sums + h * MAX_D + d, s[h]);
  }
}

// ---- a tile's weights

// Scores of one head become exp(score - max), and what was summed before is put on that scale.
template <class A>
void exponentials(A* scores, int64_t n, A softcap, int64_t D, State<A>& state, A* sums) {
  using V = vec_t<A>;
  constexpr int64_t W = lanes<V>;
  for (int64_t t = n; t % W != 0; ++t) scores[t] = -INF<A>;
  V top = splat<V>(-INF<A>);
  for (int64_t t = 0; t < n; t += W) {
    V s = load(scores + t);
    if (softcap != A(0)) {
      V slope;
      s = softcap * tanh_slope(s / softcap, slope);
      if (t + W > n) {
        for (int64_t i = n - t; i < W; ++i) s[i] = -INF<A>;
      }
      store(scores + t, s);
    }
    top = vmax(s, top);
  }
  const A max = max_of(state.max, hmax(top));
  const A shift = max == -INF<A> ? A(0) : max;
  if (max != state.max) {
    const A shrink = s_exp(state.max - shift);
    state.max = max;
    state.total *= shrink;
    for (int64_t d = 0; d < D; d += W) store(sums + d, load(sums + d) * shrink);
  }
  V total{};
  for (int64_t t = 0; t < n; t += W) {
    const V e = vexp(load(scores + t) - shift);
    store(scores + t, e);
    total += e;
  }
  state.total += hsum(total);
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif  // FASTRLHF_ISA
