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
#include "whiten_body.h"

namespace fastrlhf::FASTRLHF_ISA {

FASTRLHF_KERNEL(whiten_moments)(const void* x, const uint8_t* mask, double* scratch,
                                double* moments, int64_t n, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const Moments all = moments_of(static_cast<const T*>(x), mask, scratch, n, nthreads);
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
    whiten_by(merged(moments, P), static_cast<const T*>(x), mask, static_cast<acc_t<T>*>(out), n,
              shift_mean != 0, unbiased != 0, eps, nthreads);
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
