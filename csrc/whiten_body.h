// Masked whitening on the CPU, shared by whiten and rollout_advantages: the moments of the valid
// entries by fixed tiles, merged in order, then (x - mean) * scale.
#pragma once

#ifdef FASTRLHF_ISA

#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

inline Moments merged(const double* parts, int64_t P) {  // three doubles a part
  Moments all;
  for (int64_t p = 0; p < P; ++p) all.merge({parts[3 * p], parts[3 * p + 1], parts[3 * p + 2]});
  return all;
}

// `scratch`: three doubles for every TILE entries, rounded up.
template <class T>
inline Moments moments_of(const T* x, const uint8_t* mask, double* scratch, int64_t n,
                          int nthreads) {
  using V = vec_t<acc_t<T>>;
  over_tiles(n, nthreads, [&](int64_t tile, int64_t begin, int64_t length) {
    const T* p = x + begin;
    const Moments part = tile_moments<V>(
        length, [&](int64_t i, int k) { return load_k(p + i, k); },
        [&](int64_t i, int k) { return load_mask<V>(mask, begin + i, k); });
    scratch[3 * tile] = part.n;
    scratch[3 * tile + 1] = part.mean;
    scratch[3 * tile + 2] = part.m2;
  });
  return merged(scratch, n_tiles(n));
}

// out may be x itself.
template <class T>
inline void whiten_by(const Moments& all, const T* x, const uint8_t* mask, acc_t<T>* out,
                      int64_t n, bool shift_mean, bool unbiased, double eps, int nthreads) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  const double divisor = unbiased ? all.n - 1.0 : all.n;
  const double var = all.n > 1.0 ? all.m2 / divisor : 0.0;
  const double spread = var + eps;
  const A scale = static_cast<A>(spread == 0.0 ? 0.0 : 1.0 / s_sqrt(spread));
  // The mean in two parts: a large one is not a number of type A, and x - mean is exact.
  const A high = static_cast<A>(all.mean), low = static_cast<A>(all.mean - high);
  const A back = shift_mean ? A(0) : high;
  over_tiles(n, nthreads, [&](int64_t, int64_t begin, int64_t length) {
    const T* p = x + begin;
    A* q = out + begin;
    each_vector<V>(length, [&](int64_t i, int k) {
      const V y = ((load_k(p + i, k) - high) - low) * scale + back;
      store_k(q + i, keep<V>(load_mask<V>(mask, begin + i, k), y), k);
    });
  });
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
