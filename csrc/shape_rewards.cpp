// Token rewards: -beta * kl at valid tokens, plus the clamped score at the last valid one.
//
// scores (B,), kl, mask, rewards (B, T): all of one type, f32 or f64; mask is bytes. Strides are
// between rows, in elements. Masked slots are 0. backward writes the gradients of scores and kl for
// a contiguous grad (B, T); a score that is clamped, or whose row has no valid token, gets 0.
#include "op.h"

FASTRLHF_OP(shape_rewards, "Token rewards; clip below 0: scores as they are.",
            const void* scores, const void* kl, const uint8_t* mask, void* rewards, int64_t B,
            int64_t T, int64_t kl_stride, int64_t mask_stride, double beta, double clip, int dtype,
            int nthreads)
FASTRLHF_OP(shape_rewards_backward, "Gradients of scores and kl.",
            const void* grad, const void* scores, const uint8_t* mask, void* d_scores, void* d_kl,
            int64_t B, int64_t T, int64_t mask_stride, double beta, double clip, int dtype,
            int nthreads)

#ifdef FASTRLHF_ISA
#include "reward_body.h"
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_TOKENS = 16384;

// out = beta_minus * x at valid tokens, 0 elsewhere
template <class A>
void scale_valid(const A* x, const uint8_t* mask, A* out, int64_t T, A minus_beta) {
  using V = vec_t<A>;
  each_vector<V>(T, [&](int64_t t, int k) {
    store_k(out + t, keep<V>(load_mask<V>(mask, t, k), load_k(x + t, k) * minus_beta), k);
  });
}

template <class F>
void over_rows(int64_t B, int64_t T, int nthreads, const F& f) {
  parallel_for(B, GRAIN_TOKENS / max_of<int64_t>(T, 1) + 1, nthreads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b) f(b);
               });
}

}  // namespace

FASTRLHF_KERNEL(shape_rewards)(const void* scores, const void* kl, const uint8_t* mask,
                               void* rewards, int64_t B, int64_t T, int64_t kl_stride,
                               int64_t mask_stride, double beta, double clip, int dtype,
                               int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    over_rows(B, T, nthreads, [&](int64_t b) {
      const uint8_t* valid = mask + b * mask_stride;
      A* out = static_cast<A*>(rewards) + b * T;
      scale_valid(static_cast<const A*>(kl) + b * kl_stride, valid, out, T, static_cast<A>(-beta));
      const int64_t last = last_valid(valid, 0, T);
      if (last < 0) return;
      out[last] += clamp_score(static_cast<const A*>(scores)[b], static_cast<A>(clip));
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(shape_rewards_backward)(const void* grad, const void* scores, const uint8_t* mask,
                                        void* d_scores, void* d_kl, int64_t B, int64_t T,
                                        int64_t mask_stride, double beta, double clip, int dtype,
                                        int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    over_rows(B, T, nthreads, [&](int64_t b) {
      const uint8_t* valid = mask + b * mask_stride;
      const A* g = static_cast<const A*>(grad) + b * T;
      scale_valid(g, valid, static_cast<A*>(d_kl) + b * T, T, static_cast<A>(-beta));
      const int64_t last = last_valid(valid, 0, T);
      const A score = static_cast<const A*>(scores)[b];
      const bool passes = last >= 0 && (clip < 0 || s_abs(score) <= static_cast<A>(clip));
      static_cast<A*>(d_scores)[b] = passes ? g[last] : A(0);
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
