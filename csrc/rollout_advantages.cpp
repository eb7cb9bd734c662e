// From log-probs to whitened advantages on the CPU: KL, rewards, GAE in one pass a row, whitening.
//
// logprobs, ref_logprobs, values (B, T) and scores (B,), all f32 or all f64, are contiguous along T,
// their strides between rows, in elements; mask (B, T), bytes, and the results kl, rewards, adv and
// ret (B, T) are contiguous. Masked slots of the results are 0. `scratch` has three doubles for
// every 1024 entries of (B, T), rounded up; whiten = 0 leaves adv as GAE gives it. Each step is that
// of kl_penalty, shape_rewards, gae (skip) and whiten, in their order: the same bits.
#include "op.h"

FASTRLHF_OP(rollout_advantages, "KL, rewards, returns, advantages; clip below 0: no clipping.",
            const void* logprobs, const void* ref_logprobs, const void* values, const void* scores,
            const uint8_t* mask, void* adv, void* ret, void* rewards, void* kl, double* scratch,
            int64_t B, int64_t T, int64_t logprobs_stride, int64_t ref_logprobs_stride,
            int64_t values_stride, double beta, double gamma, double lam, double clip, double eps,
            int estimator, int whiten, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "gae_body.h"
#include "reward_body.h"
#include "whiten_body.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_STEPS = 4096;  // steps worth waking a thread for
constexpr int64_t BLOCK = 512;  // steps a block: what it reads and writes stays in the nearest cache

template <class A>
struct RolloutRow {
  const A *logprobs, *ref_logprobs, *values;
  const uint8_t* mask;
  A *adv, *ret, *rewards, *kl;
};

template <int E, class A>
void rollout_row(const RolloutRow<A>& row, int64_t T, A score, A minus_beta, A gamma, A gamma_lam) {
  using V = vec_t<A>;
  GaeCarry<A> carry;
  bool scored = false;
  for (int64_t end = T; end > 0;) {
    const int64_t begin = (end - 1) / BLOCK * BLOCK;
    each_vector<V>(end - begin, [&](int64_t i, int k) {
      const int64_t t = begin + i;
      const mask_t<V> valid = load_mask<V>(row.mask, t, k);
      const V d = load_k(row.logprobs + t, k) - load_k(row.ref_logprobs + t, k);
      const V kl = keep<V>(valid, kl_estimate<E, A>(d));
      store_k(row.kl + t, kl, k);
      store_k(row.rewards + t, keep<V>(valid, kl * minus_beta), k);
    });
    for (int64_t t = end - 1; !scored && t >= begin; --t) {
      if (row.mask[t] == 0) continue;
      row.rewards[t] += score;
      scored = true;
    }
    gae_steps<A>(row.rewards, row.values, row.mask, nullptr, row.adv, row.ret, begin, end, gamma,
                 gamma_lam, GAE_SKIP, carry);
    end = begin;
  }
}

}  // namespace

FASTRLHF_KERNEL(rollout_advantages)(const void* logprobs, const void* ref_logprobs,
                                    const void* values, const void* scores, const uint8_t* mask,
                                    void* adv, void* ret, void* rewards, void* kl, double* scratch,
                                    int64_t B, int64_t T, int64_t logprobs_stride,
                                    int64_t ref_logprobs_stride, int64_t values_stride, double beta,
                                    double gamma, double lam, double clip, double eps,
                                    int estimator, int whiten, int dtype, int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    A* const advantages = static_cast<A*>(adv);
    const char* error = with_estimator(estimator, [&](auto which) -> const char* {
      const int64_t grain = GRAIN_STEPS / max_of<int64_t>(T, 1) + 1;
      parallel_for(B, grain, nthreads, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
          const RolloutRow<A> row{static_cast<const A*>(logprobs) + b * logprobs_stride,
                                  static_cast<const A*>(ref_logprobs) + b * ref_logprobs_stride,
                                  static_cast<const A*>(values) + b * values_stride,
                                  mask + b * T,
                                  advantages + b * T,
                                  static_cast<A*>(ret) + b * T,
                                  static_cast<A*>(rewards) + b * T,
                                  static_cast<A*>(kl) + b * T};
          const A score = clamp_score(static_cast<const A*>(scores)[b], static_cast<A>(clip));
          rollout_row<decltype(which)::value>(row, T, score, static_cast<A>(-beta),
                                              static_cast<A>(gamma), static_cast<A>(gamma * lam));
        }
      });
      return nullptr;
    });
    if (error != nullptr || whiten == 0) return error;
    const int64_t n = B * T;
    const Moments all = moments_of<A>(advantages, mask, scratch, n, nthreads);
    whiten_by<A>(all, advantages, mask, advantages, n, true, false, eps, nthreads);
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
