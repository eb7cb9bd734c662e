// Entries for tests: the vector functions and conversions over plain arrays, and the bodies of the
// CUDA kernels run by a warp made of arrays (warp.h), which take what the ops themselves take. And for
// bench/: row_sums, which does nothing but read, a ceiling for what reads each element once.
#include "op.h"

FASTRLHF_OP(test_math, "y[i] = f(x[i]) over floats; function 0: exp2, 1: exp, 2: log",
            const float* x, float* y, int64_t n, int function)
FASTRLHF_OP(test_convert, "y[i] = float(h[i] = T(x[i]))",
            const float* x, void* h, float* y, int64_t n, int dtype)
FASTRLHF_OP(test_reduce, "y[0] = sum, y[1] = max of x, in fp32 for f32, bf16, f16",
            const void* x, double* y, int64_t n, int dtype)
FASTRLHF_OP(test_parallel, "y[i] += i + 1 by parallel_for, each row calling it again inside",
            int64_t* y, int64_t n, int64_t grain, int nthreads)
FASTRLHF_OP(row_sums, "y[n] = sum of row n of x (N, V), in fp32 for f32, bf16, f16",
            const void* x, double* y, int64_t N, int64_t V, int dtype, int nthreads)
FASTRLHF_OP(test_gae_warp, "gae by the body of gae.cu",
            const void* rewards, const void* values, const uint8_t* mask, const uint8_t* value_mask,
            void* adv, void* ret, int64_t B, int64_t T, int64_t rewards_stride,
            int64_t values_stride, int64_t mask_stride, int64_t value_mask_stride,
            int64_t adv_stride, int64_t ret_stride, double gamma, double lam, int mode, int dtype,
            int nthreads)
FASTRLHF_OP(test_rollout_warp, "rollout_advantages by the body of its .cu; scratch: 3 B + 24",
            const void* logprobs, const void* ref_logprobs, const void* values, const void* scores,
            const uint8_t* mask, void* adv, void* ret, void* rewards, void* kl, double* scratch,
            int64_t B, int64_t T, int64_t logprobs_stride, int64_t ref_logprobs_stride,
            int64_t values_stride, double beta, double gamma, double lam, double clip, double eps,
            int estimator, int whiten, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "pool.h"
#include "rollout_warp.h"
#include "vec.h"

namespace fastrlhf::FASTRLHF_ISA {

FASTRLHF_KERNEL(test_math)(const float* x, float* y, int64_t n, int function) {
  const auto f = [&](vf v) { return function == 0 ? vexp2(v) : function == 1 ? vexp(v) : vlog(v); };
  int64_t i = 0;
  for (; i + lanes<vf> <= n; i += lanes<vf>) store(y + i, f(load(x + i)));
  if (i < n) store_n(y + i, f(load_n(x + i, n - i, 1.0f)), n - i);
  return nullptr;
}

FASTRLHF_KERNEL(test_convert)(const float* x, void* h, float* y, int64_t n, int dtype) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    T* t = static_cast<T*>(h);
    for (int64_t i = 0; i < n; ++i) put(t + i, static_cast<acc_t<T>>(x[i]));
    if constexpr (sizeof(T) <= 4) {
      constexpr int W = lanes<vf>;
      int64_t i = 0;
      for (; i + W <= n; i += W) {
        store(t + i, load(x + i));
        store(y + i, load(t + i));
      }
      if (i < n) {
        store_n(t + i, load_n(x + i, n - i, 0.0f), n - i);
        store_n(y + i, load_n(t + i, n - i, 0.0f), n - i);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(to_acc(t[i]));
    }
    return nullptr;
  });
}

FASTRLHF_KERNEL(test_reduce)(const void* x, double* y, int64_t n, int dtype) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    using V = vec_t<A>;
    const T* t = static_cast<const T*>(x);
    V sum{}, max = splat<V>(-static_cast<A>(__builtin_inf()));
    int64_t i = 0;
    for (; i + lanes<V> <= n; i += lanes<V>) {
      const V v = load(t + i);
      sum += v;
      max = vmax(v, max);
    }
    if (i < n) {
      sum += load_n(t + i, n - i, A{0});
      max = vmax(load_n(t + i, n - i, -static_cast<A>(__builtin_inf())), max);
    }
    y[0] = hsum(sum);
    y[1] = hmax(max);
    return nullptr;
  });
}

FASTRLHF_KERNEL(test_parallel)(int64_t* y, int64_t n, int64_t grain, int nthreads) {
  parallel_for(n, grain, nthreads, [&](int64_t begin, int64_t end) {
    parallel_for(end - begin, grain, nthreads, [&](int64_t inner_begin, int64_t inner_end) {
      for (int64_t i = begin + inner_begin; i < begin + inner_end; ++i) y[i] += i + 1;
    });
  });
  return nullptr;
}

FASTRLHF_KERNEL(row_sums)(const void* x, double* y, int64_t N, int64_t V, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    using Vec = vec_t<A>;
    constexpr int W = lanes<Vec>;
    parallel_for(N, 1, nthreads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* row = static_cast<const T*>(x) + n * V;
        Vec sums[8] = {Vec{}, Vec{}, Vec{}, Vec{}, Vec{}, Vec{}, Vec{}, Vec{}};
        int64_t i = 0;
        for (; i + 8 * W <= V; i += 8 * W) {
          for (int k = 0; k < 8; k += 2) {
            Vec a, b;
            load_pair(row + i + k * W, a, b);
            sums[k] += a;
            sums[k + 1] += b;
          }
        }
        for (; i < V; i += W) sums[0] += load_n(row + i, min_of<int64_t>(W, V - i), A(0));
        for (int k = 1; k < 8; ++k) sums[0] += sums[k];
        y[n] = static_cast<double>(hsum(sums[0]));
      }
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(test_gae_warp)(const void* rewards, const void* values, const uint8_t* mask,
                               const uint8_t* value_mask, void* adv, void* ret, int64_t B,
                               int64_t T, int64_t rewards_stride, int64_t values_stride,
                               int64_t mask_stride, int64_t value_mask_stride, int64_t adv_stride,
                               int64_t ret_stride, double gamma, double lam, int mode, int dtype,
                               int) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    for (int64_t b = 0; b < B; ++b) {
      const GaeRow<ArrayWarp, A> row{
          static_cast<const A*>(rewards) + b * rewards_stride,
          static_cast<const A*>(values) + b * values_stride,
          mask == nullptr ? nullptr : mask + b * mask_stride,
          value_mask == nullptr ? nullptr : value_mask + b * value_mask_stride,
          static_cast<A*>(adv) + b * adv_stride,
          static_cast<A*>(ret) + b * ret_stride,
          T,
          mode};
      gae_scan<ArrayWarp>(row, T, static_cast<A>(gamma), static_cast<A>(gamma * lam));
    }
    return nullptr;
  });
}

FASTRLHF_KERNEL(test_rollout_warp)(const void* logprobs, const void* ref_logprobs,
                                   const void* values, const void* scores, const uint8_t* mask,
                                   void* adv, void* ret, void* rewards, void* kl, double* scratch,
                                   int64_t B, int64_t T, int64_t logprobs_stride,
                                   int64_t ref_logprobs_stride, int64_t values_stride, double beta,
                                   double gamma, double lam, double clip, double eps,
                                   int estimator, int whiten, int dtype, int) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    constexpr int WARPS = 8;  // of a block of the launch that whitens
    A* const advantages = static_cast<A*>(adv);
    for (int64_t b = 0; b < B; ++b) {
      RolloutWarpRow<ArrayWarp, A> row{
          static_cast<const A*>(logprobs) + b * logprobs_stride,
          static_cast<const A*>(ref_logprobs) + b * ref_logprobs_stride,
          static_cast<const A*>(values) + b * values_stride,
          mask + b * T,
          advantages + b * T,
          static_cast<A*>(ret) + b * T,
          static_cast<A*>(rewards) + b * T,
          static_cast<A*>(kl) + b * T,
          T,
          clamp_score(static_cast<const A*>(scores)[b], static_cast<A>(clip)),
          static_cast<A>(-beta),
          estimator};
      gae_scan<ArrayWarp>(row, T, static_cast<A>(gamma), static_cast<A>(gamma * lam));
      const WarpMoments<double> found = row_moments(row);
      scratch[3 * b] = found.n;
      scratch[3 * b + 1] = found.mean;
      scratch[3 * b + 2] = found.m2;
    }
    if (whiten == 0) return nullptr;
    double* const shares = scratch + 3 * B;
    for (int w = 0; w < WARPS; ++w) {
      const WarpMoments<double> share = merge_share<ArrayWarp>(scratch, B, w, WARPS);
      shares[3 * w] = share.n;
      shares[3 * w + 1] = share.mean;
      shares[3 * w + 2] = share.m2;
    }
    const Whitener<A> whitened(merge_parts<ArrayWarp>(shares, WARPS), eps);
    for (int64_t i = 0; i < B * T; ++i) {
      if (mask[i] != 0) advantages[i] = whitened(advantages[i]);
    }
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
