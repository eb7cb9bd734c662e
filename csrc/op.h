// What an op is: a C function per instruction set, found by name from Python.
//
//   FASTRLHF_OP(name, "doc", const void* x, int64_t n, int dtype, int nthreads)
//   #ifdef FASTRLHF_ISA
//   namespace fastrlhf::FASTRLHF_ISA {
//   FASTRLHF_KERNEL(name)(const void* x, int64_t n, int dtype, int nthreads) { ... }
//   }
//   #endif
//
// An op file is compiled once per instruction set, with FASTRLHF_ISA naming it, and once without,
// which makes the table that dispatch reads. Pointers, integers and floating-point numbers are the
// only parameters. The function returns nullptr, or a message that Python raises as a ValueError
// (a RuntimeError in the CUDA extension). The linkage is C, so a definition whose parameters differ
// from the declaration does not compile.
#pragma once

#include <cstdint>

#include "common.h"

#define FASTRLHF_CAT2(a, b) a##b
#define FASTRLHF_CAT(a, b) FASTRLHF_CAT2(a, b)
#define FASTRLHF_SYMBOL(name, isa) FASTRLHF_CAT(FASTRLHF_CAT(fastrlhf_, name), FASTRLHF_CAT(_, isa))

// The head of an op's definition, inside `#ifdef FASTRLHF_ISA`.
#define FASTRLHF_KERNEL(name) extern "C" const char* FASTRLHF_SYMBOL(name, FASTRLHF_ISA)

#if defined(FASTRLHF_ISA) && !defined(__CUDACC__)

#define FASTRLHF_OP(name, doc, ...) \
  extern "C" const char* FASTRLHF_SYMBOL(name, FASTRLHF_ISA)(__VA_ARGS__);

#else  // the table; nothing here is compiled for more than the baseline

#include <type_traits>
#include <utility>

namespace fastrlhf {

#if defined(__CUDACC__) || defined(FASTRLHF_CUDA)
constexpr int N_ISA = 1;
#elif defined(__x86_64__)
constexpr int N_ISA = 3;  // baseline, avx2, avx512: the order of dispatch.cpp
#else
constexpr int N_ISA = 1;
#endif

union Slot {  // one argument on its way from Python
  const void* p;
  int64_t i;
  double f;
};

using Entry = void (*)();  // an op's function, its type erased

struct Op {
  const char* name;
  const char* doc;
  const char* params;  // the parameter list as written; Python's keyword names are read from it
  const char* kinds;   // one letter a parameter: p(ointer), i(nteger), f(loating point)
  const char* (*call)(Entry, const Slot*);
  Entry entry[N_ISA];
  Op* next;
};

bool register_op(Op* op);  // bindings.cpp keeps the list

template <class T>
inline T from_slot(const Slot& s) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(const_cast<void*>(s.p));
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(s.f);
  } else {
    return static_cast<T>(s.i);
  }
}

template <class F>
struct Signature;

template <class... P>
struct Signature<const char*(P...)> {
  static constexpr char kinds[] = {
      (std::is_pointer_v<P> ? 'p' : std::is_floating_point_v<P> ? 'f' : 'i')..., '\0'};

  template <std::size_t... I>
  static const char* spread(Entry e, const Slot* s, std::index_sequence<I...>) {
    return reinterpret_cast<const char* (*)(P...)>(e)(from_slot<P>(s[I])...);
  }
  static const char* call(Entry e, const Slot* s) {
    return spread(e, s, std::index_sequence_for<P...>{});
  }
};

}  // namespace fastrlhf

#define FASTRLHF_ENTRY(name, isa) reinterpret_cast<fastrlhf::Entry>(&FASTRLHF_SYMBOL(name, isa))
#if defined(__CUDACC__)
#define FASTRLHF_DECLARE(name, ...) \
  extern "C" const char* FASTRLHF_SYMBOL(name, cuda)(__VA_ARGS__);
#define FASTRLHF_ENTRIES(name) FASTRLHF_ENTRY(name, cuda)
#elif defined(__x86_64__)
#define FASTRLHF_DECLARE(name, ...)                                    \
  extern "C" const char* FASTRLHF_SYMBOL(name, baseline)(__VA_ARGS__); \
  extern "C" const char* FASTRLHF_SYMBOL(name, avx2)(__VA_ARGS__);     \
  extern "C" const char* FASTRLHF_SYMBOL(name, avx512)(__VA_ARGS__);
#define FASTRLHF_ENTRIES(name) \
  FASTRLHF_ENTRY(name, baseline), FASTRLHF_ENTRY(name, avx2), FASTRLHF_ENTRY(name, avx512)
#else
#define FASTRLHF_DECLARE(name, ...) \
  extern "C" const char* FASTRLHF_SYMBOL(name, baseline)(__VA_ARGS__);
#define FASTRLHF_ENTRIES(name) FASTRLHF_ENTRY(name, baseline)
#endif

#define FASTRLHF_OP(name, doc, ...)                                                       \
  FASTRLHF_DECLARE(name, __VA_ARGS__)                                                     \
  static fastrlhf::Op fastrlhf_op_##name = {                                              \
      #name, doc, #__VA_ARGS__, fastrlhf::Signature<const char*(__VA_ARGS__)>::kinds,     \
      &fastrlhf::Signature<const char*(__VA_ARGS__)>::call, {FASTRLHF_ENTRIES(name)}, nullptr}; \
  [[maybe_unused]] static const bool fastrlhf_has_##name =                                \
      fastrlhf::register_op(&fastrlhf_op_##name);

#endif
