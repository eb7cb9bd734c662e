// The 32 lanes of a warp as values, so that one body runs on a GPU and, for tests, on a CPU.
//
// A body is a template over a policy W. What differs between lanes is a lane_t<W, T>: the thread's
// own T with CudaWarp, 32 of them with ArrayWarp, which csrc/selftest.cpp runs. What is the same in
// all lanes is a plain number, and that alone may steer a branch or a loop. lane_t has +, -, *, /,
// comparisons, &&, ||, & and, from here, select, vexp, widen, lowest_bit; and W has
//
// lane(), steps(first)        0 to 31; first, first + 1 ...
// ballot(m)                   the lanes where m is set, as bits
// lanes_after()               the bits of the lanes above each lane
// shuffle(x, from)            x of lane `from`
// shuffle_down(x, by)         x of the lane `by` above; past the end a lane's own
// broadcast(x, from)          x of one lane, as a plain number
// load(p, at, where, other)   p[at], or `other` in lanes where `where` is not set
// store(p, at, where, x)
#pragma once

#include "common.h"

#ifdef FASTRLHF_ISA
#if !defined(__CUDACC__)
#include "vec.h"
#endif

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int WARP = 32;
constexpr unsigned ALL_OF_WARP = 0xffffffffu;

template <class W, class T>
using lane_t = typename W::template Lanes<T>;

#if defined(__CUDACC__)

FASTRLHF_WARP float vexp(float x) { return expf(x); }
FASTRLHF_WARP double vexp(double x) { return exp(x); }
FASTRLHF_WARP double widen(float x) { return x; }
FASTRLHF_WARP double widen(double x) { return x; }
FASTRLHF_WARP int lowest_bit(unsigned x) { return __ffs(static_cast<int>(x)) - 1; }  // -1: none
FASTRLHF_WARP int highest_bit(unsigned x) { return WARP - 1 - __clz(static_cast<int>(x)); }
FASTRLHF_WARP int count_bits(unsigned x) { return __popc(x); }

struct CudaWarp {
  template <class T>
  using Lanes = T;

  static FASTRLHF_WARP int lane() { return static_cast<int>(threadIdx.x) % WARP; }
  static FASTRLHF_WARP int64_t steps(int64_t first) { return first + lane(); }
  static FASTRLHF_WARP unsigned ballot(bool m) { return __ballot_sync(ALL_OF_WARP, m); }
  static FASTRLHF_WARP unsigned lanes_after() {
    return lane() == WARP - 1 ? 0u : ALL_OF_WARP << (lane() + 1);
  }
  template <class T>
  static FASTRLHF_WARP T shuffle(T x, int from) {
    return __shfl_sync(ALL_OF_WARP, x, from);
  }
  template <class T>
  static FASTRLHF_WARP T shuffle_down(T x, int by) {
    return __shfl_down_sync(ALL_OF_WARP, x, by);
  }
  template <class T>
  static FASTRLHF_WARP T broadcast(T x, int from) {
    return __shfl_sync(ALL_OF_WARP, x, from);
  }
  template <class T>
  static FASTRLHF_WARP T load(const T* p, int64_t at, bool where, T other) {
    return where ? p[at] : other;
  }
  template <class T>
  static FASTRLHF_WARP void store(T* p, int64_t at, bool where, T x) {
    if (where) p[at] = x;
  }
};

#else  // the same on a CPU

FASTRLHF_WARP int lowest_bit(unsigned x) { return __builtin_ffs(static_cast<int>(x)) - 1; }
FASTRLHF_WARP int highest_bit(unsigned x) { return x == 0 ? -1 : WARP - 1 - __builtin_clz(x); }
FASTRLHF_WARP int count_bits(unsigned x) { return __builtin_popcount(x); }

template <class T>
struct Lanes32 {
  T v[WARP];
};

template <class F>
FASTRLHF_WARP auto each_lane(const F& f) {
  Lanes32<decltype(f(0))> y;
  for (int i = 0; i < WARP; ++i) y.v[i] = f(i);
  return y;
}

#define FASTRLHF_LANEWISE(op)                                                  \
  template <class T>                                                           \
  FASTRLHF_WARP auto operator op(const Lanes32<T>& a, const Lanes32<T>& b) {   \
    return each_lane([&](int i) { return a.v[i] op b.v[i]; });                 \
  }                                                                            \
  template <class T>                                                           \
  FASTRLHF_WARP auto operator op(const Lanes32<T>& a, T b) {                   \
    return each_lane([&](int i) { return a.v[i] op b; });                      \
  }                                                                            \
  template <class T>                                                           \
  FASTRLHF_WARP auto operator op(T a, const Lanes32<T>& b) {                   \
    return each_lane([&](int i) { return a op b.v[i]; });                      \
  }
FASTRLHF_LANEWISE(+)
FASTRLHF_LANEWISE(-)
FASTRLHF_LANEWISE(*)
FASTRLHF_LANEWISE(/)
FASTRLHF_LANEWISE(<)
FASTRLHF_LANEWISE(>)
FASTRLHF_LANEWISE(>=)
FASTRLHF_LANEWISE(==)
FASTRLHF_LANEWISE(!=)
FASTRLHF_LANEWISE(&&)
FASTRLHF_LANEWISE(||)
#undef FASTRLHF_LANEWISE

FASTRLHF_WARP Lanes32<bool> operator&(const Lanes32<bool>& a, const Lanes32<bool>& b) {
  return a && b;
}
FASTRLHF_WARP Lanes32<unsigned> operator&(unsigned a, const Lanes32<unsigned>& b) {
  return each_lane([&](int i) { return a & b.v[i]; });
}
template <class T>
FASTRLHF_WARP Lanes32<T> operator-(const Lanes32<T>& a) {
  return each_lane([&](int i) { return -a.v[i]; });
}
template <class T>
FASTRLHF_WARP Lanes32<T> select(const Lanes32<bool>& m, const Lanes32<T>& a, const Lanes32<T>& b) {
  return each_lane([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
template <class T>
FASTRLHF_WARP Lanes32<T> vexp(const Lanes32<T>& x) {
  return each_lane([&](int i) { return s_exp(x.v[i]); });
}
template <class T>
FASTRLHF_WARP Lanes32<double> widen(const Lanes32<T>& x) {
  return each_lane([&](int i) { return static_cast<double>(x.v[i]); });
}
FASTRLHF_WARP Lanes32<int> lowest_bit(const Lanes32<unsigned>& x) {
  return each_lane([&](int i) { return lowest_bit(x.v[i]); });
}

struct ArrayWarp {
  template <class T>
  using Lanes = Lanes32<T>;

  static FASTRLHF_WARP Lanes32<int> lane() {
    return each_lane([](int i) { return i; });
  }
  static FASTRLHF_WARP Lanes32<int64_t> steps(int64_t first) {
    return each_lane([&](int i) { return first + i; });
  }
  static FASTRLHF_WARP unsigned ballot(const Lanes32<bool>& m) {
    unsigned bits = 0;
    for (int i = 0; i < WARP; ++i) bits |= m.v[i] ? 1u << i : 0u;
    return bits;
  }
  static FASTRLHF_WARP Lanes32<unsigned> lanes_after() {
    return each_lane([](int i) { return i == WARP - 1 ? 0u : ALL_OF_WARP << (i + 1); });
  }
  template <class T>
  static FASTRLHF_WARP Lanes32<T> shuffle(const Lanes32<T>& x, const Lanes32<int>& from) {
    return each_lane([&](int i) { return x.v[from.v[i] % WARP]; });
  }
  template <class T>
  static FASTRLHF_WARP Lanes32<T> shuffle_down(const Lanes32<T>& x, int by) {
    return each_lane([&](int i) { return x.v[i + by < WARP ? i + by : i]; });
  }
  template <class T>
  static FASTRLHF_WARP T broadcast(const Lanes32<T>& x, int from) {
    return x.v[from];
  }
  template <class T>
  static FASTRLHF_WARP Lanes32<T> load(const T* p, const Lanes32<int64_t>& at,
                                       const Lanes32<bool>& where, T other) {
    return each_lane([&](int i) { return where.v[i] ? p[at.v[i]] : other; });
  }
  template <class T>
  static FASTRLHF_WARP void store(T* p, const Lanes32<int64_t>& at, const Lanes32<bool>& where,
                                  const Lanes32<T>& x) {
    for (int i = 0; i < WARP; ++i) {
      if (where.v[i]) p[at.v[i]] = x.v[i];
    }
  }
};

#endif

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
