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

constexpr int64_t GRAIN_STEPS = 8192;  // steps worth waking a thread for; some 15 us
constexpr int64_t BLOCK = 128;  // steps a block: what LOCKSTEP rows of it touch stays near

template <class A>
struct RolloutRow {
  const A *logprobs, *ref_logprobs;
  A *rewards, *kl;
  A score;
  bool scored = false;
};

// KL and rewards of steps begin to end - 1; the rightmost block that has a valid step gets the score.
template <int E, class A>
void reward_steps(RolloutRow<A>& row, const uint8_t* mask, int64_t begin, int64_t end,
                  A minus_beta) {
  using V = vec_t<A>;
  each_vector<V>(end - begin, [&](int64_t i, int k) {
    const int64_t t = begin + i;
    const mask_t<V> valid = load_mask<V>(mask, t, k);
    const V d = load_k(row.logprobs + t, k) - load_k(row.ref_logprobs + t, k);
    const V kl = keep<V>(valid, kl_estimate<E, A>(d));
    store_k(row.kl + t, kl, k);
    store_k(row.rewards + t, keep<V>(valid, kl * minus_beta), k);
  });
  if (row.scored) return;
  const int64_t last = last_valid(mask, begin, end);
  if (last < begin) return;
  row.rewards[last] += row.score;
  row.scored = true;
}

template <int E, class A>
void rollout_rows(RolloutRow<A>* rows, GaeSteps<A>* steps, int n, int64_t T, A minus_beta, A gamma,
                  A gamma_lam) {
  for (int64_t end = T; end > 0;) {
    const int64_t begin = (end - 1) / BLOCK * BLOCK;
    for (int j = 0; j < n; ++j) reward_steps<E>(rows[j], steps[j].mask, begin, end, minus_beta);
    if (n == LOCKSTEP) {
      gae_lockstep(steps, begin, end, gamma, gamma_lam, GAE_SKIP);
    } else {
      for (int j = 0; j < n; ++j) gae_steps(steps[j], begin, end, gamma, gamma_lam, GAE_SKIP);
    }
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
        for (int64_t b = first; b < last; b += LOCKSTEP) {
          const int n = static_cast<int>(min_of<int64_t>(LOCKSTEP, last - b));
          RolloutRow<A> rows[LOCKSTEP];
          GaeSteps<A> steps[LOCKSTEP];
          for (int j = 0; j < n; ++j) {
            const int64_t at = b + j;
            rows[j] = {static_cast<const A*>(logprobs) + at * logprobs_stride,
                       static_cast<const A*>(ref_logprobs) + at * ref_logprobs_stride,
                       static_cast<A*>(rewards) + at * T, static_cast<A*>(kl) + at * T,
                       clamp_score(static_cast<const A*>(scores)[at], static_cast<A>(clip))};
            steps[j] = {rows[j].rewards, static_cast<const A*>(values) + at * values_stride,
                        mask + at * T,   nullptr,
                        advantages + at * T, static_cast<A*>(ret) + at * T};
          }
          rollout_rows<decltype(which)::value>(rows, steps, n, T, static_cast<A>(-beta),
                                               static_cast<A>(gamma),
                                               static_cast<A>(gamma * lam));
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
