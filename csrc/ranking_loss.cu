// The K-wise ranking loss on CUDA: a warp a group, a lane an output.
//
// The contract is ranking_loss.cpp's, in f32; `scratch` has 3 doubles a group, always. The lanes walk
// the group's outputs together (ranking_body.h), each writes the gradient of its own, and the warp
// adds its lanes by shuffles. Then one block adds the groups. Every sum is a fixed tree: the same
// bits, run after run. Up to 256 groups one block does both, in one launch; more take a second.
#include "ranking_body.h"
#include "op.h"

FASTRLHF_OP(ranking_loss, "Loss, stats and unnormalised gradient.",
            const void* scores, const int64_t* ranks, const int64_t* group_sizes, double* scratch,
            void* loss, void* stats, void* gradient, int64_t G, int64_t total, int has_normalizer,
            double normalizer, const void* normalizer_tensor, int dtype, int device, void* stream)

#include "cuda_common.h"

namespace fastrlhf::cuda {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = RANK_SUM_THREADS;
constexpr int WARPS = THREADS / RANK_WARP;
constexpr int64_t ONE_BLOCK = 256;  // groups: 32 a warp, some 20 us; not tuned

struct Arguments {
  const float* scores;
  const int64_t* ranks;
  const int64_t* group_sizes;
  RankSums* groups;
  float *loss, *stats, *gradient;
  int64_t G, total;
  double divisor;
  const float* divisor_tensor;
};

__device__ __forceinline__ RankSums warp_sum(RankSums sums) {
#pragma unroll
  for (int offset = RANK_WARP / 2; offset > 0; offset /= 2) {
    RankSums other;
    other.loss = __shfl_down_sync(ALL, sums.loss, offset);
    other.pairs = __shfl_down_sync(ALL, sums.pairs, offset);
    other.right = __shfl_down_sync(ALL, sums.right, offset);
    sums.add(other);
  }
  return sums;  // in lane 0
}

__device__ __forceinline__ void do_group(const Arguments& a, int64_t g, int lane) {
  int64_t start = rank_start_part(a.group_sizes, g, lane);
#pragma unroll
  for (int offset = RANK_WARP / 2; offset > 0; offset /= 2) {
    start += __shfl_xor_sync(ALL, start, offset);
  }
  start = rank_held(start, 0, a.total);
  const int64_t K = rank_held(a.group_sizes[g], 0, a.total - start);
  const RankSums sums =
      warp_sum(rank_lane(a.scores + start, a.ranks + start,
                         a.gradient == nullptr ? nullptr : a.gradient + start, K, lane));
  if (lane == 0) a.groups[g] = sums;
}

__device__ __forceinline__ void finish(const Arguments& a) {
  __shared__ RankSums of_warp[WARPS];
  const int lane = threadIdx.x % RANK_WARP;
  const RankSums sums = warp_sum(rank_thread(a.groups, a.G, threadIdx.x));
  if (lane == 0) of_warp[threadIdx.x / RANK_WARP] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  RankSums all;
  for (int w = 0; w < WARPS; ++w) all.add(of_warp[w]);
  const double divisor =
      a.divisor_tensor == nullptr ? a.divisor : static_cast<double>(*a.divisor_tensor);
  rank_results(all, divisor, a.loss, a.stats);
}

__global__ void __launch_bounds__(THREADS) groups_kernel(const Arguments a) {
  const int64_t g = int64_t(blockIdx.x) * WARPS + threadIdx.x / RANK_WARP;
  if (g < a.G) do_group(a, g, threadIdx.x % RANK_WARP);  // a whole warp at a time
}

__global__ void __launch_bounds__(THREADS) finish_kernel(const Arguments a) { finish(a); }

__global__ void __launch_bounds__(THREADS) one_block_kernel(const Arguments a) {
  for (int64_t g = threadIdx.x / RANK_WARP; g < a.G; g += WARPS) {
    do_group(a, g, threadIdx.x % RANK_WARP);
  }
  __syncthreads();  // and with it the block sees what its warps wrote to `groups`
  finish(a);
}

constexpr int64_t MAX_GROUPS = int64_t(0x7fffffff) * WARPS;  // the grid's limit

}  // namespace

FASTRLHF_KERNEL(ranking_loss)(const void* scores, const int64_t* ranks, const int64_t* group_sizes,
                              double* scratch, void* loss, void* stats, void* gradient, int64_t G,
                              int64_t total, int has_normalizer, double normalizer,
                              const void* normalizer_tensor, int dtype, int device, void* stream) {
  if (dtype != F32) return BAD_DTYPE;
  if (G > MAX_GROUPS) return "too many groups for one launch";
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const Arguments a{static_cast<const float*>(scores),
                    ranks,
                    group_sizes,
                    reinterpret_cast<RankSums*>(scratch),
                    static_cast<float*>(loss),
                    static_cast<float*>(stats),
                    static_cast<float*>(gradient),
                    G,
                    total,
                    has_normalizer != 0 ? normalizer : static_cast<double>(G),
                    static_cast<const float*>(normalizer_tensor)};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (G <= ONE_BLOCK) {
    one_block_kernel<<<1, THREADS, 0, on>>>(a);
  } else {
    groups_kernel<<<static_cast<unsigned>((G + WARPS - 1) / WARPS), THREADS, 0, on>>>(a);
    finish_kernel<<<1, THREADS, 0, on>>>(a);
  }
  return launch_error();
}

}  // namespace fastrlhf::cuda
