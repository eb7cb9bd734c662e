// Keys and values of new tokens, copied into a paged cache.
//
// k, v (N, HKV, D) of one type, k_cache, v_cache (pages, page_size, HKV, D) of another or the same,
// all dense along D, strides in elements; slots (N), page * page_size + offset, below 0: skipped. A
// slot past the cache is an error, found before anything is written.
#include "op.h"

FASTRLHF_OP(append_kv, "Writes keys and values into their slots of a paged cache.",
            const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots,
            int64_t N, int64_t HKV, int64_t D, int64_t pages, int64_t page_size, int64_t k_stride,
            int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride, int64_t k_page_stride,
            int64_t k_slot_stride, int64_t k_cache_head_stride, int64_t v_page_stride,
            int64_t v_slot_stride, int64_t v_cache_head_stride, int dtype, int cache_dtype,
            int nthreads)

#ifdef FASTRLHF_ISA
#include "pool.h"
#include "vec.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_ELEMENTS = 32768;  // worth waking a thread for; about 10 us

template <class T>
void copy_row(const T* x, T* y, int64_t n) {
  __builtin_memcpy(y, x, static_cast<uint64_t>(n) * sizeof(T));
}

template <class From, class To>
void copy_row(const From* x, To* y, int64_t n) {
  int64_t i = 0;
  if constexpr (sizeof(acc_t<From>) == 4 && sizeof(acc_t<To>) == 4) {
    for (; i + lanes<vf> <= n; i += lanes<vf>) store(y + i, load(x + i));
  }
  for (; i < n; ++i) put(y + i, static_cast<acc_t<To>>(to_acc(x[i])));
}

// The heads of one token; in one piece where they lie so on both sides.
template <class From, class To>
void copy_token(const From* x, int64_t x_head_stride, To* y, int64_t y_head_stride, int64_t HKV,
                int64_t D) {
  if (HKV == 1 || (x_head_stride == D && y_head_stride == D)) {
    copy_row(x, y, HKV * D);
    return;
  }
  for (int64_t h = 0; h < HKV; ++h) copy_row(x + h * x_head_stride, y + h * y_head_stride, D);
}

}  // namespace

FASTRLHF_KERNEL(append_kv)(const void* k, const void* v, void* k_cache, void* v_cache,
                           const int64_t* slots, int64_t N, int64_t HKV, int64_t D, int64_t pages,
                           int64_t page_size, int64_t k_stride, int64_t k_head_stride,
                           int64_t v_stride, int64_t v_head_stride, int64_t k_page_stride,
                           int64_t k_slot_stride, int64_t k_cache_head_stride,
                           int64_t v_page_stride, int64_t v_slot_stride,
                           int64_t v_cache_head_stride, int dtype, int cache_dtype, int nthreads) {
  for (int64_t n = 0; n < N; ++n) {
    if (slots[n] >= pages * page_size) return "slots must be below pages * page_size";
  }
  if (HKV * D == 0) return nullptr;
  return with_dtype(dtype, [&](auto from) -> const char* {
    return with_dtype(cache_dtype, [&](auto to) -> const char* {
      using From = decltype(from);
      using To = decltype(to);
      const int64_t grain = GRAIN_ELEMENTS / max_of<int64_t>(HKV * D, 1) + 1;
      parallel_for(N, grain, nthreads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          if (slots[n] < 0) continue;
          const int64_t page = slots[n] / page_size, offset = slots[n] % page_size;
          copy_token(static_cast<const From*>(k) + n * k_stride, k_head_stride,
                     static_cast<To*>(k_cache) + page * k_page_stride + offset * k_slot_stride,
                     k_cache_head_stride, HKV, D);
          copy_token(static_cast<const From*>(v) + n * v_stride, v_head_stride,
                     static_cast<To*>(v_cache) + page * v_page_stride + offset * v_slot_stride,
                     v_cache_head_stride, HKV, D);
        }
      });
      return nullptr;
    });
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
