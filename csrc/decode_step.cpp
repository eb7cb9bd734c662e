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

// x (B, K), weight in panels (ceil(N / 64), K, 64), zeros past N: columns of the product side by
// side, so that a panel is read from end to end; f32. bias (N) and residual (B, N), which may be out,
// are added if given. A row's bits do not depend on how many rows there are.
FASTRLHF_OP(decode_product, "out (B, N) = residual + bias + x (B, K) times a weight in panels.",
            const float* x, const float* panels, const float* bias, const float* residual,
            float* out, int64_t B, int64_t N, int64_t K, int nthreads)

// All that a layer does after its attention, and the next one before its own, f32:
//
//   finish  x += seen Wo; x += (silu(gate) * up) Wdown, of gate, up = norm(x) Wgate_up
//   start   qkv = norm(x) Wqkv, queries turned in place, keys and values to the cache as above;
//           or, with no cache, logits = norm(x) Whead
//
// x (B, H), seen (B, HQ D); h (B, H), gate_up (B, 2 I), hidden (B, I) are for what lies between; the
// result goes to `out` (B, N). finish and start hold addresses, 0 for what there is none of, and may
// be null: finish {Wo, bias, norm, Wgate_up, bias, Wdown, bias}, start {norm, Wqkv or Whead, bias,
// q_norm, k_norm, k_cache, v_cache}; matrices in panels.
FASTRLHF_OP(decode_between, "A Llama-like model's step from one layer's attention to the next's.",
            float* x, const float* seen, float* h, float* gate_up, float* hidden, float* out,
            const int64_t* finish, const int64_t* start, const int64_t* positions,
            const int64_t* slots, const float* cos, const float* sin, int64_t B, int64_t H,
            int64_t I, int64_t N, int64_t HQ, int64_t HKV, int64_t D, int64_t n_positions,
            int64_t pages, int64_t page_size, int64_t page_stride, int64_t slot_stride,
            int64_t head_stride, double eps, int nthreads)

#ifdef FASTRLHF_ISA
#include "product_tile.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 65536;  // worth waking a thread for, some 20 us
constexpr int64_t MAX_D = 256;
constexpr int64_t GRAIN_NUMBERS = 32768;  // of a weight; worth waking a thread for, some 10 us
constexpr int64_t K_BLOCK = 32;           // rows of a panel: few, to stay in the first-level cache
constexpr int64_t ROWS = 48;              // that meet a block of a panel one after another


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

// Columns of a panel, n of them there, for rows x. Summed in a tile of its own: rows of `out` may lie
// a multiple of a page apart, and would drive each other from the cache.
void panel_product(const float* x, const float* panel, const float* bias, const float* residual,
                   float* out, int64_t rows, int64_t n, int64_t N, int64_t K) {
  alignas(64) float sums[ROWS * PANEL];
  __builtin_memset(sums, 0, static_cast<uint64_t>(rows * PANEL) * sizeof(float));
  for (int64_t k = 0; k < K; k += K_BLOCK) {
    const int64_t terms = min_of(K_BLOCK, K - k);
    const float* block = panel + k * PANEL;
    multiply_panel<true>({x + k, K, 1}, {block, PANEL, 1}, {sums, PANEL}, rows, terms,
                         block + terms * PANEL, terms * PANEL / 16);
  }
  for (int64_t r = 0; r < rows; ++r) {
    each_vector<vf>(n, [&](int64_t j, int k) {
      vf y = load_k(sums + r * PANEL + j, k);
      if (bias != nullptr) y += load_k(bias + j, k);
      if (residual != nullptr) y += load_k(residual + r * N + j, k);
      store_k(out + r * N + j, y, k);
    });
  }
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

FASTRLHF_KERNEL(decode_product)(const float* x, const float* panels, const float* bias,
                                const float* residual, float* out, int64_t B, int64_t N,
                                int64_t K, int nthreads) {
  const int64_t count = (N + PANEL - 1) / PANEL;
  parallel_for(count, GRAIN_NUMBERS / (K * PANEL + 1) + 1, nthreads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t p = begin; p < end; ++p) {
                   const int64_t at = p * PANEL, n = min_of(PANEL, N - at);
                   for (int64_t b = 0; b < B; b += ROWS) {
                     panel_product(x + b * K, panels + at * K,
                                   bias == nullptr ? nullptr : bias + at,
                                   residual == nullptr ? nullptr : residual + b * N + at,
                                   out + b * N + at, min_of(ROWS, B - b), n, N, K);
                   }
                 }
               });
  return nullptr;
}

FASTRLHF_KERNEL(decode_between)(float* x, const float* seen, float* h, float* gate_up,
                                float* hidden, float* out, const int64_t* finish,
                                const int64_t* start, const int64_t* positions,
                                const int64_t* slots, const float* cos, const float* sin,
                                int64_t B, int64_t H, int64_t I, int64_t N, int64_t HQ,
                                int64_t HKV, int64_t D, int64_t n_positions, int64_t pages,
                                int64_t page_size, int64_t page_stride, int64_t slot_stride,
                                int64_t head_stride, double eps, int nthreads) {
  const auto at = [](int64_t address) { return reinterpret_cast<float*>(address); };
  const auto norm = [&](int64_t weight) {
    FASTRLHF_SYMBOL(decode_norm, FASTRLHF_ISA)(x, at(weight), h, B, H, eps, F32, nthreads);
  };
  const auto product = [&](const float* from, const int64_t* matrix, const float* residual,
                           float* to, int64_t columns, int64_t terms) {
    FASTRLHF_SYMBOL(decode_product, FASTRLHF_ISA)
    (from, at(matrix[0]), at(matrix[1]), residual, to, B, columns, terms, nthreads);
  };
  if (finish != nullptr) {
    product(seen, finish, x, x, H, HQ * D);
    norm(finish[2]);
    product(h, finish + 3, nullptr, gate_up, 2 * I, H);
    FASTRLHF_SYMBOL(decode_gate, FASTRLHF_ISA)(gate_up, hidden, B, I, F32, nthreads);
    product(hidden, finish + 5, x, x, H, I);
  }
  norm(start[0]);
  product(h, start + 1, nullptr, out, N, H);
  if (start[5] == 0) return nullptr;
  return FASTRLHF_SYMBOL(decode_rope, FASTRLHF_ISA)(
      out, positions, slots, cos, sin, at(start[3]), at(start[4]), at(start[5]), at(start[6]), B,
      HQ, HKV, D, n_positions, pages, page_size, page_stride, slot_stride, head_stride, page_stride,
      slot_stride, head_stride, eps, F32, nthreads);
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
