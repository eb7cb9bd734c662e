// Element types, their tags, and the conversions between them and the type of arithmetic.
//
// A tensor crosses the border as (pointer, strides in elements, sizes, tag). Arithmetic is in float
// for f32, bf16 and f16 tensors and in double for f64: `acc_t<T>`.
//
// Outside `namespace fastrlhf::FASTRLHF_ISA` this header holds only types and constants. Every
// function stands in an anonymous namespace inside it, so that the linker can never keep one
// instruction set's copy for another's use: op files are compiled once per set, into one library.
#pragma once

#include <cstdint>

// Before a function that a CPU and a GPU both run; and before one that a whole warp runs.
#if defined(__CUDACC__)
#define FASTRLHF_HD __host__ __device__ __forceinline__
#define FASTRLHF_WARP __device__ __forceinline__
#else
#define FASTRLHF_HD inline __attribute__((always_inline))
#define FASTRLHF_WARP inline __attribute__((always_inline))
#endif

namespace fastrlhf {

enum Dtype : int { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr const char* BAD_DTYPE = "unsupported dtype tag";

}  // namespace fastrlhf

#ifdef FASTRLHF_ISA
namespace fastrlhf::FASTRLHF_ISA {
namespace {

template <class T>
struct acc_of {
  using type = float;
};
template <>
struct acc_of<double> {
  using type = double;
};
template <class T>
using acc_t = typename acc_of<T>::type;

// Calls f(T{}), T the element type that `dtype` names: with_dtype(dtype, [&](auto zero) {...}),
// where `using T = decltype(zero);`. Returns f's error, or BAD_DTYPE.
template <class F>
inline const char* with_dtype(int dtype, const F& f) {
  switch (dtype) {
    case F32: return f(float{});
    case F64: return f(double{});
    case BF16: return f(bf16{});
    case F16: return f(f16{});
    default: return BAD_DTYPE;
  }
}

// The same for ops that take f32 and f64 alone.
template <class F>
inline const char* with_float_dtype(int dtype, const F& f) {
  switch (dtype) {
    case F32: return f(float{});
    case F64: return f(double{});
    default: return BAD_DTYPE;
  }
}

template <class T>
FASTRLHF_HD T select(bool m, T a, T b) {  // vec.h and warp.h have it for many numbers at once
  return m ? a : b;
}

template <class T>
inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
