// Huge pages for large results.
//
// Fresh memory comes from the kernel page by page, at the first write to each: for a large result of
// 4 KiB pages that takes longer than to compute it.
#pragma once

#ifdef FASTRLHF_ISA

#include <sys/mman.h>

#include "common.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

// More than glibc ever hands out from its heap: so large a tensor has a mapping of its own, and what
// is asked for it ends with it. Nor does it fit into most caches.
constexpr int64_t LARGE_BYTES = int64_t{32} << 20;

// Asks for huge pages where [p, p + bytes) has whole ones. A wish: nothing depends on the answer.
[[maybe_unused]] inline void prefer_huge_pages(void* p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uint64_t PAGE = uint64_t{2} << 20;
  const uint64_t begin = (reinterpret_cast<uint64_t>(p) + PAGE - 1) / PAGE * PAGE;
  const uint64_t end = (reinterpret_cast<uint64_t>(p) + static_cast<uint64_t>(bytes)) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
