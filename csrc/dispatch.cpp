#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "op.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrlhf {
namespace {

constexpr const char* NAMES[] = {"baseline", "avx2", "avx512"};

// The sets that setup.py compiles with, flag for flag. __builtin_cpu_supports also asks whether the
// system saves the wide registers; it does not know f16c in every compiler, so cpuid answers that.
bool detect(int isa) {
  if (isa == 0) return true;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  __builtin_cpu_init();
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == 1) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

int widest() {
  int isa = N_ISA - 1;
  while (!detect(isa)) --isa;
  return isa;
}

std::atomic<int>& active() {
  static std::atomic<int> isa{widest()};
  return isa;
}

}  // namespace

int active_isa() { return active().load(std::memory_order_relaxed); }

const char* isa_name(int isa) { return NAMES[isa]; }

bool isa_available(int isa) { return isa >= 0 && isa < N_ISA && detect(isa); }

bool set_isa(const char* name) {
  for (int isa = 0; isa < N_ISA; ++isa) {
    if (std::strcmp(name, NAMES[isa]) == 0 && detect(isa)) {
      active().store(isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fastrlhf
