// The backward of every loss: the gradient that its forward made, times a scalar.
//
// gradient is f32 or f64, contiguous, as are grad_loss and inverse, one number each; out is
// f64 for f64, and f32, bf16 or f16 for f32.
#include "op.h"

FASTRLHF_OP(loss_backward, "out = gradient * (grad_loss * inverse).",
            const void* grad_loss, const void* inverse, const void* gradient, void* out, int64_t n,
            int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN = 16384;  // a multiplication each: some 10 us

}  // namespace

FASTRLHF_KERNEL(loss_backward)(const void* grad_loss, const void* inverse, const void* gradient,
                               void* out, int64_t n, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    using V = vec_t<A>;
    const A factor = *static_cast<const A*>(grad_loss) * *static_cast<const A*>(inverse);
    const A* g = static_cast<const A*>(gradient);
    T* o = static_cast<T*>(out);
    parallel_for(n, GRAIN, nthreads, [&](int64_t begin, int64_t end) {
      each_vector<V>(end - begin, [&](int64_t i, int k) {
        store_k(o + begin + i, load_k(g + begin + i, k) * factor, k);
      });
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
