// Per-token KL estimates from log-probs, and their derivative: elementwise over n entries.
//
//   d = x - y;   k1: d   k2: d^2 / 2   k3: expm1(min(-d, 20)) + d   abs: |d|
//
// x, y, grad, out are contiguous, all f32 or all f64. backward writes grad * d out / d x; that of y
// is its negative.
#include "op.h"

FASTRLHF_OP(kl_penalty, "out = the estimate; estimator 0: k1, 1: k2, 2: k3, 3: abs.",
            const void* x, const void* y, void* out, int64_t n, int estimator, int dtype,
            int nthreads)
FASTRLHF_OP(kl_penalty_backward, "out = grad times the estimate's derivative in x.",
            const void* grad, const void* x, const void* y, void* out, int64_t n, int estimator,
            int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "reward_body.h"
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN = 8192;

template <class A, class F>
void each_difference(const void* x, const void* y, void* out, int64_t n, int nthreads, const F& f) {
  using V = vec_t<A>;
  const A *px = static_cast<const A*>(x), *py = static_cast<const A*>(y);
  A* po = static_cast<A*>(out);
  parallel_for(n, GRAIN, nthreads, [&](int64_t begin, int64_t end) {
    each_vector<V>(end - begin, [&](int64_t i, int k) {
      const int64_t at = begin + i;
      store_k(po + at, f(at, k, load_k(px + at, k) - load_k(py + at, k)), k);
    });
  });
}

}  // namespace

FASTRLHF_KERNEL(kl_penalty)(const void* x, const void* y, void* out, int64_t n, int estimator,
                            int dtype, int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    using V = vec_t<A>;
    return with_estimator(estimator, [&](auto which) -> const char* {
      each_difference<A>(x, y, out, n, nthreads,
                         [&](int64_t, int, V d) { return kl_estimate<decltype(which)::value, A>(d); });
      return nullptr;
    });
  });
}

FASTRLHF_KERNEL(kl_penalty_backward)(const void* grad, const void* x, const void* y, void* out,
                                     int64_t n, int estimator, int dtype, int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    using V = vec_t<A>;
    const A* g = static_cast<const A*>(grad);
    return with_estimator(estimator, [&](auto which) -> const char* {
      each_difference<A>(x, y, out, n, nthreads, [&](int64_t at, int k, V d) {
        return load_k(g + at, k) * kl_slope<decltype(which)::value, A>(d);
      });
      return nullptr;
    });
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
