// One step of generalised advantage estimation, shared by gae.cpp and gae.cu.
//
//   delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lambda A_{t+1}
//
// skip:  t runs over the valid steps alone; what lies between them is stepped over.
// decay: t runs over all steps; r counts as 0 where `mask` is 0, V where `value_mask` is 0.
// V after the end is 0. (Schulman et al., 2016, equation 16.)
#pragma once

#include <cstdint>

#include "common.h"

#if defined(__CUDACC__)
#define FASTRLHF_HD __host__ __device__ __forceinline__
#else
#define FASTRLHF_HD inline __attribute__((always_inline))
#endif

namespace fastrlhf {
enum GaeMode : int { GAE_SKIP = 0, GAE_DECAY = 1 };
}

namespace fastrlhf::FASTRLHF_ISA {
namespace {

template <class A>
FASTRLHF_HD A gae_delta(A reward, A value, A next_value, A gamma) {
  return reward + gamma * next_value - value;
}

// What the masks make of a step. Masked numbers are replaced, not multiplied by 0: they may be NaN.
template <class A>
struct GaeStep {
  A reward, value;
  bool runs;  // the recursion passes through this step

  FASTRLHF_HD GaeStep(A r, A v, bool mask, bool value_mask, int mode)
      : reward(mask ? r : A(0)),
        value(value_mask ? v : A(0)),
        runs(mode == GAE_DECAY || mask) {}
};

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
