// Causal attention among the tokens of sequences that stand end to end, with rotary positions, and
// its gradient: what a Llama-like model does between its products in training.
//
// qkv (N, HQ + 2 HKV, D): queries, keys and values of each token, before their positions; sequence
// s has rows cu[s] to cu[s + 1]. cos, sin (positions, D), the sine with the sign of its half:
// y[d] = x[d] cos[d] + x[d + D/2 mod D] sin[d], position 0 at a sequence's first token. out (N, HQ, D);
// logsum (N, HQ), the logarithm of each query's sum of exponentials. All f32, contiguous.
//
// A key-value head of a sequence is one piece of work, done by one thread: keys are turned once,
// BLOCK queries at a time meet those before them. A sequence's bits depend on that sequence alone.
#include "op.h"

FASTRLHF_OP(packed_attention, "Causal attention within packed sequences; queries, keys turned.",
            const float* qkv, const int64_t* cu, const float* cos, const float* sin, float* out,
            float* logsum, int64_t S, int64_t N, int64_t HQ, int64_t HKV, int64_t D,
            int64_t positions, double scale, int nthreads)

FASTRLHF_OP(packed_attention_backward, "Gradient of packed_attention: d_qkv of d_out.",
            const float* d_out, const float* qkv, const int64_t* cu, const float* cos,
            const float* sin, const float* out, const float* logsum, float* d_qkv, int64_t S,
            int64_t N, int64_t HQ, int64_t HKV, int64_t D, int64_t positions, double scale,
            int nthreads)

#ifdef FASTRLHF_ISA
#include "product_tile.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t BLOCK = 48;  // queries; a multiple of MAX_M

struct Packed {
  const float* qkv;
  const int64_t* cu;
  const float *cos, *sin;
  int64_t HQ, HKV, D;
  float scale;

  int64_t row() const { return (HQ + 2 * HKV) * D; }
  int64_t group() const { return HQ / HKV; }
};

// y = x turned by its position, times scale.
FASTRLHF_INLINE void turn(const float* x, const float* cos, const float* sin, int64_t D,
                          float scale, float* y) {
  const int64_t half = D / 2;
  each_vector<vf>(half, [&](int64_t d, int k) {
    const vf a = load_k(x + d, k), b = load_k(x + half + d, k);
    const vf c = load_k(cos + d, k), s = load_k(sin + d, k);
    const vf c2 = load_k(cos + half + d, k), s2 = load_k(sin + half + d, k);
    store_k(y + d, vfma(b, s, a * c) * scale, k);
    store_k(y + half + d, vfma(a, s2, b * c2) * scale, k);
  });
}

// The transpose of turn: the gradient of x from that of y.
FASTRLHF_INLINE void turn_back(const float* y, const float* cos, const float* sin, int64_t D,
                               float scale, float* x) {
  const int64_t half = D / 2;
  each_vector<vf>(half, [&](int64_t d, int k) {
    const vf a = load_k(y + d, k), b = load_k(y + half + d, k);
    const vf c = load_k(cos + d, k), s = load_k(sin + d, k);
    const vf c2 = load_k(cos + half + d, k), s2 = load_k(sin + half + d, k);
    store_k(x + d, vfma(b, s2, a * c) * scale, k);
    store_k(x + half + d, vfma(a, s, b * c2) * scale, k);
  });
}

// to (D, ld) = from (n, D)^T, a few rows of `from` at a time, which may lie pages apart.
void transpose(const float* from, int64_t from_row, int64_t n, int64_t D, float* to, int64_t ld) {
  constexpr int64_t ROWS = 16;
  for (int64_t first = 0; first < n; first += ROWS) {
    const int64_t end = min_of(n, first + ROWS);
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t j = first; j < end; ++j) to[d * ld + j] = from[j * from_row + d];
    }
  }
}

// Memory of a piece of work, in numbers, for a sequence of L tokens.
struct Room {
  int64_t L, D, ld;  // ld: L rounded up to whole lines

  Room(int64_t length, int64_t head) : L(length), D(head), ld((length + 15) / 16 * 16) {}
  int64_t forward() const { return D * ld + L * D + BLOCK * (ld + D); }
  int64_t backward() const { return 2 * D * ld + 2 * L * D + BLOCK * (2 * ld + 2 * D); }
};

// Scores, of which only the first k lanes are there.
FASTRLHF_INLINE vf scores_at(const float* p, int k) {
  return k == lanes<vf> ? load(p) : load_n(p, k, -__builtin_inff());
}

// A row's scores (its first n are its keys') to exp(score - shift), zeros up to `end`; their sum.
FASTRLHF_INLINE float exponentials(float* scores, int64_t n, int64_t end, float shift) {
  vf total{};
  each_vector<vf>(n, [&](int64_t j, int k) {
    const vf e = vexp(scores_at(scores + j, k) - shift);
    total += e;
    store_k(scores + j, e, k);
  });
  each_vector<vf>(end - n, [&](int64_t j, int k) { store_k(scores + n + j, vf{}, k); });
  return hsum(total);
}

// Of scores without a NaN; one with makes a NaN of the sum, whatever is subtracted.
FASTRLHF_INLINE float largest(const float* scores, int64_t n) {
  vf top = splat<vf>(-__builtin_inff());
  each_vector<vf>(n, [&](int64_t j, int k) { top = vmax(scores_at(scores + j, k), top); });
  return hmax(top);
}

void attend(const Packed& c, int64_t s, int64_t kv_head, float* room, float* out, float* logsum) {
  const int64_t first = c.cu[s], L = c.cu[s + 1] - first, D = c.D, row = c.row();
  const Room size(L, D);
  const int64_t ld = size.ld;
  float *keys_t = room, *keys = keys_t + D * ld, *scores = keys + L * D,
        *queries = scores + BLOCK * ld;
  const float* from = c.qkv + first * row + (c.HQ + kv_head) * D;
  const Matrix values{from + c.HKV * D, row, 1};
  for (int64_t j = 0; j < L; ++j) {
    turn(from + j * row, c.cos + j * D, c.sin + j * D, D, 1.0f, keys + j * D);
  }
  transpose(keys, D, L, D, keys_t, ld);
  for (int64_t h = kv_head * c.group(); h < (kv_head + 1) * c.group(); ++h) {
    for (int64_t i = 0; i < L; i += BLOCK) {
      const int64_t m = min_of(BLOCK, L - i), n = i + m;
      for (int64_t r = 0; r < m; ++r) {
        turn(c.qkv + (first + i + r) * row + h * D, c.cos + (i + r) * D, c.sin + (i + r) * D, D,
             c.scale, queries + r * D);
      }
      multiply<false>({queries, D, 1}, {keys_t, ld, 1}, {scores, ld}, m, n, D);
      float* to = out + ((first + i) * c.HQ + h) * D;
      float totals[BLOCK];
      for (int64_t r = 0; r < m; ++r) {
        const float max = largest(scores + r * ld, i + r + 1);
        totals[r] = exponentials(scores + r * ld, i + r + 1, n, max);
        logsum[(first + i + r) * c.HQ + h] = max + s_log(totals[r]);
      }
      multiply<false>({scores, ld, 1}, values, {to, c.HQ * D}, m, D, n);
      for (int64_t r = 0; r < m; ++r) {
        float* y = to + r * c.HQ * D;
        each_vector<vf>(D, [&](int64_t d, int k) {
          store_k(y + d, load_k(y + d, k) / totals[r], k);
        });
      }
    }
  }
}

void attend_backward(const Packed& c, int64_t s, int64_t kv_head, float* room, const float* d_out,
                     const float* out, const float* logsum, float* d_qkv) {
  const int64_t first = c.cu[s], L = c.cu[s + 1] - first, D = c.D, row = c.row();
  if (L == 0) return;
  const Room size(L, D);
  const int64_t ld = size.ld;
  float *keys_t = room, *values_t = keys_t + D * ld, *keys = values_t + D * ld,
        *d_keys = keys + L * D, *weights = d_keys + L * D, *d_scores = weights + BLOCK * ld,
        *queries = d_scores + BLOCK * ld, *d_queries = queries + BLOCK * D;
  const float* from = c.qkv + first * row + (c.HQ + kv_head) * D;
  for (int64_t j = 0; j < L; ++j) {
    turn(from + j * row, c.cos + j * D, c.sin + j * D, D, 1.0f, keys + j * D);
  }
  transpose(keys, D, L, D, keys_t, ld);
  transpose(from + c.HKV * D, row, L, D, values_t, ld);
  float* d_key_rows = d_qkv + first * row + (c.HQ + kv_head) * D;
  float* d_values = d_key_rows + c.HKV * D;
  const int64_t first_head = kv_head * c.group();
  for (int64_t h = first_head; h < first_head + c.group(); ++h) {
    const int64_t last = (L - 1) / BLOCK * BLOCK;
    for (int64_t i = last; i >= 0; i -= BLOCK) {  // the last meets all keys: it begins their sums
      const bool begins = h == first_head && i == last;
      const int64_t m = min_of(BLOCK, L - i), n = i + m;
      for (int64_t r = 0; r < m; ++r) {
        turn(c.qkv + (first + i + r) * row + h * D, c.cos + (i + r) * D, c.sin + (i + r) * D, D,
             c.scale, queries + r * D);
      }
      const int64_t at = ((first + i) * c.HQ + h) * D, step = c.HQ * D;
      const float *dy = d_out + at, *y = out + at;
      multiply<false>({queries, D, 1}, {keys_t, ld, 1}, {weights, ld}, m, n, D);
      multiply<false>({dy, step, 1}, {values_t, ld, 1}, {d_scores, ld}, m, n, D);
      for (int64_t r = 0; r < m; ++r) {
        vf sum{};
        each_vector<vf>(D, [&](int64_t d, int k) {
          sum = vfma(load_k(dy + r * step + d, k), load_k(y + r * step + d, k), sum);
        });
        const float along = hsum(sum);
        float *w = weights + r * ld, *ds = d_scores + r * ld;
        exponentials(w, i + r + 1, n, logsum[(first + i + r) * c.HQ + h]);
        each_vector<vf>(n, [&](int64_t j, int k) {
          store_k(ds + j, load_k(w + j, k) * (load_k(ds + j, k) - along), k);
        });
      }
      const auto to_keys = begins ? multiply<false> : multiply<true>;
      to_keys({weights, 1, ld}, {dy, step, 1}, {d_values, row}, n, D, m);
      to_keys({d_scores, 1, ld}, {queries, D, 1}, {d_keys, D}, n, D, m);
      multiply<false>({d_scores, ld, 1}, {keys, D, 1}, {d_queries, D}, m, D, n);
      for (int64_t r = 0; r < m; ++r) {
        turn_back(d_queries + r * D, c.cos + (i + r) * D, c.sin + (i + r) * D, D, c.scale,
                  d_qkv + (first + i + r) * row + h * D);
      }
    }
  }
  for (int64_t j = 0; j < L; ++j) {
    turn_back(d_keys + j * D, c.cos + j * D, c.sin + j * D, D, 1.0f, d_key_rows + j * row);
  }
}

const char* check(const Packed& c, int64_t S, int64_t N, int64_t positions) {
  if (c.D % 2 != 0) return "D must be even";
  if (c.HKV < 1 || c.HQ % c.HKV != 0) return "query heads must be a multiple of key-value heads";
  if (c.cu[0] != 0 || c.cu[S] != N) return "cu_seqlens must go from 0 to the number of tokens";
  for (int64_t s = 0; s < S; ++s) {
    const int64_t length = c.cu[s + 1] - c.cu[s];
    if (length < 0) return "cu_seqlens must not fall";
    if (length > positions) return "a sequence has more tokens than there are positions";
  }
  return nullptr;
}

// Heads of a sequence one after another: its tokens' rows then stay in the cache.
template <class F>
const char* over_heads(const Packed& c, int64_t S, int nthreads, bool backward, const F& f) {
  bool failed = false;
  parallel_for(S * c.HKV, 1, nthreads, [&](int64_t begin, int64_t end) {
    int64_t longest = 0;
    for (int64_t i = begin; i < end; ++i) {
      longest = max_of(longest, c.cu[i / c.HKV + 1] - c.cu[i / c.HKV]);
    }
    const Room room(longest, c.D);
    const int64_t numbers = backward ? room.backward() : room.forward();
    void* memory = __builtin_malloc(static_cast<uint64_t>(numbers) * sizeof(float));
    if (memory == nullptr) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = begin; i < end; ++i) f(i / c.HKV, i % c.HKV, static_cast<float*>(memory));
    __builtin_free(memory);
  });
  return failed ? "no memory left for attention" : nullptr;
}

}  // namespace

FASTRLHF_KERNEL(packed_attention)(const float* qkv, const int64_t* cu, const float* cos,
                                  const float* sin, float* out, float* logsum, int64_t S,
                                  int64_t N, int64_t HQ, int64_t HKV, int64_t D, int64_t positions,
                                  double scale, int nthreads) {
  const Packed c{qkv, cu, cos, sin, HQ, HKV, D, static_cast<float>(scale)};
  if (const char* wrong = check(c, S, N, positions)) return wrong;
  return over_heads(c, S, nthreads, false, [&](int64_t s, int64_t kv_head, float* room) {
    attend(c, s, kv_head, room, out, logsum);
  });
}

FASTRLHF_KERNEL(packed_attention_backward)(const float* d_out, const float* qkv, const int64_t* cu,
                                           const float* cos, const float* sin, const float* out,
                                           const float* logsum, float* d_qkv, int64_t S, int64_t N,
                                           int64_t HQ, int64_t HKV, int64_t D, int64_t positions,
                                           double scale, int nthreads) {
  const Packed c{qkv, cu, cos, sin, HQ, HKV, D, static_cast<float>(scale)};
  if (const char* wrong = check(c, S, N, positions)) return wrong;
  return over_heads(c, S, nthreads, true, [&](int64_t s, int64_t kv_head, float* room) {
    attend_backward(c, s, kv_head, room, d_out, out, logsum, d_qkv);
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
