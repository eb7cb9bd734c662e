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

#if !defined(__CUDACC__)

// A row on the CPU: its steps, and what the first step that runs to the right hands on.
template <class A>
struct GaeSteps {
  const A *rewards, *values;
  const uint8_t *mask, *value_mask;  // absent: every step is valid; values live where mask says
  A *adv, *ret;
  A next_adv = 0, next_value = 0;
};

// Steps begin to end - 1 of a row, from right to left.
template <class A>
inline void gae_steps(GaeSteps<A>& row, int64_t begin, int64_t end, A gamma, A gamma_lam,
                      int mode) {
  A next_adv = row.next_adv, next_value = row.next_value;
  for (int64_t t = end - 1; t >= begin; --t) {
    const bool valid = row.mask == nullptr || row.mask[t] != 0;
    const bool has_value = row.value_mask == nullptr ? valid : row.value_mask[t] != 0;
    const GaeStep<A, bool> step(row.rewards[t], row.values[t], valid, has_value, mode);
    if (step.runs) {
      next_adv = gae_delta(step.reward, step.value, next_value, gamma) + gamma_lam * next_adv;
      next_value = step.value;
    }
    row.adv[t] = valid ? next_adv : A(0);
    row.ret[t] = has_value ? next_adv + step.value : A(0);
  }
  row.next_adv = next_adv;
  row.next_value = next_value;
}

constexpr int LOCKSTEP = 4;

template <class A>
struct lockstep_of {
  typedef A type __attribute__((vector_size(LOCKSTEP * sizeof(A))));
};

// The same of LOCKSTEP rows side by side, in the lanes of a vector: a step must wait for the one to
// its right, so that a row alone leaves the processor idle; and no branch depends on a mask. The
// masks of all rows, or of none, are absent. The bits of a row are those of gae_steps.
template <class A>
inline void gae_lockstep(GaeSteps<A>* rows, int64_t begin, int64_t end, A gamma, A gamma_lam,
                         int mode) {
  using V = typename lockstep_of<A>::type;
  using M = decltype(V{} < V{});
  GaeSteps<A> row[LOCKSTEP];
  V next_adv{}, next_value{};
  for (int j = 0; j < LOCKSTEP; ++j) {
    row[j] = rows[j];
    next_adv[j] = row[j].next_adv;
    next_value[j] = row[j].next_value;
  }
  const bool has_mask = row[0].mask != nullptr, has_value_mask = row[0].value_mask != nullptr;
  const M all = ~M{}, always = mode == GAE_DECAY ? all : M{};
  for (int64_t t = end - 1; t >= begin; --t) {
    V r{}, v{};
    M valid = all;
    for (int j = 0; j < LOCKSTEP; ++j) r[j] = row[j].rewards[t];
    for (int j = 0; j < LOCKSTEP; ++j) v[j] = row[j].values[t];
    if (has_mask) {
      for (int j = 0; j < LOCKSTEP; ++j) valid[j] = row[j].mask[t];
      valid = valid != 0;
    }
    M has_value = valid;
    if (has_value_mask) {
      for (int j = 0; j < LOCKSTEP; ++j) has_value[j] = row[j].value_mask[t];
      has_value = has_value != 0;
    }
    r = valid ? r : V{};
    v = has_value ? v : V{};
    const M runs = valid | always;
    next_adv = runs ? gae_delta(r, v, next_value, gamma) + gamma_lam * next_adv : next_adv;
    next_value = runs ? v : next_value;
    const V adv = valid ? next_adv : V{};
    const V ret = has_value ? next_adv + v : V{};
    for (int j = 0; j < LOCKSTEP; ++j) row[j].adv[t] = adv[j];
    for (int j = 0; j < LOCKSTEP; ++j) row[j].ret[t] = ret[j];
  }
  for (int j = 0; j < LOCKSTEP; ++j) {
    rows[j].next_adv = next_adv[j];
    rows[j].next_value = next_value[j];
  }
}

#endif

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
