// Masked passes over flat arrays, and sums of fixed tiles: what the losses and whiten share.
//
// each_vector(n, f)            f(i, k) for vectors at i of k lanes, k < width in the last one alone
// load_k, store_k              load and store of such a vector; lanes >= k are 0 when loaded
// load_mask(mask, i, k)        its valid lanes: k or fewer, those of nonzero bytes; null: all k
// over_tiles(n, nthreads, f)   f(tile, begin, length) over tiles of TILE elements, in parallel
// Sum<V>, count(m)             a sum of vectors held in double; the number of lanes set
// inverse_normalizer(...)      the factor from a sum to a loss
// Moments                      count, mean and sum of squared differences from it; they merge
//
// A tile's result is the same whichever thread makes it, and the caller adds tiles in order: no bit
// of a sum depends on the number of threads.
#pragma once

#ifdef FASTRLHF_ISA

#include "pool.h"
#include "vec.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t TILE = 1024;
constexpr int64_t GRAIN_TILES = 8;  // worth waking a thread for; about 10 us

template <class V>
struct mask_of {
  using lanes = vi;
  using bytes = vbf;
};
template <>
struct mask_of<vd> {
  using lanes = vl;
  using bytes = vbd;
};
template <class V>
using mask_t = typename mask_of<V>::lanes;

template <class V, class F>
FASTRLHF_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) f(i, lanes<V>);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class T>
FASTRLHF_INLINE vec_t<acc_t<T>> load_k(const T* p, int k) {
  return k == lanes<vec_t<acc_t<T>>> ? load(p) : load_n(p, k, acc_t<T>(0));
}

template <class T>
FASTRLHF_INLINE void store_k(T* p, vec_t<acc_t<T>> v, int k) {
  if (k == lanes<vec_t<acc_t<T>>>) {
    store(p, v);
  } else {
    store_n(p, v, k);
  }
}

template <class V>
FASTRLHF_INLINE mask_t<V> load_mask(const uint8_t* mask, int64_t i, int k) {
  typename mask_of<V>::bytes b{};
  if (k == lanes<V>) {
    if (mask == nullptr) return ~mask_t<V>{};
    __builtin_memcpy(&b, mask + i, sizeof(b));
  } else {
    for (int j = 0; j < k; ++j) b[j] = mask == nullptr ? 1 : mask[i + j];
  }
  return widen(b) != 0;
}

template <class V>
FASTRLHF_INLINE V keep(mask_t<V> m, V x) {  // 0 in the other lanes, whatever x holds there
  return select(m, x, V{});
}

inline int64_t n_tiles(int64_t n) { return n / TILE + (n % TILE != 0 ? 1 : 0); }

template <class F>
inline void over_tiles(int64_t n, int nthreads, const F& f) {
  parallel_for(n_tiles(n), GRAIN_TILES, nthreads, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      f(tile, tile * TILE, min_of<int64_t>(TILE, n - tile * TILE));
    }
  });
}

// In double, so that a sum's error is that of its terms.
template <class V>
struct Sum {  // of vf
  vd low{}, high{};
  void add(vf x) {
    vd a, b;
    widen(x, a, b);
    low += a;
    high += b;
  }
  void add_square(vf x) {  // in fp32 the square of 1e20 is infinite and that of 1e-24 zero
    vd a, b;
    widen(x, a, b);
    low += a * a;
    high += b * b;
  }
  double total() const { return hsum(low + high); }
};
template <>
struct Sum<vd> {
  vd all{};
  void add(vd x) { all += x; }
  void add_square(vd x) { all += x * x; }
  double total() const { return hsum(all); }
};

template <class M>
FASTRLHF_INLINE int64_t count(M m) {
  int64_t n = 0;
  for (int j = 0; j < static_cast<int>(sizeof(m) / sizeof(m[0])); ++j) n -= m[j];  // set: -1
  return n;
}

// What a loss is divided by; with no valid entry the loss and its gradient are 0, whatever that is.
inline double inverse_normalizer(double valid, int has_normalizer, double normalizer) {
  if (valid == 0.0) return 0.0;
  return 1.0 / (has_normalizer != 0 ? normalizer : valid);
}

struct Moments {
  double n = 0.0, mean = 0.0, m2 = 0.0;

  // Chan, Golub and LeVeque 1983: the moments of two sets together.
  void merge(const Moments& part) {
    if (part.n == 0.0) return;
    const double both = n + part.n, gap = part.mean - mean;
    m2 += part.m2 + gap * gap * (n * part.n / both);
    mean += gap * (part.n / both);
    n = both;
  }
};

// Of the elements get(i, k) where valid(i, k), n of them at most; in two passes. They are shifted
// by the first valid one, so that equal elements have a variance of exactly 0.
template <class V, class Get, class Valid>
inline Moments tile_moments(int64_t n, const Get& get, const Valid& valid) {
  elem_t<V> shift = 0;
  bool found = false;
  mask_t<V> tally{};  // -1 for each valid element of a lane
  Sum<V> sum;
  each_vector<V>(n, [&](int64_t i, int k) {
    const mask_t<V> m = valid(i, k);
    const V x = get(i, k);
    for (int j = 0; !found && j < k; ++j) {
      if (m[j]) shift = x[j], found = true;
    }
    sum.add(keep<V>(m, x - shift));
    tally += m;
  });
  Moments result;
  if (!found) return result;
  result.n = static_cast<double>(count(tally));
  const double centre = sum.total() / result.n;
  Sum<V> squares;
  each_vector<V>(n, [&](int64_t i, int k) {
    const V centred = keep<V>(valid(i, k), get(i, k) - shift - static_cast<elem_t<V>>(centre));
    squares.add_square(centred);
  });
  result.mean = static_cast<double>(shift) + centre;
  result.m2 = squares.total();
  return result;
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
