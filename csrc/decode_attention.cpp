// Attention of one query token a sequence over a paged cache.
//
// q, out (B, HQ, D), k_cache, v_cache (pages, page_size, HKV, D), all of one type, dense along D,
// strides in elements (out contiguous); tables (B, P), lengths (B); sinks (HQ) of the type of
// arithmetic, or null; window 0: none; softcap 0: none. D <= 256. A length past the table or a page
// past the cache, of a token attended to, is an error.
//
// A sequence's tokens are cut into splits of `split`, a multiple of TILE_T, and these into tiles. A
// tile's keys are read once for up to MAX_HEADS query heads of their group, then its values; a
// split's maximum, sum and weighted sum are merged into the head's, from left to right.
//
// With `scratch` the splits of a head are shared out, each to a place of its own there, D + 2
// numbers for each split of each query head, and merged afterwards in the same order by the same
// code: the same bits. Without it one thread takes a whole key-value head of a sequence.
//
// The next tile's rows are fetched while a tile is worked on: a head's rows lie apart, and the
// processor does not guess where. (13.7 GB/s and 10 without, one thread, 12 heads of 64 numbers.)
#include "op.h"

FASTRLHF_OP(decode_attention, "One token a sequence attends to a paged cache.",
            const void* q, const void* k_cache, const void* v_cache, const int32_t* tables,
            const int32_t* lengths, const void* sinks, void* scratch, void* out, int64_t B,
            int64_t HQ, int64_t HKV, int64_t D, int64_t pages, int64_t page_size, int64_t P,
            int64_t window, int64_t split, int64_t q_stride, int64_t q_head_stride,
            int64_t k_page_stride, int64_t k_slot_stride, int64_t k_head_stride,
            int64_t v_page_stride, int64_t v_slot_stride, int64_t v_head_stride, double scale,
            double softcap, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "attention_tile.h"
#include "pool.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_BYTES = 131072;  // of the cache; worth waking a thread for
// ---- what a call is given, and where it finds it

template <class T>
struct Call {
  const T *q, *k_cache, *v_cache;
  const int32_t *tables, *lengths;
  const acc_t<T>* sinks;
  acc_t<T>* scratch;
  T* out;
  int64_t HQ, HKV, D, page_size, P, window, split, splits;
  int64_t q_stride, q_head_stride, k_page_stride, k_slot_stride, k_head_stride, v_page_stride,
      v_slot_stride, v_head_stride;
  acc_t<T> scale, softcap;

  int64_t first(int64_t b) const {  // token that is attended to
    return window == 0 ? 0 : max_of<int64_t>(lengths[b] - window, 0);
  }
  acc_t<T>* place(int64_t b, int64_t head, int64_t s) const {
    return scratch + ((b * HQ + head) * splits + s) * (D + 2);
  }
};

// Finds the rows of tokens from `from` to the end of its tile, or to `end`.
template <class T>
void find(Rows<T>& rows, const Call<T>& c, int64_t b, int64_t kv_head, int64_t from, int64_t end) {
  const int64_t n = max_of<int64_t>(min_of((from / TILE_T + 1) * TILE_T, end) - from, 0);
  const int32_t* page = c.tables + b * c.P + from / c.page_size;
  const T* k = c.k_cache + kv_head * c.k_head_stride;
  const T* v = c.v_cache + kv_head * c.v_head_stride;
  int64_t offset = from % c.page_size;
  for (int64_t t = 0; t < n;) {
    const int64_t stop = min_of(n, t + c.page_size - offset);
    const T* key = k + *page * c.k_page_stride + offset * c.k_slot_stride;
    const T* value = v + *page * c.v_page_stride + offset * c.v_slot_stride;
    for (; t < stop; ++t, key += c.k_slot_stride, value += c.v_slot_stride) {
      rows.keys[t] = key;
      rows.values[t] = value;
    }
    ++page;
    offset = 0;
  }
  for (int64_t t = n; t % 4 != 0; ++t) rows.keys[t] = rows.keys[n - 1];
  rows.n = n;
}

// ---- splits

template <class T>
void load_queries(const Call<T>& c, int64_t b, int64_t head, int64_t heads, acc_t<T>* q) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t W = lanes<V>;
  for (int64_t h = 0; h < heads; ++h) {
    const T* row = c.q + b * c.q_stride + (head + h) * c.q_head_stride;
    A* to = q + h * MAX_D;
    int64_t d = 0;
    for (; d + 2 * W <= c.D; d += 2 * W) {
      V x, y;
      load_pair(row + d, x, y);
      store(to + d, x);
      store(to + d + W, y);
    }
    if (d + W <= c.D) {
      store(to + d, load(row + d));
      d += W;
    }
    if (d < c.D) store(to + d, load_n(row + d, c.D - d, A(0)));
  }
}

// Split `s` of a key-value head, for `heads` of its query heads. Never inlined, as `merge` below:
// both ways of sharing out the work run one and the same code.
template <class T>
__attribute__((noinline)) void attend(const Call<T>& c, int64_t b, int64_t kv_head, int64_t s,
                                      int64_t heads, const acc_t<T>* q, State<acc_t<T>>* states,
                                      acc_t<T>* sums) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  for (int64_t h = 0; h < heads; ++h) {
    states[h] = {-INF<A>, A(0)};
    for (int64_t d = 0; d < c.D; d += lanes<V>) store(sums + h * MAX_D + d, V{});
  }
  const int64_t end = min_of<int64_t>((s + 1) * c.split, c.lengths[b]), first = c.first(b);
  Rows<T> tiles[2];  // this tile's, and the next one's, which is fetched meanwhile
  int64_t at = max_of(s * c.split, first);
  find(tiles[0], c, b, kv_head, at, end);
  for (int i = 0; at < end; i ^= 1) {
    const Rows<T>& rows = tiles[i];
    Rows<T>& next = tiles[i ^ 1];
    const int64_t n = rows.n;
    at += n;
    // Past the split, and the head: in one thread's hands the next one follows.
    if (at < c.lengths[b]) {
      find(next, c, b, kv_head, at, c.lengths[b]);
    } else if (kv_head + 1 < c.HKV) {
      find(next, c, b, kv_head + 1, first, c.lengths[b]);
    } else {
      next.n = 0;
    }
    A scores[MAX_HEADS * TILE_T];
    over_heads(heads, [&](auto count, int64_t h) {
      dots<decltype(count)::value>(q + h * MAX_D, rows.keys, h == 0 ? &next : nullptr, n, c.D, c.scale,
                                   scores + h * TILE_T);
    });
    for (int64_t h = 0; h < heads; ++h) {
      exponentials(scores + h * TILE_T, n, c.softcap, c.D, states[h], sums + h * MAX_D);
    }
    over_heads(heads, [&](auto count, int64_t h) {
      weigh<decltype(count)::value>(scores + h * TILE_T, rows.values, n, c.D, sums + h * MAX_D);
    });
  }
}

template <class A>
__attribute__((noinline)) void merge(State<A>& state, A* sums, const State<A>& part,
                                     const A* part_sums, int64_t D) {
  const A max = max_of(state.max, part.max);
  const A shift = max == -INF<A> ? A(0) : max;
  const A old_scale = s_exp(state.max - shift), new_scale = s_exp(part.max - shift);
  state.max = max;
  state.total = state.total * old_scale + part.total * new_scale;
  for (int64_t d = 0; d < D; ++d) sums[d] = sums[d] * old_scale + part_sums[d] * new_scale;
}

template <class A>
void start(const A* sinks, int64_t head, int64_t D, State<A>& state, A* sums) {
  state.max = sinks == nullptr ? -INF<A> : sinks[head];
  state.total = state.max == -INF<A> ? A(0) : A(1);
  for (int64_t d = 0; d < D; d += lanes<vec_t<A>>) store(sums + d, vec_t<A>{});
}

// sums / total, in the order of `out`; the inverse of load_queries.
template <class T>
void finish(acc_t<T> total, const acc_t<T>* sums, int64_t D, T* out) {
  using V = vec_t<acc_t<T>>;
  constexpr int64_t W = lanes<V>;
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    store_pair<false>(out + d, load(sums + d) / total, load(sums + d + W) / total);
  }
  if (d + W <= D) {
    store(out + d, load(sums + d) / total);
    d += W;
  }
  if (d < D) store_n(out + d, load(sums + d) / total, D - d);
}

// All splits of a key-value head, for one query head group after another.
template <class T>
void whole_head(const Call<T>& c, int64_t b, int64_t kv_head) {
  using A = acc_t<T>;
  const int64_t group = c.HQ / c.HKV;
  const int64_t first = c.first(b) / c.split;
  alignas(64) A q[MAX_HEADS * MAX_D], sums[MAX_HEADS * MAX_D], part_sums[MAX_HEADS * MAX_D];
  State<A> states[MAX_HEADS], parts[MAX_HEADS];
  for (int64_t g = 0; g < group; g += MAX_HEADS) {
    const int64_t heads = min_of(MAX_HEADS, group - g), head = kv_head * group + g;
    load_queries(c, b, head, heads, q);
    for (int64_t h = 0; h < heads; ++h) start(c.sinks, head + h, c.D, states[h], sums + h * MAX_D);
    for (int64_t s = first; s * c.split < c.lengths[b]; ++s) {
      attend(c, b, kv_head, s, heads, q, parts, part_sums);
      for (int64_t h = 0; h < heads; ++h) {
        merge(states[h], sums + h * MAX_D, parts[h], part_sums + h * MAX_D, c.D);
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      finish(states[h].total, sums + h * MAX_D, c.D, c.out + (b * c.HQ + head + h) * c.D);
    }
  }
}

template <class T>
void one_split(const Call<T>& c, int64_t b, int64_t kv_head, int64_t s) {
  using A = acc_t<T>;
  const int64_t group = c.HQ / c.HKV;
  alignas(64) A q[MAX_HEADS * MAX_D], sums[MAX_HEADS * MAX_D];
  State<A> states[MAX_HEADS];
  for (int64_t g = 0; g < group; g += MAX_HEADS) {
    const int64_t heads = min_of(MAX_HEADS, group - g), head = kv_head * group + g;
    load_queries(c, b, head, heads, q);
    attend(c, b, kv_head, s, heads, q, states, sums);
    for (int64_t h = 0; h < heads; ++h) {
      A* to = c.place(b, head + h, s);
      to[0] = states[h].max;
      to[1] = states[h].total;
      for (int64_t d = 0; d < c.D; ++d) to[2 + d] = sums[h * MAX_D + d];
    }
  }
}

template <class T>
void merge_splits(const Call<T>& c, int64_t b, int64_t head) {
  using A = acc_t<T>;
  alignas(64) A sums[MAX_D];
  State<A> state;
  start(c.sinks, head, c.D, state, sums);
  for (int64_t s = c.first(b) / c.split; s * c.split < c.lengths[b]; ++s) {
    const A* part = c.place(b, head, s);
    merge(state, sums, State<A>{part[0], part[1]}, part + 2, c.D);
  }
  finish(state.total, sums, c.D, c.out + (b * c.HQ + head) * c.D);
}

}  // namespace

FASTRLHF_KERNEL(decode_attention)(const void* q, const void* k_cache, const void* v_cache,
                                  const int32_t* tables, const int32_t* lengths,
                                  const void* sinks, void* scratch, void* out, int64_t B,
                                  int64_t HQ, int64_t HKV, int64_t D, int64_t pages,
                                  int64_t page_size, int64_t P, int64_t window, int64_t split,
                                  int64_t q_stride, int64_t q_head_stride, int64_t k_page_stride,
                                  int64_t k_slot_stride, int64_t k_head_stride,
                                  int64_t v_page_stride, int64_t v_slot_stride,
                                  int64_t v_head_stride, double scale, double softcap, int dtype,
                                  int nthreads) {
  if (D > MAX_D) return "D must be at most 256";
  if (split <= 0 || split % TILE_T != 0) return "split must be a multiple of 64";
  int64_t total = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = lengths[b];
    if (length < 0 || length > P * page_size) return "seq_lens must be in [0, P * page_size]";
    const int64_t first = window == 0 ? 0 : max_of<int64_t>(length - window, 0);
    for (int64_t p = first / page_size; p * page_size < length; ++p) {
      const int64_t page = tables[b * P + p];
      if (page < 0 || page >= pages) return "block_tables must be in [0, pages) up to seq_lens";
    }
    total += length - first;
  }
  if (HQ == 0) return nullptr;
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t splits = P * page_size / split + (P * page_size % split != 0 ? 1 : 0);
    const Call<T> c{static_cast<const T*>(q), static_cast<const T*>(k_cache),
                    static_cast<const T*>(v_cache), tables, lengths,
                    static_cast<const A*>(sinks), static_cast<A*>(scratch), static_cast<T*>(out),
                    HQ, HKV, D, page_size, P, window, split, splits,
                    q_stride, q_head_stride, k_page_stride, k_slot_stride, k_head_stride,
                    v_page_stride, v_slot_stride, v_head_stride,
                    static_cast<A>(scale), static_cast<A>(softcap)};
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const int64_t bytes = 2 * size * D * (total / max_of<int64_t>(B, 1)) + 1;  // of a head
    // Whether the sequence is empty; these query heads of it are then zeros.
    const auto empty = [&](int64_t b, int64_t head, int64_t heads) {
      if (lengths[b] > 0) return false;
      T* rows = c.out + (b * HQ + head) * D;
      __builtin_memset(rows, 0, static_cast<uint64_t>(heads * D * size));
      return true;
    };
    const int64_t group = HQ / HKV;
    if (scratch == nullptr) {
      parallel_for(B * HKV, GRAIN_BYTES / bytes + 1, nthreads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (!empty(i / HKV, i % HKV * group, group)) whole_head(c, i / HKV, i % HKV);
        }
      });
      return nullptr;
    }
    const int64_t piece = bytes / max_of<int64_t>(splits, 1) + 1;
    parallel_for(
        B * HKV * splits, GRAIN_BYTES / piece + 1, nthreads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t s = i % splits, b = i / splits / HKV;
            if (s * split >= lengths[b] || (s + 1) * split <= c.first(b)) continue;
            one_split(c, b, i / splits % HKV, s);
          }
        });
    const int64_t row = GRAIN_BYTES / (4 * (D + 2) * max_of<int64_t>(splits, 1)) + 1;
    parallel_for(B * HQ, row, nthreads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!empty(i / HQ, i % HQ, 1)) merge_splits(c, i / HQ, i % HQ);
      }
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
