// Threads for all CPU ops: torch's, or else one pool.
//
// parallel_for(n, grain, nthreads, f) calls f(begin, end) over a partition of [0, n) that depends
// on n, grain and nthreads alone, never on timing. Items must be independent: an op whose result
// must not depend on the number of threads writes each item's result apart and reduces in order.
//
// * The caller works too. With one thread, or n <= grain, it works alone and wakes nobody.
// * Where the process has an OpenMP runtime, as torch brings one, its threads do the work: those of
//   a product before spin for milliseconds, and would keep others from the processors.
// * Elsewhere, and in a child of fork, where that runtime has no threads left, a pool's. They sleep
//   on a condition variable when there is no work; one that wakes late finds its share taken.
// * Calls may nest, and may come from several Python threads at once.
// * `f` must not throw; the op files are written without exceptions.
#pragma once

#include <cstdint>

namespace fastrlhf {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

void parallel_for_erased(int64_t n, int64_t grain, int nthreads, RangeFn fn, void* context);

void borrow_threads(bool wanted);  // whether OpenMP's threads are used where there are any
bool borrows_threads();            // whether they are

int pool_threads();  // threads that the pool has started in this process

}  // namespace fastrlhf

#ifdef FASTRLHF_ISA
namespace fastrlhf::FASTRLHF_ISA {
namespace {

// `grain`: the least number of items worth a thread's wake-up (some 10 us: about 100 kB of reads).
template <class F>
inline void parallel_for(int64_t n, int64_t grain, int nthreads, const F& f) {
  parallel_for_erased(
      n, grain, nthreads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
