// SIMD vectors of the width of the instruction set being compiled, over GCC and Clang's vector
// extensions: `vf` (4, 8 or 16 floats) and `vd` (half as many doubles), with +, -, *, / and
// comparisons from the compiler. `vec_t<A>` is the vector of the accumulation type A, lanes<V> its
// number of elements. A routine written over `vec_t<acc_t<T>>` serves every element type.
//
// load(p), load_n(p, n, fill)      from float, double, bf16, f16, unaligned; lanes >= n get fill
// store(p, v), store_n(p, v, n)    to the same; bf16 and f16 round to nearest even, NaN stays NaN
// load_pair(p, a, b), store_pair<STREAM>(p, a, b)   two vectors' worth, bf16 in another order
// splat<V>(x), select(m, a, b), vfma(a, b, c) = a * b + c (fused where the processor can)
// vmax(a, b), vmin(a, b)           b where either is NaN: vmax(x, m) never lets a NaN x into m
// vmax_nan(a, b)                   NaN where either is NaN
// hsum, hmax                       over the lanes, halving: a fixed tree for a given width
// vexp2, vexp, vlog                below; vd calls libm lane by lane (fp64 is for gradcheck)
// to_acc(x), put(p, x)             one element read, one element stored
// s_exp2, s_exp, s_log, s_expm1, s_log1p, s_tanh, s_sqrt, s_abs   libm's, for one scalar a row
//
// Largest errors of vf, in units in the last place of the result, held by tests/test_build.py:
//   vexp2 1.1, vexp 1.1 (denormal results included), vlog 1.0. A vector with a denormal result
//   is about ten times slower, the processor's own cost; results that underflow to 0 are not.
// vexp2(-inf) = vexp(-inf) = 0, of +inf is +inf, overflow +inf, underflow 0; vlog(0) = -inf,
// vlog(x < 0) = NaN; NaN gives NaN everywhere.
#pragma once

#ifdef FASTRLHF_ISA

#include <cstdint>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrlhf::FASTRLHF_ISA {
namespace {

#if defined(__AVX512F__)
#define FASTRLHF_VEC_BYTES 64
#elif defined(__AVX2__)
#define FASTRLHF_VEC_BYTES 32
#else
#define FASTRLHF_VEC_BYTES 16
#endif
#define FASTRLHF_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

constexpr int VEC_BYTES = FASTRLHF_VEC_BYTES;

typedef float vf __attribute__((vector_size(FASTRLHF_VEC_BYTES)));
typedef double vd __attribute__((vector_size(FASTRLHF_VEC_BYTES)));
typedef int32_t vi __attribute__((vector_size(FASTRLHF_VEC_BYTES)));    // masks of vf, and its bits
typedef uint32_t vu __attribute__((vector_size(FASTRLHF_VEC_BYTES)));
typedef int64_t vl __attribute__((vector_size(FASTRLHF_VEC_BYTES)));    // masks of vd
typedef uint16_t vh __attribute__((vector_size(FASTRLHF_VEC_BYTES / 2)));  // as many as vf

template <class A>
struct vec_of;
template <>
struct vec_of<float> {
  using type = vf;
};
template <>
struct vec_of<double> {
  using type = vd;
};
template <class A>
using vec_t = typename vec_of<A>::type;

template <class V>
struct elem_of {
  using type = float;
};
template <>
struct elem_of<vd> {
  using type = double;
};
template <class V>
using elem_t = typename elem_of<V>::type;

template <class V>
constexpr int lanes = VEC_BYTES / static_cast<int>(sizeof(elem_t<V>));

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;
template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

template <class To, class From>
FASTRLHF_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <class V>
FASTRLHF_INLINE V splat(elem_t<V> x) {
  // V{} + x is an addition and a way between registers; the intrinsics read a number in memory.
#if defined(__AVX512F__)
  if constexpr (is_float<elem_t<V>>) return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  if constexpr (is_float<elem_t<V>>) return _mm256_set1_ps(x);
#endif
  return V{} + x;
}

FASTRLHF_INLINE vf select(vi m, vf a, vf b) { return m ? a : b; }
FASTRLHF_INLINE vd select(vl m, vd a, vd b) { return m ? a : b; }
FASTRLHF_INLINE vi select(vi m, vi a, vi b) { return m ? a : b; }

template <class V>
FASTRLHF_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTRLHF_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__)
// The maskz forms: GCC 12 warns that the plain ones read an uninitialised register. Same code.
constexpr __mmask16 ALL_LANES = 0xffff;
constexpr __mmask8 ALL_DOUBLES = 0xff;

FASTRLHF_INLINE vf vmax(vf a, vf b) { return _mm512_maskz_max_ps(ALL_LANES, a, b); }
FASTRLHF_INLINE vf vmin(vf a, vf b) { return _mm512_maskz_min_ps(ALL_LANES, a, b); }
#elif defined(__AVX2__)
FASTRLHF_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
FASTRLHF_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
#elif defined(__x86_64__)
FASTRLHF_INLINE vf vmax(vf a, vf b) { return _mm_max_ps(a, b); }
FASTRLHF_INLINE vf vmin(vf a, vf b) { return _mm_min_ps(a, b); }
#endif
template <class V>
FASTRLHF_INLINE V vmax_nan(V a, V b) {
  return a != a ? a : (a > b ? a : b);
}
template <class V>
FASTRLHF_INLINE V vfma(V a, V b, V c) {  // -ffp-contract=fast fuses it
  return a * b + c;
}

// ---- conversions of one element, and of a vector's worth

// Lanes made wider. Of __builtin_convertvector GCC 12 makes loads of single bytes here (fifty
// instructions for a mask), and for floats a way through memory: so intrinsics where there are some.
typedef float vhalf __attribute__((vector_size(FASTRLHF_VEC_BYTES / 2)));  // half a vf
typedef uint8_t vbf __attribute__((vector_size(FASTRLHF_VEC_BYTES / 4)));  // a byte a lane of vf
typedef uint8_t vbd __attribute__((vector_size(FASTRLHF_VEC_BYTES / 8)));  // a byte a lane of vd

#if defined(__AVX512F__)
FASTRLHF_INLINE vu widen(vh h) {
  return bits_as<vu>(_mm512_maskz_cvtepu16_epi32(ALL_LANES, bits_as<__m256i>(h)));
}
FASTRLHF_INLINE vi widen(vbf b) {
  return bits_as<vi>(_mm512_maskz_cvtepu8_epi32(ALL_LANES, bits_as<__m128i>(b)));
}
FASTRLHF_INLINE vl widen(vbd b) {
  const __m128i bytes = _mm_cvtsi64_si128(bits_as<int64_t>(b));
  return bits_as<vl>(_mm512_maskz_cvtepu8_epi64(ALL_DOUBLES, bytes));
}
FASTRLHF_INLINE void widen(vf x, vd& low, vd& high) {
  low = _mm512_maskz_cvtps_pd(ALL_DOUBLES, _mm512_maskz_extractf32x8_ps(ALL_DOUBLES, x, 0));
  high = _mm512_maskz_cvtps_pd(ALL_DOUBLES, _mm512_maskz_extractf32x8_ps(ALL_DOUBLES, x, 1));
}
#elif defined(__AVX2__)
FASTRLHF_INLINE vu widen(vh h) { return bits_as<vu>(_mm256_cvtepu16_epi32(bits_as<__m128i>(h))); }
FASTRLHF_INLINE vi widen(vbf b) {
  return bits_as<vi>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(b))));
}
FASTRLHF_INLINE vl widen(vbd b) {
  return bits_as<vl>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bits_as<int32_t>(b))));
}
FASTRLHF_INLINE void widen(vf x, vd& low, vd& high) {
  low = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 0));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
}
#else
FASTRLHF_INLINE vu widen(vh h) { return __builtin_convertvector(h, vu); }
FASTRLHF_INLINE vi widen(vbf b) { return __builtin_convertvector(b, vi); }
FASTRLHF_INLINE vl widen(vbd b) { return __builtin_convertvector(b, vl); }
FASTRLHF_INLINE void widen(vf x, vd& low, vd& high) {
  vhalf half[2];
  __builtin_memcpy(half, &x, sizeof(x));
  low = __builtin_convertvector(half[0], vd);
  high = __builtin_convertvector(half[1], vd);
}
#endif

FASTRLHF_INLINE vf widen_bf16(vh h) { return bits_as<vf>(widen(h) << 16); }

FASTRLHF_INLINE vu round_to_bf16(vf x) {  // the result is the upper half of each lane
  const vu u = bits_as<vu>(x);
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return x != x ? u | 0x400000u : rounded;
}

FASTRLHF_INLINE vh narrow_bf16(vf x) { return __builtin_convertvector(round_to_bf16(x) >> 16, vh); }

#if defined(__AVX512F__)
FASTRLHF_INLINE vf widen_f16(vh h) { return _mm512_maskz_cvtph_ps(ALL_LANES, bits_as<__m256i>(h)); }
FASTRLHF_INLINE vh narrow_f16(vf x) {
  return bits_as<vh>(
      _mm512_maskz_cvtps_ph(ALL_LANES, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FASTRLHF_INLINE vf widen_f16(vh h) { return _mm256_cvtph_ps(bits_as<__m128i>(h)); }
FASTRLHF_INLINE vh narrow_f16(vf x) {
  return bits_as<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
FASTRLHF_INLINE vf widen_f16(vh h) {
  const vu u = widen(h);
  const vu magnitude = u & 0x7fffu;
  // The half's exponent and mantissa, read as a float's, are 2^112 too small, denormals included.
  const vf finite = bits_as<vf>(magnitude << 13) * 0x1p112f;
  const vu special = (magnitude << 13) | 0x7f800000u;
  const vu value = magnitude >= 0x7c00u ? special : bits_as<vu>(finite);
  return bits_as<vf>(value | ((u & 0x8000u) << 16));
}
FASTRLHF_INLINE vh narrow_f16(vf x) {
  const vu u = bits_as<vu>(x);
  const vu magnitude = u & 0x7fffffffu;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the result counts in 2^-24: adding 0.5, whose last place that is, rounds to it.
  const vu denormal = bits_as<vu>(bits_as<vf>(magnitude) + 0.5f) - 0x3f000000u;
  const vu small = magnitude < (113u << 23) ? denormal : normal;
  const vu over = magnitude > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  const vu value = magnitude >= 0x47800000u ? over : small;
  return __builtin_convertvector(value | ((u >> 16) & 0x8000u), vh);
}
#endif

FASTRLHF_INLINE float to_acc(float x) { return x; }
FASTRLHF_INLINE double to_acc(double x) { return x; }
FASTRLHF_INLINE float to_acc(bf16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
FASTRLHF_INLINE float to_acc(f16 x) { return widen_f16(vh{x.bits})[0]; }

FASTRLHF_INLINE void put(float* p, float x) { *p = x; }
FASTRLHF_INLINE void put(double* p, double x) { *p = x; }
FASTRLHF_INLINE void put(bf16* p, float x) { p->bits = narrow_bf16(vf{} + x)[0]; }
FASTRLHF_INLINE void put(f16* p, float x) { p->bits = narrow_f16(vf{} + x)[0]; }

// ---- loads and stores

template <class T>
FASTRLHF_INLINE vec_t<acc_t<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    vh h;
    __builtin_memcpy(&h, p, sizeof(h));
    if constexpr (is_bf16<T>) {
      return widen_bf16(h);
    } else {
      return widen_f16(h);
    }
  } else {
    vec_t<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class T>
FASTRLHF_INLINE void store(T* p, vec_t<acc_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    vh h;
    if constexpr (is_bf16<T>) {
      h = narrow_bf16(v);
    } else {
      h = narrow_f16(v);
    }
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
}

// Two vectors at once, 2 lanes<V> elements. Of bf16 `a` is the elements of even index and `b` those
// of odd index: a shift and a mask, where widening each half takes two more steps. Of the other
// types `a` comes before `b`. Sums and element-wise work need no other order.
template <class T>
FASTRLHF_INLINE void load_pair(const T* p, vec_t<acc_t<T>>& a, vec_t<acc_t<T>>& b) {
  if constexpr (is_bf16<T>) {
    vu words;
    __builtin_memcpy(&words, p, sizeof(words));
    a = bits_as<vf>(words << 16);
    b = bits_as<vf>(words & 0xffff0000u);
  } else {
    a = load(p);
    b = load(p + lanes<vec_t<acc_t<T>>>);
  }
}

// Past the caches, where what is written will not be read soon; p is aligned to VEC_BYTES.
FASTRLHF_INLINE void store_past_caches(void* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), v);
#elif defined(__x86_64__)
  _mm_stream_ps(static_cast<float*>(p), v);
#else
  __builtin_memcpy(p, &v, sizeof(v));
#endif
}

// Makes what was stored past the caches visible to other threads, before later stores.
FASTRLHF_INLINE void fence_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The reverse of load_pair. STREAM stores past the caches, f16 excepted.
template <bool STREAM, class T>
FASTRLHF_INLINE void store_pair(T* p, vec_t<acc_t<T>> a, vec_t<acc_t<T>> b) {
  constexpr int W = lanes<vec_t<acc_t<T>>>;
  if constexpr (is_bf16<T>) {
    const vu words = round_to_bf16(a) >> 16 | (round_to_bf16(b) & 0xffff0000u);
    if constexpr (STREAM) {
      store_past_caches(p, bits_as<vf>(words));
    } else {
      __builtin_memcpy(p, &words, sizeof(words));
    }
  } else if constexpr (STREAM && sizeof(T) != 2) {
    store_past_caches(p, bits_as<vf>(a));
    store_past_caches(p + W, bits_as<vf>(b));
  } else {
    store(p, a);
    store(p + W, b);
  }
}

#if defined(__AVX512F__)
#if !defined(__SANITIZE_ADDRESS__)  // which does not look into masked intrinsics: loops instead
#define FASTRLHF_MASKED_LANES
#endif
FASTRLHF_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? ALL_LANES : static_cast<__mmask16>((1 << n) - 1);
}
#endif

// Lanes 0 to n - 1 are memory, the others `fill`; nothing past p[n - 1] is read.
template <class T>
FASTRLHF_INLINE vec_t<acc_t<T>> load_n(const T* p, int64_t n, acc_t<T> fill) {
  using V = vec_t<acc_t<T>>;
#if defined(FASTRLHF_MASKED_LANES)
  if constexpr (is_float<T>) return _mm512_mask_loadu_ps(splat<V>(fill), first_lanes(n), p);
#endif
  V v = splat<V>(fill);
  for (int i = 0; i < lanes<V>; ++i) {
    if (i < n) v[i] = to_acc(p[i]);
  }
  return v;
}

template <class T>
FASTRLHF_INLINE void store_n(T* p, vec_t<acc_t<T>> v, int64_t n) {
#if defined(FASTRLHF_MASKED_LANES)
  if constexpr (is_float<T>) {
    _mm512_mask_storeu_ps(p, first_lanes(n), v);
    return;
  }
#endif
  T buffer[lanes<vec_t<acc_t<T>>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// ---- over the lanes: the upper half onto the lower, until one is left

template <class E, int BYTES>
struct piece_of {
  typedef E type __attribute__((vector_size(BYTES)));
};

template <class E, int BYTES, class P, class F>
FASTRLHF_INLINE E fold(P v, const F& f) {
  if constexpr (BYTES > 16) {  // halves in registers: through memory each step would stall
    typename piece_of<E, BYTES / 2>::type low, high;
    __builtin_memcpy(&low, &v, BYTES / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + BYTES / 2, BYTES / 2);
    return fold<E, BYTES / 2>(f(low, high), f);
  } else if constexpr (sizeof(E) == 4) {
    const E a = f(v[0], v[2]), b = f(v[1], v[3]);
    return f(a, b);
  } else {
    return f(E(v[0]), E(v[1]));
  }
}

template <class V>
FASTRLHF_INLINE elem_t<V> hsum(V v) {
  return fold<elem_t<V>, VEC_BYTES>(v, [](auto a, auto b) { return a + b; });
}

template <class V>
FASTRLHF_INLINE elem_t<V> hmax(V v) {  // no NaN among the lanes
  return fold<elem_t<V>, VEC_BYTES>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- functions of one scalar: libm's own symbols, so that no inline wrapper is emitted

FASTRLHF_INLINE float s_exp2(float x) { return __builtin_exp2f(x); }
FASTRLHF_INLINE double s_exp2(double x) { return __builtin_exp2(x); }
FASTRLHF_INLINE float s_exp(float x) { return __builtin_expf(x); }
FASTRLHF_INLINE double s_exp(double x) { return __builtin_exp(x); }
FASTRLHF_INLINE float s_log(float x) { return __builtin_logf(x); }
FASTRLHF_INLINE double s_log(double x) { return __builtin_log(x); }
FASTRLHF_INLINE float s_expm1(float x) { return __builtin_expm1f(x); }
FASTRLHF_INLINE double s_expm1(double x) { return __builtin_expm1(x); }
FASTRLHF_INLINE float s_log1p(float x) { return __builtin_log1pf(x); }
FASTRLHF_INLINE double s_log1p(double x) { return __builtin_log1p(x); }
FASTRLHF_INLINE float s_tanh(float x) { return __builtin_tanhf(x); }
FASTRLHF_INLINE double s_tanh(double x) { return __builtin_tanh(x); }
FASTRLHF_INLINE float s_sqrt(float x) { return __builtin_sqrtf(x); }
FASTRLHF_INLINE double s_sqrt(double x) { return __builtin_sqrt(x); }
FASTRLHF_INLINE float s_abs(float x) { return __builtin_fabsf(x); }
FASTRLHF_INLINE double s_abs(double x) { return __builtin_fabs(x); }

// ---- exponentials and logarithm of vf. Polynomials: minimax in relative error by Remez exchange,
// coefficients rounded to float one after another and the rest refitted; each approximation alone
// is within 6e-9, the rest of the error is rounding.

constexpr float LN2_HI = 0x1.62e4p-1f;  // 15 bits: a whole number below 2^9 times it is exact
constexpr float LN2_LO = 0x1.7f7d1cp-20f;

// p * 2^n for whole n in [-151, 129], p near 1, rounded once.
FASTRLHF_INLINE vf scale_by_pow2(vf p, vf n) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(ALL_LANES, p, n);
#else
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;  // two steps: 2^n itself may be denormal or beyond the largest float
  return p * bits_as<vf>((half + 127) << 23) * bits_as<vf>((whole - half + 127) << 23);
#endif
}

FASTRLHF_INLINE vf round_to_whole(vf x) {  // |x| < 2^22, ties to even
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(ALL_LANES, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + 0x1.8p23f) - 0x1.8p23f;
#endif
}

// 2^(n + f) for whole n in [-151, 129] and |f| <= 1/2.
FASTRLHF_INLINE vf exp2_of_parts(vf n, vf f) {
  vf q = vfma(f, vf{} + 0x1.4bb468p-13f, vf{} + 0x1.5fc192p-10f);
  q = vfma(q, f, vf{} + 0x1.3b21c8p-7f);
  q = vfma(q, f, vf{} + 0x1.c6ada8p-5f);
  q = vfma(q, f, vf{} + 0x1.ebfbe6p-3f);
  q = vfma(q, f, vf{} + 0x1.62e432p-1f);
  return scale_by_pow2(vfma(q, f, vf{} + 1.0f), n);
}

FASTRLHF_INLINE vf vexp2(vf x) {
  // Lanes that underflow compute 2^0 and are zeroed: a denormal product would trap to microcode.
  const vi zero = x < -150.0f;
  const vf y = zero ? vf{} : vmin(vf{} + 129.0f, x);
  const vf n = round_to_whole(y);
  const vf result = exp2_of_parts(n, y - n);
  return zero ? vf{} : result;
}

// exp(r) - 1 for |r| <= log(2) / 2.
FASTRLHF_INLINE vf expm1_of_remainder(vf r) {
  vf q = vfma(r, vf{} + 0x1.6ad158p-10f, vf{} + 0x1.123f30p-7f);
  q = vfma(q, r, vf{} + 0x1.55584ep-5f);
  q = vfma(q, r, vf{} + 0x1.55548ap-3f);
  q = vfma(q, r, vf{} + 0x1.fffffcp-2f);
  return vfma(q, r * r, r);
}

FASTRLHF_INLINE vf vexp(vf x) {
  const vi zero = x < -104.0f;  // below -150 log 2 = -103.97 it is 0
  const vf y = zero ? vf{} : vmin(vf{} + 89.0f, x);
  const vf n = round_to_whole(y * 0x1.715476p+0f);
  const vf r = vfma(n, vf{} - LN2_LO, vfma(n, vf{} - LN2_HI, y));
  const vf result = scale_by_pow2(expm1_of_remainder(r) + 1.0f, n);
  return zero ? vf{} : result;
}

FASTRLHF_INLINE vf vlog(vf x) {
  // x = m 2^e with m in [sqrt 1/2, sqrt 2); log m = 2 atanh s with s = (m - 1) / (m + 1).
  const vi denormal = x < 0x1p-126f;
  const vu u = bits_as<vu>(denormal ? x * 0x1p23f : x);  // unsigned: a negative x may wrap
  const vi exponent = bits_as<vi>(u - 0x3f3504f3u) >> 23;  // the bits of sqrt 1/2
  const vf e = __builtin_convertvector(exponent - (denormal & 23), vf);
  const vf m = bits_as<vf>(u - (bits_as<vu>(exponent) << 23));
  const vf f = m - 1.0f;
  const vf s = f / (m + 1.0f);
  const vf z = s * s;
  vf q = vfma(z, vf{} + 0.2427885681f, vf{} + 0.2849879265f);
  q = vfma(q, z, vf{} + 0.4000097215f);
  q = vfma(q, z, vf{} + 0.6666666269f);
  // log(1 + f) = f - (f^2/2 - s (f^2/2 + z q)): the large term f is exact.
  const vf half_square = 0.5f * f * f;
  const vf small = vfma(s, vfma(z, q, half_square), e * LN2_LO);
  vf y = vfma(e, vf{} + LN2_HI, f - (half_square - small));
  y = x == __builtin_inff() ? x : y;
  y = x == 0.0f ? vf{} - __builtin_inff() : y;
  return (x < 0.0f) | (x != x) ? vf{} + __builtin_nanf("") : y;
}

#define FASTRLHF_LANEWISE(name, scalar)                      \
  FASTRLHF_INLINE vd name(vd x) {                            \
    for (int i = 0; i < lanes<vd>; ++i) x[i] = scalar(x[i]); \
    return x;                                                \
  }
FASTRLHF_LANEWISE(vexp2, s_exp2)
FASTRLHF_LANEWISE(vexp, s_exp)
FASTRLHF_LANEWISE(vlog, s_log)
#undef FASTRLHF_LANEWISE

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
