// From log-probs to whitened advantages on CUDA: a warp a row, then a small launch to whiten.
//
// The contract is rollout_advantages.cpp's, for f32 alone; `scratch` has three doubles a row, the
// moments of its advantages. The body is rollout_warp.h's, which csrc/selftest.cpp runs on a CPU.
// Every block of the second launch merges all rows' moments, in an order that B alone fixes.
#include "op.h"
#include "rollout_warp.h"

FASTRLHF_OP(rollout_advantages, "KL, rewards, returns, advantages; clip below 0: no clipping.",
            const void* logprobs, const void* ref_logprobs, const void* values, const void* scores,
            const uint8_t* mask, void* adv, void* ret, void* rewards, void* kl, double* scratch,
            int64_t B, int64_t T, int64_t logprobs_stride, int64_t ref_logprobs_stride,
            int64_t values_stride, double beta, double gamma, double lam, double clip, double eps,
            int estimator, int whiten, int dtype, int device, void* stream)

#include "cuda_common.h"

namespace fastrlhf::cuda {
namespace {

constexpr int ROWS_PER_BLOCK = 4;
constexpr int WHITEN_WARPS = 8;
constexpr int WHITEN_ENTRIES = 4096;    // a block, if there are blocks enough
constexpr int64_t WHITEN_BLOCKS = 1024;  // at most: each reads all rows' moments
constexpr int64_t MAX_ROWS = int64_t(0x7fffffff) * ROWS_PER_BLOCK;  // the grid's limit

struct Arguments {
  const float *logprobs, *ref_logprobs, *values, *scores;
  const uint8_t* mask;
  float *adv, *ret, *rewards, *kl;
  double* moments;  // null: not whitened
  int64_t B, T, logprobs_stride, ref_logprobs_stride, values_stride;
  float minus_beta, gamma, gamma_lam, clip;
  int estimator;
};

__global__ void __launch_bounds__(WARP* ROWS_PER_BLOCK) rollout_kernel(const Arguments a) {
  const int64_t b = int64_t(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.x / WARP;
  if (b >= a.B) return;  // a whole warp at a time
  RolloutWarpRow<CudaWarp, float> row{a.logprobs + b * a.logprobs_stride,
                                      a.ref_logprobs + b * a.ref_logprobs_stride,
                                      a.values + b * a.values_stride,
                                      a.mask + b * a.T,
                                      a.adv + b * a.T,
                                      a.ret + b * a.T,
                                      a.rewards + b * a.T,
                                      a.kl + b * a.T,
                                      a.T,
                                      clamp_score(a.scores[b], a.clip),
                                      a.minus_beta,
                                      a.estimator};
  gae_scan<CudaWarp>(row, a.T, a.gamma, a.gamma_lam);
  if (a.moments == nullptr) return;
  const WarpMoments<double> found = row_moments(row);
  if (CudaWarp::lane() == 0) {
    a.moments[3 * b] = found.n;
    a.moments[3 * b + 1] = found.mean;
    a.moments[3 * b + 2] = found.m2;
  }
}

__global__ void __launch_bounds__(WARP* WHITEN_WARPS)
    whiten_kernel(float* adv, const uint8_t* mask, const double* moments, int64_t B, int64_t n,
                  double eps) {
  __shared__ double shares[3 * WHITEN_WARPS];
  const int warp = threadIdx.x / WARP;
  const WarpMoments<double> share = merge_share<CudaWarp>(moments, B, warp, WHITEN_WARPS);
  if (CudaWarp::lane() == 0) {
    shares[3 * warp] = share.n;
    shares[3 * warp + 1] = share.mean;
    shares[3 * warp + 2] = share.m2;
  }
  __syncthreads();
  const Whitener<float> whiten(merge_parts<CudaWarp>(shares, WHITEN_WARPS), eps);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    if (mask[i] != 0) adv[i] = whiten(adv[i]);  // 0 elsewhere already
  }
}

}  // namespace

FASTRLHF_KERNEL(rollout_advantages)(const void* logprobs, const void* ref_logprobs,
                                    const void* values, const void* scores, const uint8_t* mask,
                                    void* adv, void* ret, void* rewards, void* kl, double* scratch,
                                    int64_t B, int64_t T, int64_t logprobs_stride,
                                    int64_t ref_logprobs_stride, int64_t values_stride, double beta,
                                    double gamma, double lam, double clip, double eps,
                                    int estimator, int whiten, int dtype, int device,
                                    void* stream) {
  if (dtype != F32) return BAD_DTYPE;
  if (estimator < K1 || estimator > ABS) return BAD_ESTIMATOR;
  if (B > MAX_ROWS) return "too many rows for one launch";
  if (B == 0 || T == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Arguments arguments{static_cast<const float*>(logprobs),
                            static_cast<const float*>(ref_logprobs),
                            static_cast<const float*>(values),
                            static_cast<const float*>(scores),
                            mask,
                            static_cast<float*>(adv),
                            static_cast<float*>(ret),
                            static_cast<float*>(rewards),
                            static_cast<float*>(kl),
                            whiten == 0 ? nullptr : scratch,
                            B,
                            T,
                            logprobs_stride,
                            ref_logprobs_stride,
                            values_stride,
                            static_cast<float>(-beta),
                            static_cast<float>(gamma),
                            static_cast<float>(gamma * lam),
                            static_cast<float>(clip),
                            estimator};
  const int64_t row_blocks = (B + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
  rollout_kernel<<<static_cast<unsigned>(row_blocks), WARP * ROWS_PER_BLOCK, 0, on>>>(arguments);
  const char* error = launch_error();
  if (error != nullptr || whiten == 0) return error;
  const int64_t n = B * T, wanted = (n + WHITEN_ENTRIES - 1) / WHITEN_ENTRIES;
  const int64_t blocks = wanted < WHITEN_BLOCKS ? wanted : WHITEN_BLOCKS;
  whiten_kernel<<<static_cast<unsigned>(blocks), WARP * WHITEN_WARPS, 0, on>>>(
      arguments.adv, mask, scratch, B, n, eps);
  return launch_error();
}

}  // namespace fastrlhf::cuda
