// Generalised advantage estimation on CUDA: a warp a sequence, any length in the same registers.
//
// The contract is gae.cpp's. Each step maps the advantage after it to its own, A -> c A + d, with
// (c, d) = (gamma lambda, delta), or (1, 0) where a step is stepped over. A warp walks its row
// right to left in tiles of 32 steps, composes the tile's maps by an inclusive scan of shuffles
// and carries the advantage and the value at the tile's left edge into the next tile, which is already
// on its way from memory. The order of operations is fixed by T alone: the same bits, run after
// run.
#include "gae_body.h"
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

constexpr int WARP = 32;
constexpr int WARPS_PER_BLOCK = 4;
constexpr unsigned ALL = 0xffffffffu;

template <class A>
struct Tile {  // what one lane holds of a tile: one step
  A reward, value;
  bool valid, has_value;
};

template <class A>
__device__ __forceinline__ Tile<A> load_tile(const A* rewards, const A* values, const uint8_t* mask,
                                             const uint8_t* value_mask, int64_t t, int64_t T) {
  Tile<A> tile{A(0), A(0), false, false};
  if (t >= 0 && t < T) {
    tile.valid = mask == nullptr || mask[t] != 0;
    tile.has_value = value_mask == nullptr ? tile.valid : value_mask[t] != 0;
    tile.reward = rewards[t];
    tile.value = values[t];
  }
  return tile;
}

template <class A>
__device__ __forceinline__ void gae_row(const A* rewards, const A* values, const uint8_t* mask,
                                        const uint8_t* value_mask, A* adv, A* ret, int64_t T,
                                        A gamma, A gamma_lam, int mode) {
  const int lane = threadIdx.x % WARP;
  A carry_adv = 0, carry_value = 0;  // of the first step that runs to the right of the tile
  int64_t first = (T - 1) / WARP * WARP;
  Tile<A> tile = load_tile(rewards, values, mask, value_mask, first + lane, T);
  for (; first >= 0; first -= WARP) {
    const int64_t t = first + lane;
    const Tile<A> next = load_tile(rewards, values, mask, value_mask, t - WARP, T);
    const GaeStep<A> step(tile.reward, tile.value, tile.valid, tile.has_value, mode);
    const bool runs = step.runs && t < T;

    const unsigned running = __ballot_sync(ALL, runs);
    const unsigned after = lane == WARP - 1 ? 0u : running & (ALL << (lane + 1));
    const A shuffled = __shfl_sync(ALL, step.value, after == 0u ? lane : __ffs(after) - 1);
    const A next_value = after == 0u ? carry_value : shuffled;

    A c = runs ? gamma_lam : A(1);
    A d = runs ? gae_delta(step.reward, step.value, next_value, gamma) : A(0);
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {  // (c, d) after the maps to the right
      const A right_c = __shfl_down_sync(ALL, c, offset);
      const A right_d = __shfl_down_sync(ALL, d, offset);
      if (lane + offset < WARP) {
        d = d + c * right_d;
        c = c * right_c;
      }
    }
    const A advantage = d + c * carry_adv;
    if (t < T) {
      adv[t] = tile.valid ? advantage : A(0);
      ret[t] = tile.has_value ? advantage + step.value : A(0);
    }
    carry_adv = __shfl_sync(ALL, advantage, 0);
    const A leftmost = __shfl_sync(ALL, step.value, running == 0u ? 0 : __ffs(running) - 1);
    carry_value = running == 0u ? carry_value : leftmost;
    tile = next;
  }
}

template <class A>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK)
    gae_kernel(const A* rewards, const A* values, const uint8_t* mask, const uint8_t* value_mask,
               A* adv, A* ret, int64_t B, int64_t T, int64_t rewards_stride, int64_t values_stride,
               int64_t mask_stride, int64_t value_mask_stride, int64_t adv_stride,
               int64_t ret_stride, A gamma, A gamma_lam, int mode) {
  const int64_t b = int64_t(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / WARP;
  if (b >= B) return;  // a whole warp at a time
  gae_row(rewards + b * rewards_stride, values + b * values_stride,
          mask == nullptr ? nullptr : mask + b * mask_stride,
          value_mask == nullptr ? nullptr : value_mask + b * value_mask_stride,
          adv + b * adv_stride, ret + b * ret_stride, T, gamma, gamma_lam, mode);
}

template <class A>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK)
    gae_varlen_kernel(const A* rewards, const A* values, const int64_t* cu_seqlens, A* adv, A* ret,
                      int64_t N, A gamma, A gamma_lam) {
  const int64_t s = int64_t(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / WARP;
  if (s >= N) return;
  const int64_t first = cu_seqlens[s];
  gae_row<A>(rewards + first, values + first, nullptr, nullptr, adv + first, ret + first,
             cu_seqlens[s + 1] - first, gamma, gamma_lam, GAE_SKIP);
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
