// The K-wise ranking loss over G ragged groups, its statistics and its gradient.
//
// scores, gradient (total,) are, like loss and stats, all f32 or all f64; ranks (total,) and
// group_sizes (G,) are int64; all contiguous; gradient may be absent. stats: pair_accuracy, pairs,
// and the inverse of the normalizer, by which the gradient is still to be multiplied. `scratch` has
// 4 doubles a group. A group's pairs are walked in order, by one thread.
#include "op.h"

FASTRLHF_OP(ranking_loss, "Loss, stats and unnormalised gradient.",
            const void* scores, const int64_t* ranks, const int64_t* group_sizes, double* scratch,
            void* loss, void* stats, void* gradient, int64_t G, int64_t total, int has_normalizer,
            double normalizer, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr int64_t GRAIN_PAIRS = 512;  // some 20 ns each

struct GroupSums {
  int64_t start = 0;  // the group's first score
  double loss = 0, pairs = 0, right = 0;
};

template <class A>
void rank_group(GroupSums& sums, const A* scores, const int64_t* ranks, A* gradient, int64_t K) {
  sums.loss = sums.pairs = sums.right = 0.0;
  const A weight = A(1) / max_of<A>(static_cast<A>(K) * static_cast<A>(K - 1) / 2, 1);
  if (gradient != nullptr) {
    for (int64_t i = 0; i < K; ++i) gradient[i] = A(0);
  }
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = i + 1; j < K; ++j) {
      if (ranks[i] == ranks[j]) continue;
      const int64_t winner = ranks[i] < ranks[j] ? i : j, loser = i + j - winner;
      const A margin = scores[winner] - scores[loser];
      const A e = s_exp(-s_abs(margin));  // no more than 1
      sums.loss += (margin > 0 ? A(0) : -margin) + s_log1p(e);
      sums.pairs += 1.0;
      sums.right += margin > 0 ? 1.0 : 0.0;
      if (gradient != nullptr) {
        const A pull = weight * (margin > 0 ? e : A(1)) / (A(1) + e);  // sigmoid(-margin), weighted
        gradient[winner] -= pull;
        gradient[loser] += pull;
      }
    }
  }
  sums.loss *= weight;
}

}  // namespace

FASTRLHF_KERNEL(ranking_loss)(const void* scores, const int64_t* ranks, const int64_t* group_sizes,
                              double* scratch, void* loss, void* stats, void* gradient, int64_t G,
                              int64_t total, int has_normalizer, double normalizer, int dtype,
                              int nthreads) {
  GroupSums* parts = reinterpret_cast<GroupSums*>(scratch);
  int64_t end = 0;
  for (int64_t g = 0; g < G; ++g) {
    parts[g].start = end;
    if (group_sizes[g] < 0 || group_sizes[g] > total - end) {
      return "group_sizes must be at least 0 and add up to the number of scores";
    }
    end += group_sizes[g];
  }
  if (end != total) return "group_sizes must be at least 0 and add up to the number of scores";
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    const int64_t mean_size = total / max_of<int64_t>(G, 1);
    parallel_for(G, GRAIN_PAIRS / (mean_size * mean_size / 2 + 1) + 1, nthreads,
                 [&](int64_t first, int64_t last) {
                   for (int64_t g = first; g < last; ++g) {
                     const int64_t at = parts[g].start;
                     rank_group(
                         parts[g], static_cast<const A*>(scores) + at, ranks + at,
                         gradient == nullptr ? nullptr : static_cast<A*>(gradient) + at,
                         group_sizes[g]);
                   }
                 });
    GroupSums all;
    for (int64_t g = 0; g < G; ++g) {
      all.loss += parts[g].loss;
      all.pairs += parts[g].pairs;
      all.right += parts[g].right;
    }
    const double scale = all.pairs == 0.0 ? 0.0
                         : 1.0 / (has_normalizer != 0 ? normalizer : static_cast<double>(G));
    A* s = static_cast<A*>(stats);
    *static_cast<A*>(loss) = static_cast<A>(all.pairs == 0.0 ? 0.0 : all.loss * scale);
    s[0] = static_cast<A>(all.right / max_of(all.pairs, 1.0));
    s[1] = static_cast<A>(all.pairs);
    s[2] = static_cast<A>(scale);
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
