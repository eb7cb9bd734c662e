// One step of generalised advantage estimation, shared by gae and rollout_advantages, .cpp and .cu.
//
//   delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lambda A_{t+1}
//
// skip:  t runs over the valid steps alone; what lies between them is stepped over.
// decay: t runs over all steps; r counts as 0 where `mask` is 0, V where `value_mask` is 0.
// V after the end is 0. (Schulman et al., 2016, equation 16.)
#pragma once

#include <cstdint>

#include "common.h"

namespace fastrlhf {
enum GaeMode : int { GAE_SKIP = 0, GAE_DECAY = 1 };
}

namespace fastrlhf::FASTRLHF_ISA {
namespace {

// V: a number of type A, or the lanes of a warp (warp.h); M: what a comparison of two V is.
template <class V, class A>
FASTRLHF_HD V gae_delta(V reward, V value, V next_value, A gamma) {
  return reward + gamma * next_value - value;
}

// What the masks make of a step. Masked numbers are replaced, not multiplied by 0: they may be NaN.
template <class V, class M>
struct GaeStep {
  V reward, value;
  M runs;  // the recursion passes through this step

  FASTRLHF_HD GaeStep(V r, V v, M mask, M value_mask, int mode)
      : reward(select(mask, r, V{})),
        value(select(value_mask, v, V{})),
        runs(mask || (mode == GAE_DECAY)) {}
};

template <class A>
struct GaeCarry {  // of the first step that runs to the right
  A adv = 0, value = 0;
};

// Steps begin to end - 1 of a row, from right to left: the CPU's plain loop.
template <class A>
inline void gae_steps(const A* rewards, const A* values, const uint8_t* mask,
                      const uint8_t* value_mask, A* adv, A* ret, int64_t begin, int64_t end,
                      A gamma, A gamma_lam, int mode, GaeCarry<A>& carry) {
  A next_adv = carry.adv, next_value = carry.value;
  for (int64_t t = end - 1; t >= begin; --t) {
    const bool valid = mask == nullptr || mask[t] != 0;
    const bool has_value = value_mask == nullptr ? valid : value_mask[t] != 0;
    const GaeStep<A, bool> step(rewards[t], values[t], valid, has_value, mode);
    if (step.runs) {
      next_adv = gae_delta(step.reward, step.value, next_value, gamma) + gamma_lam * next_adv;
      next_value = step.value;
    }
    adv[t] = valid ? next_adv : A(0);
    ret[t] = has_value ? next_adv + step.value : A(0);
  }
  carry.adv = next_adv;
  carry.value = next_value;
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
