// The K-wise ranking loss over G ragged groups, its statistics and its gradient.
//
// scores, gradient (total,) are, like loss and stats, all f32 or all f64; ranks (total,) and
// group_sizes (G,) are int64; all contiguous; gradient may be absent. stats: pair_accuracy, pairs,
// and the inverse of the normalizer, by which the gradient is still to be multiplied. `scratch` has
// 4 doubles a group; none for up to 64.
//
// A lane of a vector holds an output of the group: see ranking_body.h. No bit of a group's result
// depends on the other groups or on the threads.
#include "op.h"

FASTRLHF_OP(ranking_loss, "Loss, stats and unnormalised gradient.",
            const void* scores, const int64_t* ranks, const int64_t* group_sizes, double* scratch,
            void* loss, void* stats, void* gradient, int64_t G, int64_t total, int has_normalizer,
            double normalizer, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "ranking_body.h"
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_PAIRS = 4096;  // some 3 ns each
constexpr int64_t FEW_GROUPS = 64;

struct Group {
  int64_t start = 0;  // its first score
  RankSums sums;
};

// log(1 + e) for e in [0, 1], to two units in the last place: with s = e / (2 + e) it is 2 atanh(s)
// = 2 s + 2 s^3 P(s^2), P fitted at Chebyshev's points; 2 s is e - s e, whose large term is exact.
FASTRLHF_INLINE vf log1p_of_unit(vf e) {
  const vf s = e / (e + 2.0f), z = s * s;
  vf p = vfma(z, vf{} + 0x1.dbef8ep-4f, vf{} + 0x1.bc7be0p-4f);
  p = vfma(p, z, vf{} + 0x1.24c9bep-3f);
  p = vfma(p, z, vf{} + 0x1.9998d2p-3f);
  p = vfma(p, z, vf{} + 0x1.555556p-2f);
  return e - s * (e - 2.0f * z * p);
}
FASTRLHF_INLINE vd log1p_of_unit(vd e) {
  for (int i = 0; i < lanes<vd>; ++i) e[i] = s_log1p(e[i]);
  return e;
}

// A rank a lane. For vf in two halves: comparing one vector of twice the width, GCC 12 goes lane by
// lane, which took two thirds of the op's time.
template <class V>
struct RanksOf {  // of vf
  typedef int32_t vi_half __attribute__((vector_size(VEC_BYTES / 2)));
  vl low{}, high{};

  FASTRLHF_HD RanksOf(const int64_t* ranks, int k) {
    int64_t all[lanes<V>] = {};
    for (int lane = 0; lane < k; ++lane) all[lane] = ranks[lane];
    __builtin_memcpy(&low, all, sizeof(low));
    __builtin_memcpy(&high, all + lanes<V> / 2, sizeof(high));
  }
  static FASTRLHF_HD vi joined(vl a, vl b) {
    const vi_half half[2] = {__builtin_convertvector(a, vi_half),
                             __builtin_convertvector(b, vi_half)};
    vi both;
    __builtin_memcpy(&both, half, sizeof(both));
    return both;
  }
  FASTRLHF_HD vi less(int64_t b) const { return joined(low < b, high < b); }
  FASTRLHF_HD vi greater(int64_t b) const { return joined(low > b, high > b); }
};
template <>
struct RanksOf<vd> {
  vl all{};

  FASTRLHF_HD RanksOf(const int64_t* ranks, int k) {
    for (int lane = 0; lane < k; ++lane) all[lane] = ranks[lane];
  }
  FASTRLHF_HD vl less(int64_t b) const { return all < b; }
  FASTRLHF_HD vl greater(int64_t b) const { return all > b; }
};

template <class V_>
struct Lanes {
  using V = V_;
  using A = elem_t<V>;
  using M = mask_t<V>;
  using Loss = Sum<V>;
  using Tally = M;
  using Ranks = RanksOf<V>;

  static FASTRLHF_HD V splat(A x) { return ::fastrlhf::FASTRLHF_ISA::splat<V>(x); }
  static FASTRLHF_HD M less(const Ranks& a, int64_t b) { return a.less(b); }
  static FASTRLHF_HD M greater(const Ranks& a, int64_t b) { return a.greater(b); }
  static FASTRLHF_HD V select(M m, V a, V b) { return ::fastrlhf::FASTRLHF_ISA::select(m, a, b); }
  static FASTRLHF_HD void count(Tally& n, M m) { n -= m; }
  static FASTRLHF_HD V exp(V x) { return vexp(x); }
  static FASTRLHF_HD V log1p(V x) { return log1p_of_unit(x); }
};

template <class M>
FASTRLHF_INLINE double total_of(M tally) {
  int64_t n = 0;
  for (int j = 0; j < static_cast<int>(sizeof(tally) / sizeof(tally[0])); ++j) n += tally[j];
  return static_cast<double>(n);
}

template <class A>
RankSums rank_group(const A* scores, const int64_t* ranks, A* gradient, int64_t K) {
  using L = Lanes<vec_t<A>>;
  using V = typename L::V;
  RankSums sums;
  if (K < 2) {
    if (K == 1 && gradient != nullptr) gradient[0] = A(0);
    return sums;
  }
  const A weight = pair_weight<A>(K);
  double loss = 0;
  each_vector<V>(K, [&](int64_t i, int k) {
    const typename L::Ranks rank(ranks + i, k);
    LaneSums<L> part;
    part.walk(load_k(scores + i, k), rank, load_mask<V>(nullptr, i, k), scores, ranks, K);
    if (gradient != nullptr) store_k(gradient + i, part.d * weight, k);
    loss += part.loss.total();
    sums.pairs += total_of(part.pairs);
    sums.right += total_of(part.right);
  });
  sums.loss = loss * static_cast<double>(weight);
  return sums;
}

}  // namespace

FASTRLHF_KERNEL(ranking_loss)(const void* scores, const int64_t* ranks, const int64_t* group_sizes,
                              double* scratch, void* loss, void* stats, void* gradient, int64_t G,
                              int64_t total, int has_normalizer, double normalizer, int dtype,
                              int nthreads) {
  Group few[FEW_GROUPS];
  Group* groups = G <= FEW_GROUPS ? few : reinterpret_cast<Group*>(scratch);
  int64_t end = 0;
  for (int64_t g = 0; g < G; ++g) {
    groups[g].start = end;
    if (group_sizes[g] < 0 || group_sizes[g] > total - end) return BAD_SIZES;
    end += group_sizes[g];
  }
  if (end != total) return BAD_SIZES;
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    const int64_t mean_size = total / max_of<int64_t>(G, 1);
    parallel_for(G, GRAIN_PAIRS / (mean_size * mean_size + 1) + 1, nthreads,
                 [&](int64_t first, int64_t last) {
                   for (int64_t g = first; g < last; ++g) {
                     const int64_t at = groups[g].start;
                     groups[g].sums = rank_group(
                         static_cast<const A*>(scores) + at, ranks + at,
                         gradient == nullptr ? nullptr : static_cast<A*>(gradient) + at,
                         group_sizes[g]);
                   }
                 });
    RankSums all;
    for (int64_t g = 0; g < G; ++g) all.add(groups[g].sums);
    rank_results(all, has_normalizer != 0 ? normalizer : static_cast<double>(G),
                 static_cast<A*>(loss), static_cast<A*>(stats));
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
