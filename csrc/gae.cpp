// Generalised advantage estimation on the CPU: backward loops over four rows at a time.
//
// rewards, values (B, T) -> adv, ret = adv + values, all of one type, f32 or f64, contiguous along
// T; mask and value_mask are bytes or absent (mask: every step is valid; value_mask: as mask).
// Strides are between rows, in elements. adv is 0 outside mask, ret outside value_mask. The
// recursion is in gae_body.h.
#include "op.h"

FASTRLHF_OP(gae, "Advantages and returns of padded rows; mode 0: skip, 1: decay.",
            const void* rewards, const void* values, const uint8_t* mask, const uint8_t* value_mask,
            void* adv, void* ret, int64_t B, int64_t T, int64_t rewards_stride,
            int64_t values_stride, int64_t mask_stride, int64_t value_mask_stride,
            int64_t adv_stride, int64_t ret_stride, double gamma, double lam, int mode, int dtype,
            int nthreads)
FASTRLHF_OP(gae_varlen, "Advantages and returns of N packed sequences; cu_seqlens: N + 1 offsets.",
            const void* rewards, const void* values, const int64_t* cu_seqlens, void* adv,
            void* ret, int64_t N, double gamma, double lam, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "gae_body.h"
#include "pool.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_STEPS = 16384;  // steps worth waking a thread for; some 15 us

}  // namespace

FASTRLHF_KERNEL(gae)(const void* rewards, const void* values, const uint8_t* mask,
                     const uint8_t* value_mask, void* adv, void* ret, int64_t B, int64_t T,
                     int64_t rewards_stride, int64_t values_stride, int64_t mask_stride,
                     int64_t value_mask_stride, int64_t adv_stride, int64_t ret_stride,
                     double gamma, double lam, int mode, int dtype, int nthreads) {
  if (mode != GAE_SKIP && mode != GAE_DECAY) return "mode must be 0 (skip) or 1 (decay)";
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    const int64_t grain = GRAIN_STEPS / max_of<int64_t>(T, 1) + 1;
    parallel_for(B, grain, nthreads, [&](int64_t begin, int64_t end) {
      const auto row = [&](int64_t b) {
        return GaeSteps<A>{
            static_cast<const A*>(rewards) + b * rewards_stride,
            static_cast<const A*>(values) + b * values_stride,
            mask == nullptr ? nullptr : mask + b * mask_stride,
            value_mask == nullptr ? nullptr : value_mask + b * value_mask_stride,
            static_cast<A*>(adv) + b * adv_stride,
            static_cast<A*>(ret) + b * ret_stride,
        };
      };
      const A c = static_cast<A>(gamma), c_lam = static_cast<A>(gamma * lam);
      int64_t b = begin;
      for (; b + LOCKSTEP <= end; b += LOCKSTEP) {
        GaeSteps<A> rows[LOCKSTEP];
        for (int j = 0; j < LOCKSTEP; ++j) rows[j] = row(b + j);
        gae_lockstep(rows, 0, T, c, c_lam, mode);
      }
      for (; b < end; ++b) {
        GaeSteps<A> one = row(b);
        gae_steps(one, 0, T, c, c_lam, mode);
      }
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(gae_varlen)(const void* rewards, const void* values, const int64_t* cu_seqlens,
                            void* adv, void* ret, int64_t N, double gamma, double lam, int dtype,
                            int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    const int64_t total = N > 0 ? cu_seqlens[N] - cu_seqlens[0] : 0;
    const int64_t grain = GRAIN_STEPS / max_of<int64_t>(total / max_of<int64_t>(N, 1), 1) + 1;
    parallel_for(N, grain, nthreads, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = cu_seqlens[s];
        GaeSteps<A> row{static_cast<const A*>(rewards) + first,
                        static_cast<const A*>(values) + first,
                        nullptr,
                        nullptr,
                        static_cast<A*>(adv) + first,
                        static_cast<A*>(ret) + first};
        gae_steps(row, 0, cu_seqlens[s + 1] - first, static_cast<A>(gamma),
                  static_cast<A>(gamma * lam), GAE_SKIP);
      }
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
