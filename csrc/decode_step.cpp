// What a Llama-like model's decode step does between its matrix products; `_decode_step.py` has the
// specification. Each of these is a dozen operations in torch, on rows that stay in the caches.
//
// x (N, H) is the residual stream, f32; all else is of one type, f32, bf16 or f16, and contiguous,
// but the caches, which are dense along D. Arithmetic is in f32, and rounded once. A row's result
// depends on that row alone.
#include "op.h"

FASTRLHF_OP(decode_norm, "RMSNorm of x (N, H), times weight (H), to out (N, H).",
            const float* x, const void* weight, void* out, int64_t N, int64_t H, double eps,
            int dtype, int nthreads)

// qkv (N, HQ + 2 HKV, D): queries, keys, values of each token. Queries and keys are normalised, if
// q_norm (D) and k_norm (D) are given, and turned by cos and sin (positions, D), f32, the sine with
// the sign of its half: y[d] = x[d] cos[d] + x[d + D/2 mod D] sin[d]. Queries are written back, keys
// and values to their slots, as in append_kv.cpp; positions and slots (N).
FASTRLHF_OP(decode_rope, "Queries turned in place; turned keys and values to a paged cache.",
            void* qkv, const int64_t* positions, const int64_t* slots, const float* cos,
            const float* sin, const void* q_norm, const void* k_norm, void* k_cache, void* v_cache,
            int64_t N, int64_t HQ, int64_t HKV, int64_t D, int64_t n_positions, int64_t pages,
            int64_t page_size, int64_t k_page_stride, int64_t k_slot_stride, int64_t k_head_stride,
            int64_t v_page_stride, int64_t v_slot_stride, int64_t v_head_stride, double eps,
            int dtype, int nthreads)

FASTRLHF_OP(decode_gate, "out (N, I) = silu(gate) * up of gate_up (N, 2 I).",
            const void* gate_up, void* out, int64_t N, int64_t I, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 65536;  // worth waking a thread for, some 20 us
constexpr int64_t MAX_D = 256;

// The types that a model's weights have on this path.
template <class F>
const char* with_model_dtype(int dtype, const F& f) {
  switch (dtype) {
    case F32: return f(float{});
    case BF16: return f(bf16{});
    case F16: return f(f16{});
    default: return BAD_DTYPE;
  }
}

// 1 / sqrt(mean of squares + eps)
template <class T>
float inverse_rms(const T* x, int64_t n, float eps) {
  constexpr int64_t W = lanes<vf>;
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const vf v = load(x + i + k * W);
      sums[k] = vfma(v, v, sums[k]);
    }
  }
  each_vector<vf>(n - i, [&](int64_t j, int k) {
    const vf v = load_k(x + i + j, k);
    sums[0] = vfma(v, v, sums[0]);
  });
  const float sum = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / s_sqrt(sum / static_cast<float>(n) + eps);
}

// A head's D numbers, normalised if there is a weight, turned, and rounded to `out`, which may be x.
template <class T>
FASTRLHF_INLINE void turn(const T* x, const T* weight, const float* cos, const float* sin,
                          int64_t D, float eps, T* out) {
  alignas(64) float y[MAX_D];
  const float scale = weight == nullptr ? 1.0f : inverse_rms(x, D, eps);
  each_vector<vf>(D, [&](int64_t d, int k) {
    vf v = load_k(x + d, k);
    if (weight != nullptr) v = v * scale * load_k(weight + d, k);
    store_k(y + d, v, k);
  });
  const int64_t half = D / 2;
  const auto half_of = [&](int64_t begin, int64_t other) {
    each_vector<vf>(half, [&](int64_t d, int k) {
      const vf a = load_k(y + begin + d, k), b = load_k(y + other + d, k);
      const vf c = load_k(cos + begin + d, k), s = load_k(sin + begin + d, k);
      store_k(out + begin + d, vfma(b, s, a * c), k);
    });
  };
  half_of(0, half);
  half_of(half, 0);
}

}  // namespace

FASTRLHF_KERNEL(decode_norm)(const float* x, const void* weight, void* out, int64_t N, int64_t H,
                             double eps, int dtype, int nthreads) {
  return with_model_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const T* w = static_cast<const T*>(weight);
    parallel_for(N, GRAIN_ELEMENTS / (H + 1) + 1, nthreads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float* from = x + n * H;
        T* to = static_cast<T*>(out) + n * H;
        const float scale = inverse_rms(from, H, static_cast<float>(eps));
        each_vector<vf>(H, [&](int64_t i, int k) {
          store_k(to + i, load_k(from + i, k) * scale * load_k(w + i, k), k);
        });
      }
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(decode_rope)(void* qkv, const int64_t* positions, const int64_t* slots,
                             const float* cos, const float* sin, const void* q_norm,
                             const void* k_norm, void* k_cache, void* v_cache, int64_t N,
                             int64_t HQ, int64_t HKV, int64_t D, int64_t n_positions,
                             int64_t pages, int64_t page_size, int64_t k_page_stride,
                             int64_t k_slot_stride, int64_t k_head_stride, int64_t v_page_stride,
                             int64_t v_slot_stride, int64_t v_head_stride, double eps, int dtype,
                             int nthreads) {
  if (D > MAX_D || D % 2 != 0) return "D must be even, at most 256";
  for (int64_t n = 0; n < N; ++n) {
    if (slots[n] >= pages * page_size) return "slots must be below pages * page_size";
    if (positions[n] < 0 || positions[n] >= n_positions) return "positions must be in the tables";
  }
  return with_model_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    const T *q_weight = static_cast<const T*>(q_norm), *k_weight = static_cast<const T*>(k_norm);
    const float e = static_cast<float>(eps);
    const int64_t row = (HQ + 2 * HKV) * D;
    parallel_for(N, GRAIN_ELEMENTS / (2 * row + 1) + 1, nthreads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* q = static_cast<T*>(qkv) + n * row;
        const float *c = cos + positions[n] * D, *s = sin + positions[n] * D;
        for (int64_t h = 0; h < HQ; ++h) turn(q + h * D, q_weight, c, s, D, e, q + h * D);
        if (slots[n] < 0) continue;
        const T *k = q + HQ * D, *v = k + HKV * D;
        const int64_t page = slots[n] / page_size, offset = slots[n] % page_size;
        T* key = static_cast<T*>(k_cache) + page * k_page_stride + offset * k_slot_stride;
        T* value = static_cast<T*>(v_cache) + page * v_page_stride + offset * v_slot_stride;
        for (int64_t h = 0; h < HKV; ++h) {
          turn(k + h * D, k_weight, c, s, D, e, key + h * k_head_stride);
          __builtin_memcpy(value + h * v_head_stride, v + h * D,
                           static_cast<uint64_t>(D) * sizeof(T));
        }
      }
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(decode_gate)(const void* gate_up, void* out, int64_t N, int64_t I, int dtype,
                             int nthreads) {
  return with_model_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    parallel_for(N, GRAIN_ELEMENTS / (2 * I + 1) + 1, nthreads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T *gate = static_cast<const T*>(gate_up) + n * 2 * I, *up = gate + I;
        T* to = static_cast<T*>(out) + n * I;
        each_vector<vf>(I, [&](int64_t i, int k) {
          const vf g = load_k(gate + i, k);
          store_k(to + i, g / (1.0f + vexp(-g)) * load_k(up + i, k), k);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
