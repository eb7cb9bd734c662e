// Log-probs of labels and the entropy, row by row, and their gradient; for logprobs_from_logits and
// for the linear_* ops, which hand over a tile of columns at a time.
//
// x holds N rows of V columns, f32, f64, bf16 or f16, dense along the columns; row n is at
// (n / inner) outer_stride + (n % inner) inner_stride. `first` is the global column of x's first
// one, a multiple of ROW_TILE if the bits are to be those of a whole row. labels are (N, K), dense,
// global; all else is dense too and of the type of arithmetic: bias (V) or null, temperatures (N)
// or null (then `temperature` holds for all rows), state (3, N): max, rest, moment, see
// logprob_row.h. cap 0 is no cap.
//
// Between `begin` and `end` a row is handed over from left to right; meanwhile logprobs (N, K) holds
// the logits of the labels seen so far, -inf of the others.
#include "op.h"

FASTRLHF_OP(check_labels, "An error if a label is neither in [0, V) nor ignored.",
            const int64_t* labels, int64_t n, int64_t V, int64_t ignore_index)
FASTRLHF_OP(logprobs_from_logits, "Log-probs and, where entropy is not null, the entropy (N).",
            const void* x, const void* bias, const int64_t* labels, const void* temperatures,
            void* state, void* logprobs, void* entropy, int64_t N, int64_t V, int64_t K,
            int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t first,
            double temperature, double scale, double cap, int64_t ignore_index, int begin, int end,
            int dtype, int nthreads)
FASTRLHF_OP(logprobs_from_logits_backward,
            "dx, rows dx_stride apart, which may be x, from the gradients (N, K) and (N) or null.",
            const void* x, const void* bias, const int64_t* labels, const void* temperatures,
            const void* state, const void* grad_logprobs, const void* grad_entropy, void* dx,
            int64_t N, int64_t V, int64_t K, int64_t inner, int64_t outer_stride,
            int64_t inner_stride, int64_t dx_stride, int64_t first, double temperature,
            double scale, double cap, int64_t ignore_index, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "logprob_row.h"
#include "pool.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

// A gradient as large as this does not stay in the caches until it is read.
constexpr int64_t LARGE_BYTES = int64_t{32} << 20;
constexpr int64_t GRAIN_COLUMNS = 16384;  // worth waking a thread for; about 10 us

template <class A>
Exponent<A> exponent_of(const void* temperatures, int64_t n, const Exponent<A>& shared) {
  return temperatures == nullptr ? shared : Exponent<A>(static_cast<const A*>(temperatures)[n]);
}

int64_t offset_of(int64_t n, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  if (n < inner) return n * inner_stride;
  return (n / inner) * outer_stride + (n % inner) * inner_stride;
}

}  // namespace

FASTRLHF_KERNEL(check_labels)(const int64_t* labels, int64_t n, int64_t V, int64_t ignore_index) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) {
    bad |= (labels[i] < 0 || labels[i] >= V) && labels[i] != ignore_index;
  }
  return bad ? "a label is out of range" : nullptr;
}

FASTRLHF_KERNEL(logprobs_from_logits)(const void* x, const void* bias, const int64_t* labels,
                                      const void* temperatures, void* state, void* logprobs,
                                      void* entropy, int64_t N, int64_t V, int64_t K,
                                      int64_t inner, int64_t outer_stride, int64_t inner_stride,
                                      int64_t first, double temperature, double scale, double cap,
                                      int64_t ignore_index, int begin, int end, int dtype,
                                      int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Head<A> head{static_cast<const A*>(bias), static_cast<A>(scale), static_cast<A>(cap)};
    const Exponent<A> shared(static_cast<A>(temperature));
    A* states = static_cast<A*>(state);
    parallel_for(N, GRAIN_COLUMNS / (V + 1) + 1, nthreads, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        const T* row =
            static_cast<const T*>(x) + offset_of(n, inner, outer_stride, inner_stride);
        const int64_t* label = labels + n * K;
        A* logprob = static_cast<A*>(logprobs) + n * K;
        bool valid = false;
        for (int64_t k = 0; k < K; ++k) valid = valid || label[k] != ignore_index;

        const Exponent<A> t = exponent_of(temperatures, n, shared);
        RowState<A> s{-INF<A>, A(0), A(0)};
        if (!begin) s = {states[n], states[N + n], states[2 * N + n]};
        if (valid) {
          scan_row(s, row, V, head, t, entropy != nullptr);
          for (int64_t k = 0; k < K; ++k) {
            A slope;
            if (begin) logprob[k] = -INF<A>;
            if (label[k] != ignore_index && label[k] >= first && label[k] < first + V) {
              logprob[k] = head.one(row, label[k] - first, slope);
            }
          }
        }
        if (end) {
          if (valid && s.max == -INF<A>) s.rest = NOT_A_NUMBER<A>;
          for (int64_t k = 0; k < K; ++k) {
            logprob[k] = label[k] == ignore_index ? A(0) : row_logprob(s, logprob[k], t.temperature);
          }
          if (entropy != nullptr) {
            static_cast<A*>(entropy)[n] = valid ? row_entropy(s, t.temperature) : A(0);
          }
        }
        states[n] = s.max;
        states[N + n] = s.rest;
        states[2 * N + n] = s.moment;
      }
    });
    return nullptr;
  });
}

FASTRLHF_KERNEL(logprobs_from_logits_backward)(
    const void* x, const void* bias, const int64_t* labels, const void* temperatures,
    const void* state, const void* grad_logprobs, const void* grad_entropy, void* dx, int64_t N,
    int64_t V, int64_t K, int64_t inner, int64_t outer_stride, int64_t inner_stride,
    int64_t dx_stride, int64_t first, double temperature, double scale, double cap,
    int64_t ignore_index, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Head<A> head{static_cast<const A*>(bias), static_cast<A>(scale), static_cast<A>(cap)};
    const Exponent<A> shared(static_cast<A>(temperature));
    const A* states = static_cast<const A*>(state);
    const int64_t bytes = N * V * static_cast<int64_t>(sizeof(T));
    const bool stream = dx != x && dx_stride == V && bytes >= LARGE_BYTES;
    parallel_for(N, GRAIN_COLUMNS / (V + 1) + 1, nthreads, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        const T* row =
            static_cast<const T*>(x) + offset_of(n, inner, outer_stride, inner_stride);
        const Exponent<A> t = exponent_of(temperatures, n, shared);
        const RowState<A> s{states[n], states[N + n], states[2 * N + n]};
        gradient_row(s, row, static_cast<T*>(dx) + n * dx_stride, V, first, labels + n * K,
                     static_cast<const A*>(grad_logprobs) + n * K, K, ignore_index,
                     grad_entropy == nullptr ? A(0) : static_cast<const A*>(grad_entropy)[n], head,
                     t, stream);
      }
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
