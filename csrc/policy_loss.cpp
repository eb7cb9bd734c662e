// PPO's clipped policy loss over n entries, its statistics and its gradient, in one pass.
//
// logprobs, old_logprobs, advantages, gradient are contiguous and, like loss and stats, all f32 or
// all f64; mask is bytes or absent; gradient may be absent. stats: clip_fraction, approx_kl,
// ratio_mean, ratio_max, and the inverse of the normalizer, by which the gradient is still to be
// multiplied. `scratch` has 6 doubles for every 1024 entries, rounded up; none for up to 1024.
#include "op.h"

FASTRLHF_OP(policy_loss, "Loss, stats and unnormalised gradient; the ratio clips to [low, high].",
            const void* logprobs, const void* old_logprobs, const void* advantages,
            const uint8_t* mask, double* scratch, void* loss, void* stats, void* gradient,
            int64_t n, double low, double high, int has_normalizer, double normalizer, int dtype,
            int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

constexpr float MAX_LOG_RATIO = 20.0f;

struct PolicySums {
  double valid = 0, loss = 0, clipped = 0, squares = 0, ratios = 0, top = 0;

  void add(const PolicySums& part) {
    valid += part.valid;
    loss += part.loss;
    clipped += part.clipped;
    squares += part.squares;
    ratios += part.ratios;
    top = max_of(top, part.top);  // a NaN shows in `ratios`
  }
};

template <class A>
PolicySums policy_tile(const A* logprobs, const A* old_logprobs, const A* advantages,
                       const uint8_t* mask, A* gradient, int64_t n, A low, A high) {
  using V = vec_t<A>;
  constexpr A bound = MAX_LOG_RATIO;
  Sum<V> loss, squares, ratios;
  V top{};
  mask_t<V> valid{}, clips{};  // -1 for each of a lane
  each_vector<V>(n, [&](int64_t i, int k) {
    const mask_t<V> m = load_mask<V>(mask, i, k);
    const V x = keep<V>(m, load_k(logprobs + i, k) - load_k(old_logprobs + i, k));
    const V a = keep<V>(m, load_k(advantages + i, k));
    const V d = vmax(splat<V>(-bound), vmin(splat<V>(bound), x));  // a NaN stays
    const V ratio = vexp(d);
    const V plain = -a * ratio;
    const V clipped = -a * vmax(splat<V>(low), vmin(splat<V>(high), ratio));
    const mask_t<V> is_clipped = clipped > plain;  // then the ratio is out of range: gradient 0
    loss.add(select(is_clipped, clipped, plain));
    squares.add(A(0.5) * d * d);
    ratios.add(keep<V>(m, ratio));
    top = vmax(keep<V>(m, ratio), top);
    valid += m;
    clips += is_clipped;
    if (gradient != nullptr) {
      store_k(gradient + i, keep<V>(~is_clipped & (x >= -bound) & (x <= bound), plain), k);
    }
  });
  return {static_cast<double>(count(valid)), loss.total(),   static_cast<double>(count(clips)),
          squares.total(),                   ratios.total(), static_cast<double>(hmax(top))};
}

}  // namespace

FASTRLHF_KERNEL(policy_loss)(const void* logprobs, const void* old_logprobs, const void* advantages,
                             const uint8_t* mask, double* scratch, void* loss, void* stats,
                             void* gradient, int64_t n, double low, double high,
                             int has_normalizer, double normalizer, int dtype, int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    PolicySums only;
    PolicySums* parts = n_tiles(n) <= 1 ? &only : reinterpret_cast<PolicySums*>(scratch);
    over_tiles(n, nthreads, [&](int64_t tile, int64_t i, int64_t length) {
      parts[tile] = policy_tile(static_cast<const A*>(logprobs) + i,
                                static_cast<const A*>(old_logprobs) + i,
                                static_cast<const A*>(advantages) + i,
                                mask == nullptr ? nullptr : mask + i,
                                gradient == nullptr ? nullptr : static_cast<A*>(gradient) + i,
                                length, static_cast<A>(low), static_cast<A>(high));
    });
    PolicySums all;
    for (int64_t tile = 0; tile < n_tiles(n); ++tile) all.add(parts[tile]);
    const double scale = inverse_normalizer(all.valid, has_normalizer, normalizer);
    const double one = max_of(all.valid, 1.0);
    A* s = static_cast<A*>(stats);
    *static_cast<A*>(loss) = static_cast<A>(all.valid == 0.0 ? 0.0 : all.loss * scale);
    s[0] = static_cast<A>(all.clipped / one);
    s[1] = static_cast<A>(all.squares / one);
    s[2] = static_cast<A>(all.ratios / one);
    s[3] = static_cast<A>(all.ratios != all.ratios ? all.ratios : all.top);
    s[4] = static_cast<A>(scale);
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
