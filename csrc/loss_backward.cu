// The backward of a loss on CUDA: loss_backward.cpp's contract, for an f32 gradient.
#include "op.h"

FASTRLHF_OP(loss_backward, "out = gradient * (grad_loss * inverse).",
            const void* grad_loss, const void* inverse, const void* gradient, void* out, int64_t n,
            int dtype, int device, void* stream)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_common.h"

namespace fastrlhf::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t MAX_BLOCKS = 4096;  // each thread then takes several entries

__device__ __forceinline__ void put(float* p, float x) { *p = x; }
__device__ __forceinline__ void put(bf16* p, float x) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void put(f16* p, float x) {
  p->bits = __half_as_ushort(__float2half_rn(x));
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    scale_kernel(const float* grad_loss, const float* inverse, const float* gradient, T* out,
                 int64_t n) {
  const float factor = *grad_loss * *inverse;
  const int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step) {
    put(out + i, gradient[i] * factor);
  }
}

}  // namespace

FASTRLHF_KERNEL(loss_backward)(const void* grad_loss, const void* inverse, const void* gradient,
                               void* out, int64_t n, int dtype, int device, void* stream) {
  if (n == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const int64_t wanted = (n + THREADS - 1) / THREADS;
  const unsigned blocks = static_cast<unsigned>(wanted < MAX_BLOCKS ? wanted : MAX_BLOCKS);
  const auto run = [&](auto zero) -> const char* {
    using T = decltype(zero);
    scale_kernel<T><<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const float*>(grad_loss), static_cast<const float*>(inverse),
        static_cast<const float*>(gradient), static_cast<T*>(out), n);
    return launch_error();
  };
  switch (dtype) {
    case F32: return run(float{});
    case BF16: return run(bf16{});
    case F16: return run(f16{});
    default: return BAD_DTYPE;
  }
}

}  // namespace fastrlhf::cuda
