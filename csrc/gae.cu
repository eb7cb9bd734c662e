// Generalised advantage estimation on CUDA: a warp a sequence, any length in the same registers.
//
// The contract is gae.cpp's, the body gae_warp.h's, which csrc/selftest.cpp runs on a CPU too.
#include "gae_warp.h"
#include "op.h"

FASTRLHF_OP(gae, "Advantages and returns of padded rows; mode 0: skip, 1: decay.",
            const void* rewards, const void* values, const uint8_t* mask, const uint8_t* value_mask,
            void* adv, void* ret, int64_t B, int64_t T, int64_t rewards_stride,
            int64_t values_stride, int64_t mask_stride, int64_t value_mask_stride,
            int64_t adv_stride, int64_t ret_stride, double gamma, double lam, int mode, int dtype,
            int device, void* stream)
FASTRLHF_OP(gae_varlen, "Advantages and returns of N packed sequences; cu_seqlens: N + 1 offsets.",
            const void* rewards, const void* values, const int64_t* cu_seqlens, void* adv,
            void* ret, int64_t N, double gamma, double lam, int dtype, int device, void* stream)

#include "cuda_common.h"

namespace fastrlhf::cuda {
namespace {

constexpr int WARPS_PER_BLOCK = 4;

template <class A>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK)
    gae_kernel(const A* rewards, const A* values, const uint8_t* mask, const uint8_t* value_mask,
               A* adv, A* ret, int64_t B, int64_t T, int64_t rewards_stride, int64_t values_stride,
               int64_t mask_stride, int64_t value_mask_stride, int64_t adv_stride,
               int64_t ret_stride, A gamma, A gamma_lam, int mode) {
  const int64_t b = int64_t(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / WARP;
  if (b >= B) return;  // a whole warp at a time
  const GaeRow<CudaWarp, A> row{rewards + b * rewards_stride,
                                values + b * values_stride,
                                mask == nullptr ? nullptr : mask + b * mask_stride,
                                value_mask == nullptr ? nullptr : value_mask + b * value_mask_stride,
                                adv + b * adv_stride,
                                ret + b * ret_stride,
                                T,
                                mode};
  gae_scan<CudaWarp>(row, T, gamma, gamma_lam);
}

template <class A>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK)
    gae_varlen_kernel(const A* rewards, const A* values, const int64_t* cu_seqlens, A* adv, A* ret,
                      int64_t N, A gamma, A gamma_lam) {
  const int64_t s = int64_t(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / WARP;
  if (s >= N) return;
  const int64_t first = cu_seqlens[s], T = cu_seqlens[s + 1] - first;
  const GaeRow<CudaWarp, A> row{rewards + first, values + first, nullptr, nullptr,
                                adv + first,     ret + first,    T,       GAE_SKIP};
  gae_scan<CudaWarp>(row, T, gamma, gamma_lam);
}

unsigned blocks(int64_t rows) {
  return static_cast<unsigned>((rows + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK);
}

constexpr int64_t MAX_ROWS = int64_t(0x7fffffff) * WARPS_PER_BLOCK;  // the grid's limit

}  // namespace

FASTRLHF_KERNEL(gae)(const void* rewards, const void* values, const uint8_t* mask,
                     const uint8_t* value_mask, void* adv, void* ret, int64_t B, int64_t T,
                     int64_t rewards_stride, int64_t values_stride, int64_t mask_stride,
                     int64_t value_mask_stride, int64_t adv_stride, int64_t ret_stride,
                     double gamma, double lam, int mode, int dtype, int device, void* stream) {
  if (mode != GAE_SKIP && mode != GAE_DECAY) return "mode must be 0 (skip) or 1 (decay)";
  if (B > MAX_ROWS) return "too many rows for one launch";
  if (B == 0 || T == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    gae_kernel<A><<<blocks(B), WARP * WARPS_PER_BLOCK, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const A*>(rewards), static_cast<const A*>(values), mask, value_mask,
        static_cast<A*>(adv), static_cast<A*>(ret), B, T, rewards_stride, values_stride,
        mask_stride, value_mask_stride, adv_stride, ret_stride, static_cast<A>(gamma),
        static_cast<A>(gamma * lam), mode);
    return launch_error();
  });
}

FASTRLHF_KERNEL(gae_varlen)(const void* rewards, const void* values, const int64_t* cu_seqlens,
                            void* adv, void* ret, int64_t N, double gamma, double lam, int dtype,
                            int device, void* stream) {
  if (N > MAX_ROWS) return "too many sequences for one launch";
  if (N == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    gae_varlen_kernel<A>
        <<<blocks(N), WARP * WARPS_PER_BLOCK, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const A*>(rewards), static_cast<const A*>(values), cu_seqlens,
            static_cast<A*>(adv), static_cast<A*>(ret), N, static_cast<A>(gamma),
            static_cast<A>(gamma * lam));
    return launch_error();
  });
}

}  // namespace fastrlhf::cuda
