// Masked whitening in two steps: the moments of the valid entries, then (x - mean) * scale.
//
// x and mask are contiguous, of n entries; mask is bytes or absent. Moments are three doubles:
// count, mean, sum of squared differences from the mean. `scratch` has three doubles for every
// 1024 entries, rounded up. out is f32, or f64 for f64 x; 0 at masked slots. With P sets of moments
// (one a rank) apply merges them in order.
#include "op.h"

FASTRLHF_OP(whiten_moments, "moments[3] = count, mean and sum of squares about it, of valid x.",
            const void* x, const uint8_t* mask, double* scratch, double* moments, int64_t n,
            int dtype, int nthreads)
FASTRLHF_OP(whiten_apply, "out = x whitened by P sets of moments.",
            const void* x, const uint8_t* mask, const double* moments, void* out, int64_t n,
            int64_t P, int shift_mean, int unbiased, double eps, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {

FASTRLHF_KERNEL(whiten_moments)(const void* x, const uint8_t* mask, double* scratch,
                                double* moments, int64_t n, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using V = vec_t<acc_t<T>>;
    over_tiles(n, nthreads, [&](int64_t tile, int64_t begin, int64_t length) {
      const T* p = static_cast<const T*>(x) + begin;
      const Moments part = tile_moments<V>(
          length, [&](int64_t i, int k) { return load_k(p + i, k); },
          [&](int64_t i, int k) { return load_mask<V>(mask, begin + i, k); });
      scratch[3 * tile] = part.n;
      scratch[3 * tile + 1] = part.mean;
      scratch[3 * tile + 2] = part.m2;
    });
    Moments all;
    for (int64_t tile = 0; tile < n_tiles(n); ++tile) {
      all.merge({scratch[3 * tile], scratch[3 * tile + 1], scratch[3 * tile + 2]});
    }
    moments[0] = all.n;
    moments[1] = all.mean;
    moments[2] = all.m2;
    return nullptr;
  });
}

FASTRLHF_KERNEL(whiten_apply)(const void* x, const uint8_t* mask, const double* moments, void* out,
                              int64_t n, int64_t P, int shift_mean, int unbiased, double eps,
                              int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    using V = vec_t<A>;
    Moments all;
    for (int64_t p = 0; p < P; ++p) {
      all.merge({moments[3 * p], moments[3 * p + 1], moments[3 * p + 2]});
    }
    const double divisor = unbiased != 0 ? all.n - 1.0 : all.n;
    const double var = all.n > 1.0 ? all.m2 / divisor : 0.0;
    const double spread = var + eps;
    const A scale = static_cast<A>(spread == 0.0 ? 0.0 : 1.0 / s_sqrt(spread));
    // The mean in two parts: a large one is not a number of type A, and x - mean is exact.
    const A high = static_cast<A>(all.mean), low = static_cast<A>(all.mean - high);
    const A back = shift_mean != 0 ? A(0) : high;
    over_tiles(n, nthreads, [&](int64_t, int64_t begin, int64_t length) {
      const T* p = static_cast<const T*>(x) + begin;
      A* q = static_cast<A*>(out) + begin;
      each_vector<V>(length, [&](int64_t i, int k) {
        const V y = ((load_k(p + i, k) - high) - low) * scale + back;
        store_k(q + i, keep<V>(load_mask<V>(mask, begin + i, k), y), k);
      });
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
