// A Llama-like block's norms and gates, forward and backward; `_llama_block.py` has the
// specification. All f32 and contiguous; a row's result depends on that row alone.
#include "op.h"

FASTRLHF_OP(block_norm, "out (N, H) = x / rms(x) * weight; inverse (N) = 1 / rms(x).",
            const float* x, const float* weight, float* out, float* inverse, int64_t N, int64_t H,
            double eps, int nthreads)

// d_weight (tiles, H): a sum for each NORM_ROWS rows, to be added up in order.
FASTRLHF_OP(block_norm_backward,
            "d_x = d_through, if any, + the norm's part; d_weight by tiles of rows.",
            const float* d_out, const float* d_through, const float* x, const float* weight,
            const float* inverse, float* d_x, float* d_weight, int64_t N, int64_t H, int nthreads)

FASTRLHF_OP(block_gate, "out (N, I) = silu(gate) * up of gate_up (N, 2 I).",
            const float* gate_up, float* out, int64_t N, int64_t I, int nthreads)

FASTRLHF_OP(block_gate_backward, "Gradient (N, 2 I) of block_gate.", const float* d_out,
            const float* gate_up, float* d_gate_up, int64_t N, int64_t I, int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 65536;  // worth waking a thread for, some 20 us
constexpr int64_t NORM_ROWS = 64;          // of a tile of the weight's gradient

inline int64_t rows_of_grain(int64_t elements) { return GRAIN_ELEMENTS / (elements + 1) + 1; }

// sum of f(i, k), a vector at a time
template <class F>
FASTRLHF_INLINE float sum_of(int64_t n, const F& f) {
  constexpr int64_t W = lanes<vf>;
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += f(i + j * W, static_cast<int>(W));
  }
  each_vector<vf>(n - i, [&](int64_t j, int k) { sums[0] += f(i + j, k); });
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

FASTRLHF_KERNEL(block_norm)(const float* x, const float* weight, float* out, float* inverse,
                            int64_t N, int64_t H, double eps, int nthreads) {
  parallel_for(N, rows_of_grain(H), nthreads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* from = x + n * H;
      const float squares = sum_of(H, [&](int64_t i, int k) {
        const vf v = load_k(from + i, k);
        return v * v;
      });
      const float scale =
          1.0f / s_sqrt(squares / static_cast<float>(H) + static_cast<float>(eps));
      inverse[n] = scale;
      each_vector<vf>(H, [&](int64_t i, int k) {
        store_k(out + n * H + i, load_k(from + i, k) * scale * load_k(weight + i, k), k);
      });
    }
  });
  return nullptr;
}

FASTRLHF_KERNEL(block_norm_backward)(const float* d_out, const float* d_through, const float* x,
                                     const float* weight, const float* inverse, float* d_x,
                                     float* d_weight, int64_t N, int64_t H, int nthreads) {
  const int64_t tiles = (N + NORM_ROWS - 1) / NORM_ROWS;
  parallel_for(tiles, rows_of_grain(NORM_ROWS * H), nthreads, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      float* sums = d_weight + tile * H;
      __builtin_memset(sums, 0, static_cast<uint64_t>(H) * sizeof(float));
      for (int64_t n = tile * NORM_ROWS; n < min_of(N, (tile + 1) * NORM_ROWS); ++n) {
        const float *from = x + n * H, *dy = d_out + n * H;
        // x^ = x / rms: d_x = (g - x^ mean(g x^)) / rms, g = d_out * weight
        const float scale = inverse[n];
        const float along = sum_of(H, [&](int64_t i, int k) {
          return load_k(dy + i, k) * load_k(weight + i, k) * load_k(from + i, k);
        });
        const float back = along * scale * scale / static_cast<float>(H);
        each_vector<vf>(H, [&](int64_t i, int k) {
          const vf v = load_k(from + i, k), g = load_k(dy + i, k);
          store_k(sums + i, vfma(g, v * scale, load_k(sums + i, k)), k);
          vf d = (g * load_k(weight + i, k) - v * back) * scale;
          if (d_through != nullptr) d += load_k(d_through + n * H + i, k);
          store_k(d_x + n * H + i, d, k);
        });
      }
    }
  });
  return nullptr;
}

FASTRLHF_KERNEL(block_gate)(const float* gate_up, float* out, int64_t N, int64_t I,
                            int nthreads) {
  parallel_for(N, rows_of_grain(2 * I), nthreads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float *gate = gate_up + n * 2 * I, *up = gate + I;
      each_vector<vf>(I, [&](int64_t i, int k) {
        const vf g = load_k(gate + i, k);
        store_k(out + n * I + i, g / (1.0f + vexp(-g)) * load_k(up + i, k), k);
      });
    }
  });
  return nullptr;
}

FASTRLHF_KERNEL(block_gate_backward)(const float* d_out, const float* gate_up, float* d_gate_up,
                                     int64_t N, int64_t I, int nthreads) {
  parallel_for(N, rows_of_grain(4 * I), nthreads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float *gate = gate_up + n * 2 * I, *up = gate + I;
      float *d_gate = d_gate_up + n * 2 * I, *d_up = d_gate + I;
      each_vector<vf>(I, [&](int64_t i, int k) {
        const vf g = load_k(gate + i, k), d = load_k(d_out + n * I + i, k);
        // With s = sigmoid(g): silu = g s, and its slope s (1 + g (1 - s)). Of 1 - s, which is also
        // e^-g s, one form cancels where g is large, the other is inf * 0 where it is small.
        const vf e = vexp(-g), s = 1.0f / (1.0f + e);
        const vf rest = select(e > 1.0f, 1.0f - s, e * s);
        store_k(d_gate + i, d * load_k(up + i, k) * (s * vfma(g, rest, vf{} + 1.0f)), k);
        store_k(d_up + i, d * (g * s), k);
      });
    }
  });
  return nullptr;
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
