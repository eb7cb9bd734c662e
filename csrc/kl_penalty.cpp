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
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

enum Estimator : int { K1 = 0, K2 = 1, K3 = 2, ABS = 3 };
constexpr const char* BAD_ESTIMATOR = "estimator must be 0 (k1), 1 (k2), 2 (k3) or 3 (abs)";
constexpr int64_t GRAIN = 8192;
constexpr float MAX_EXPONENT = 20.0f;
constexpr float NEAR = 0.69f;  // below ln 2: above it exp(x) - 1 loses less than two bits

// (exp(x) - 1 - x) / x^2 for |x| < NEAR: the Taylor series, cut where the rest is below rounding.
template <class V>
FASTRLHF_INLINE V expm1_tail(V x) {
  V q = splat<V>(1);
  for (int k = sizeof(elem_t<V>) == 8 ? 18 : 10; k > 2; --k) {
    q = q * x * (elem_t<V>(1) / static_cast<elem_t<V>>(k)) + elem_t<V>(1);
  }
  return q * elem_t<V>(0.5);
}

template <class V>
FASTRLHF_INLINE mask_t<V> is_near(V x) {
  return (x < elem_t<V>(NEAR)) & (x > elem_t<V>(-NEAR));
}

template <class V>
FASTRLHF_INLINE V magnitude(V x) {
  return select(x < elem_t<V>(0), -x, x);
}

// expm1(min(-d, 20)) + d. Near 0 the terms of first order have cancelled before anything is rounded.
template <class V>
FASTRLHF_INLINE V k3(V d) {
  const V x = vmin(splat<V>(MAX_EXPONENT), -d);  // a NaN stays
  const mask_t<V> near = is_near(x);
  const V y = keep<V>(near, x);
  return select(near, y * y * expm1_tail(y), (vexp(x) - elem_t<V>(1)) + d);
}

// d/dd of it: -expm1(-d), or 1 where the exponent is clamped.
template <class V>
FASTRLHF_INLINE V k3_derivative(V d) {
  const V x = vmin(splat<V>(MAX_EXPONENT), -d);
  const mask_t<V> near = is_near(x);
  const V y = keep<V>(near, x);
  const V slope = select(near, -y - y * y * expm1_tail(y), elem_t<V>(1) - vexp(x));
  return select(-d > elem_t<V>(MAX_EXPONENT), splat<V>(1), slope);
}

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
    const auto run = [&](const auto& f) -> const char* {
      each_difference<A>(x, y, out, n, nthreads, [&](int64_t, int, V d) { return f(d); });
      return nullptr;
    };
    switch (estimator) {
      case K1: return run([](V d) { return d; });
      case K2: return run([](V d) { return A(0.5) * d * d; });
      case K3: return run([](V d) { return k3(d); });
      case ABS: return run([](V d) { return magnitude(d); });
      default: return BAD_ESTIMATOR;
    }
  });
}

FASTRLHF_KERNEL(kl_penalty_backward)(const void* grad, const void* x, const void* y, void* out,
                                     int64_t n, int estimator, int dtype, int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    using V = vec_t<A>;
    const A* g = static_cast<const A*>(grad);
    const auto run = [&](const auto& slope) -> const char* {
      each_difference<A>(x, y, out, n, nthreads, [&](int64_t at, int k, V d) {
        return load_k(g + at, k) * slope(d);
      });
      return nullptr;
    };
    switch (estimator) {
      case K1: return run([](V) { return splat<V>(1); });
      case K2: return run([](V d) { return d; });
      case K3: return run([](V d) { return k3_derivative(d); });
      case ABS: return run([](V d) {
        return keep<V>(d > A(0), splat<V>(1)) - keep<V>(d < A(0), splat<V>(1));
      });
      default: return BAD_ESTIMATOR;
    }
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
