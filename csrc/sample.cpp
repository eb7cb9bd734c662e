// Draws a token a row; kernels/fastrlhf_kernels/sample.py has the specification.
//
// logits (B, V), f32, f64, bf16 or f16, dense along V, rows `stride` elements apart; seeds and
// positions (B); each setting (B) or null, then the number beside it holds for every row;
// temperatures, top_ps, min_ps of the type of arithmetic, top_ks int64. sums: scratch, two doubles
// for each tile of SAMPLE_TILE columns of each row. tokens (B) int64; logprobs, sampled (B).
//
// top-k and top-p keep a prefix of the tokens in order of size, ties by id: all above a threshold
// and the first few equal to it. The threshold is found without sorting, by bisection over the
// bits of a float, until so few values are left between the bounds that they can be sorted.
#include "op.h"

FASTRLHF_OP(sample, "Tokens and their log-probs, before and after the filters.",
            const void* logits, const int64_t* seeds, const int64_t* positions,
            const void* temperatures, const int64_t* top_ks, const void* top_ps, const void* min_ps,
            double* sums, int64_t* tokens, void* logprobs, void* sampled, int64_t B, int64_t V,
            int64_t stride, double temperature, int64_t top_k, double top_p, double min_p,
            int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "logprob_row.h"
#include "pool.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t SAMPLE_TILE = 1024;     // part of the specification
constexpr int64_t GRAIN_COLUMNS = 8192;   // worth waking a thread for; about 10 us
constexpr int64_t FEW = 64;               // values worth sorting instead of another bisection

// ---- the generator: Philox4x32-10, counter (position, 0), key seed; the first two words

struct Words {
  uint32_t a, b;
};

Words philox(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = 0xD2511F53ull * c0, q = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(q);
    c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// ---- floats as integers in the same order

inline int64_t key_of(float x) {
  const int32_t b = bits_as<int32_t>(x);
  return b ^ ((b >> 31) & 0x7fffffff);
}
inline int64_t key_of(double x) {
  const int64_t b = bits_as<int64_t>(x);
  return b ^ ((b >> 63) & 0x7fffffffffffffff);
}
inline float value_of(int64_t key, float) {
  const int32_t b = static_cast<int32_t>(key);
  return bits_as<float>(b ^ ((b >> 31) & 0x7fffffff));
}
inline double value_of(int64_t key, double) {
  return bits_as<double>(key ^ ((key >> 63) & 0x7fffffffffffffff));
}

// ---- masses

template <class A>
A mass_of(A x, A max, const Exponent<A>& t) {
  vec_t<A> d = splat<vec_t<A>>(x - max);
  return exp_scaled(d, t)[0];
}

// Sums in fp64, so that their order hardly matters.
template <class A>
double wide_sum(const A* e, int64_t n) {
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) sum[k] += static_cast<double>(e[i + k]);
  }
  for (; i < n; ++i) sum[0] += static_cast<double>(e[i]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

struct Above {
  int64_t count;
  double mass;
};

// How many logits are above `value`, and with MASS how much mass they have.
template <bool MASS, class T>
Above above(const T* x, int64_t V, acc_t<T> value, acc_t<T> max, const Exponent<acc_t<T>>& t) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  constexpr int W = lanes<Vec>;
  Above found{0, 0.0};
  for (int64_t c = 0; c < V; c += SAMPLE_TILE) {
    const int64_t n = min_of(SAMPLE_TILE, V - c);
    if (tile_max(x + c, n) <= value) continue;
    A e[SAMPLE_TILE];
    Vec count{};
    for (int64_t i = 0; i < n; i += W) {
      const bool whole = i + W <= n;
      const Vec v = whole ? load(x + c + i) : load_n(x + c + i, n - i, -INF<A>);
      const auto is_above = v > value;
      count += is_above ? splat<Vec>(A(1)) : Vec{};
      if constexpr (MASS) {
        Vec d = v - max;
        const Vec mass = is_above ? exp_scaled(d, t) : Vec{};
        whole ? store(e + i, mass) : store_n(e + i, mass, n - i);
      }
    }
    found.count += static_cast<int64_t>(hsum(count));
    if constexpr (MASS) found.mass += wide_sum(e, n);
  }
  return found;
}

// Tokens above `value` are kept, and the first `ties` of those equal to it.
template <class A>
struct Threshold {
  A value;
  int64_t ties;
};

// The longest prefix of the sorted logits in which every token has fewer than k before it and, with
// MASS, less than `limit` of mass. The first is always kept.
template <bool MASS, class T>
Threshold<acc_t<T>> prefix(const T* x, int64_t V, int64_t k, double limit, acc_t<T> max,
                           const Exponent<acc_t<T>>& t, Above& before) {
  using A = acc_t<T>;
  const auto goes_on = [&](const Above& a) { return a.count < k && (!MASS || a.mass < limit); };
  int64_t low = key_of(-INF<A>), high = key_of(max);
  Above at_low = above<MASS>(x, V, -INF<A>, max, t), at_high{0, 0.0};
  if (goes_on(at_low)) {
    before = at_low;
    return {-INF<A>, V};
  }
  // The threshold is in (low, high].
  while (static_cast<uint64_t>(high) - static_cast<uint64_t>(low) > 1 &&
         at_low.count - at_high.count > FEW) {
    // low + high may overflow for doubles; the halves' lost bits may not be lost together.
    const int64_t middle = (low >> 1) + (high >> 1) + (low & high & 1);
    const Above a = above<MASS>(x, V, value_of(middle, A(0)), max, t);
    if (goes_on(a)) {
      high = middle;
      at_high = a;
    } else {
      low = middle;
      at_low = a;
    }
  }
  A value = value_of(high, A(0));
  if (at_low.count - at_high.count <= FEW) {
    A between[FEW];
    const A low_value = value_of(low, A(0)), high_value = value;
    int64_t n = 0;
    for (int64_t c = 0; c < V; c += SAMPLE_TILE) {
      const int64_t end = min_of(SAMPLE_TILE, V - c);
      if (tile_max(x + c, end) <= low_value) continue;
      for (int64_t i = 0; i < end; ++i) {
        const A v = to_acc(x[c + i]);
        if (!(v > low_value && v <= high_value) || n == FEW) continue;
        int64_t place = n++;
        for (; place > 0 && between[place - 1] < v; --place) between[place] = between[place - 1];
        between[place] = v;
      }
    }
    Above a = at_high;
    value = between[0];
    for (int64_t i = 0; i < n;) {
      if (!goes_on(a)) break;
      value = between[i];
      at_high = a;
      for (; i < n && between[i] == value; ++i) {
        a.count += 1;
        a.mass += MASS ? static_cast<double>(mass_of(value, max, t)) : 0.0;
      }
    }
  }
  before = at_high;
  const double mass = MASS ? static_cast<double>(mass_of(value, max, t)) : 0.0;
  Above a = at_high;
  int64_t ties = 0;
  while (ties < V && (a.count == 0 || goes_on(a))) {
    ++ties;
    ++a.count;
    a.mass = at_high.mass + static_cast<double>(ties) * mass;
  }
  return {value, ties};
}

template <class A>
struct Filter {
  bool active;
  Threshold<A> threshold;
  A least_mass;
};

// The kept masses of a tile, 0 for the others. `ties` counts down over the row.
template <class T>
void tile_masses(const T* x, int64_t n, acc_t<T> max, const Exponent<acc_t<T>>& t,
                 const Filter<acc_t<T>>& filter, int64_t& ties, acc_t<T>* e) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  constexpr int W = lanes<Vec>;
  for (int64_t i = 0; i < n; i += W) {
    const bool whole = i + W <= n;
    const Vec v = whole ? load(x + i) : load_n(x + i, n - i, -INF<A>);
    Vec d = v - max;
    Vec mass = exp_scaled(d, t);
    if (filter.active) {
      mass = (v >= filter.threshold.value) & (mass >= filter.least_mass) ? mass : Vec{};
    }
    whole ? store(e + i, mass) : store_n(e + i, mass, n - i);
  }
  if (!filter.active) return;
  for (int64_t i = 0; i < n; ++i) {
    if (to_acc(x[i]) == filter.threshold.value && ties-- <= 0) e[i] = A(0);
  }
}

// The first index whose cumulative mass exceeds `aim`, at the latest the last of positive mass.
template <class Mass>
int64_t pick(int64_t n, double aim, const Mass& mass) {
  int64_t last = 0;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double m = mass(i);
    if (!(m > 0)) continue;
    last = i;
    sum += m;
    if (sum > aim) break;
  }
  return last;
}

template <class A>
struct Settings {
  A temperature;
  int64_t top_k;
  A top_p, min_p;
};

template <class A>
struct Drawn {
  int64_t token;
  A logprob, sampled;
};

template <class T>
Drawn<acc_t<T>> sample_row(const T* x, int64_t V, const Words& words,
                           const Settings<acc_t<T>>& settings, double* sums) {
  using A = acc_t<T>;
  const bool greedy = settings.temperature == A(0);
  const Exponent<A> t(greedy ? A(1) : settings.temperature);
  RowState<A> state{-INF<A>, A(0), A(0)};
  scan_row(state, x, V, Head<A>{nullptr, A(1), A(0)}, t, false);
  if (state.max == -INF<A> || state.rest != state.rest) {
    return {0, NOT_A_NUMBER<A>, NOT_A_NUMBER<A>};
  }
  if (greedy) {
    int64_t token = 0;
    while (to_acc(x[token]) != state.max) ++token;
    return {token, row_logprob(state, state.max, t.temperature), A(0)};
  }

  const bool has_k = settings.top_k > 0 && settings.top_k < V, has_p = settings.top_p < A(1);
  Filter<A> filter{has_k || has_p || settings.min_p > A(0), {-INF<A>, V}, settings.min_p};
  Above before{0, 0.0};
  if (has_k) filter.threshold = prefix<false>(x, V, settings.top_k, 0.0, state.max, t, before);
  if (has_p) {
    const A value = filter.threshold.value;
    double total = above<true>(x, V, value, state.max, t).mass;
    if (has_k) {
      total += static_cast<double>(filter.threshold.ties) *
               static_cast<double>(mass_of(value, state.max, t));
    }
    const Threshold<A> p = prefix<true>(x, V, V, static_cast<double>(settings.top_p) * total,
                                        state.max, t, before);
    if (p.value > value || (p.value == value && p.ties < filter.threshold.ties)) {
      filter.threshold = p;
    }
  }

  // sums: first the tiles' masses, then how many equals of a filter's threshold are left for each.
  const int64_t tiles = (V + SAMPLE_TILE - 1) / SAMPLE_TILE;
  int64_t ties = filter.threshold.ties;
  double total = 0;
  A e[SAMPLE_TILE];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t c = tile * SAMPLE_TILE, n = min_of(SAMPLE_TILE, V - c);
    sums[tiles + tile] = static_cast<double>(ties);
    tile_masses(x + c, n, state.max, t, filter, ties, e);
    sums[tile] = wide_sum(e, n);
    total += sums[tile];
  }
  const A scale = static_cast<A>(0x1p-32);
  const double u0 = static_cast<double>(static_cast<A>(words.a) * scale);
  const double u1 = static_cast<double>(static_cast<A>(words.b) * scale);
  const int64_t tile = pick(tiles, u0 * total, [&](int64_t i) { return sums[i]; });
  const int64_t c = tile * SAMPLE_TILE, n = min_of(SAMPLE_TILE, V - c);
  ties = static_cast<int64_t>(sums[tiles + tile]);
  tile_masses(x + c, n, state.max, t, filter, ties, e);
  const int64_t token =
      c + pick(n, u1 * sums[tile], [&](int64_t i) { return static_cast<double>(e[i]); });

  const A z = to_acc(x[token]);
  const A logprob = row_logprob(state, z, t.temperature);
  if (!filter.active) return {token, logprob, logprob};
  // total - 1 cancels where the largest token has nearly all the mass: its rest is summed apart.
  double rest = 0;
  bool first_max = true;
  ties = filter.threshold.ties;
  for (int64_t tile_at = 0; tile_at < tiles; ++tile_at) {
    const int64_t c_at = tile_at * SAMPLE_TILE, n_at = min_of(SAMPLE_TILE, V - c_at);
    if (sums[tile_at] == 0) continue;
    ties = static_cast<int64_t>(sums[tiles + tile_at]);
    tile_masses(x + c_at, n_at, state.max, t, filter, ties, e);
    for (int64_t i = 0; first_max && i < n_at; ++i) {
      if (to_acc(x[c_at + i]) == state.max) {
        e[i] = A(0);
        first_max = false;
      }
    }
    rest += wide_sum(e, n_at);
  }
  const RowState<A> kept{state.max, static_cast<A>(rest), A(0)};
  return {token, logprob, row_logprob(kept, z, t.temperature)};
}

template <class A>
A setting(const void* values, int64_t n, double number) {
  return values == nullptr ? static_cast<A>(number) : static_cast<const A*>(values)[n];
}

}  // namespace

FASTRLHF_KERNEL(sample)(const void* logits, const int64_t* seeds, const int64_t* positions,
                        const void* temperatures, const int64_t* top_ks, const void* top_ps,
                        const void* min_ps, double* sums, int64_t* tokens, void* logprobs,
                        void* sampled, int64_t B, int64_t V, int64_t stride, double temperature,
                        int64_t top_k, double top_p, double min_p, int dtype, int nthreads) {
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t sums_stride = 2 * ((V + SAMPLE_TILE - 1) / SAMPLE_TILE);
    parallel_for(B, GRAIN_COLUMNS / (V + 1) + 1, nthreads, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        const Settings<A> settings{setting<A>(temperatures, b, temperature),
                                   top_ks == nullptr ? top_k : top_ks[b],
                                   setting<A>(top_ps, b, top_p), setting<A>(min_ps, b, min_p)};
        const Words words =
            philox(static_cast<uint64_t>(seeds[b]), static_cast<uint64_t>(positions[b]));
        const Drawn<A> drawn = sample_row(static_cast<const T*>(logits) + b * stride, V, words,
                                          settings, sums + b * sums_stride);
        tokens[b] = drawn.token;
        static_cast<A*>(logprobs)[b] = drawn.logprob;
        static_cast<A*>(sampled)[b] = drawn.sampled;
      }
    });
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
