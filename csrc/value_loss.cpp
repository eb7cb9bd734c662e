// PPO's clipped value loss over n entries, its statistics and its gradient.
//
// values, old_values, returns, gradient are contiguous and, like loss and stats, all f32 or all
// f64; mask is bytes or absent; gradient may be absent; clip below 0: the plain squared error.
// stats: clip_fraction, explained_variance, and the inverse of the normalizer, by which the
// gradient is still to be multiplied. `scratch` has 8 doubles for every 1024 entries, rounded up;
// none for up to 1024.
#include "op.h"

FASTRLHF_OP(value_loss, "Loss, stats and unnormalised gradient.",
            const void* values, const void* old_values, const void* returns, const uint8_t* mask,
            double* scratch, void* loss, void* stats, void* gradient, int64_t n, double clip,
            int has_normalizer, double normalizer, int dtype, int nthreads)

#ifdef FASTRLHF_ISA
#include "tiles.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

struct ValueSums {
  double loss = 0, clipped = 0;
  Moments returns, errors;  // of R and of R - v

  void add(const ValueSums& part) {
    loss += part.loss;
    clipped += part.clipped;
    returns.merge(part.returns);
    errors.merge(part.errors);
  }
};

template <class A>
ValueSums value_tile(const A* values, const A* old_values, const A* returns, const uint8_t* mask,
                     A* gradient, int64_t n, A clip) {
  using V = vec_t<A>;
  Sum<V> loss;
  mask_t<V> clips{};  // -1 for each of a lane
  each_vector<V>(n, [&](int64_t i, int k) {
    const mask_t<V> m = load_mask<V>(mask, i, k);
    const V v = keep<V>(m, load_k(values + i, k));
    const V r = keep<V>(m, load_k(returns + i, k));
    const V plain = v - r;
    V error = plain;
    mask_t<V> moves = ~mask_t<V>{};  // the loss moves with the value
    if (clip >= 0) {
      const V old = keep<V>(m, load_k(old_values + i, k));
      // A NaN stays, as does a value that both bounds allow.
      const V held = vmax(old - clip, vmin(old + clip, v));
      const V clipped = held - r;
      const mask_t<V> is_clipped = clipped * clipped > plain * plain;
      error = select(is_clipped, clipped, plain);
      moves = ~is_clipped;  // where the clipped term is the larger, the value was clamped
      clips += is_clipped;
    }
    loss.add(error * error);
    if (gradient != nullptr) store_k(gradient + i, keep<V>(moves, plain), k);
  });
  const auto valid = [&](int64_t i, int k) { return load_mask<V>(mask, i, k); };
  ValueSums sums;
  sums.loss = loss.total();
  sums.clipped = static_cast<double>(count(clips));
  sums.returns =
      tile_moments<V>(n, [&](int64_t i, int k) { return load_k(returns + i, k); }, valid);
  sums.errors = tile_moments<V>(
      n, [&](int64_t i, int k) { return load_k(returns + i, k) - load_k(values + i, k); }, valid);
  return sums;
}

}  // namespace

FASTRLHF_KERNEL(value_loss)(const void* values, const void* old_values, const void* returns,
                            const uint8_t* mask, double* scratch, void* loss, void* stats,
                            void* gradient, int64_t n, double clip, int has_normalizer,
                            double normalizer, int dtype, int nthreads) {
  return with_float_dtype(dtype, [&](auto zero) -> const char* {
    using A = decltype(zero);
    ValueSums only;
    ValueSums* parts = n_tiles(n) <= 1 ? &only : reinterpret_cast<ValueSums*>(scratch);
    over_tiles(n, nthreads, [&](int64_t tile, int64_t i, int64_t length) {
      parts[tile] = value_tile(static_cast<const A*>(values) + i,
                               static_cast<const A*>(old_values) + i,
                               static_cast<const A*>(returns) + i,
                               mask == nullptr ? nullptr : mask + i,
                               gradient == nullptr ? nullptr : static_cast<A*>(gradient) + i,
                               length, static_cast<A>(clip));
    });
    ValueSums all;
    for (int64_t tile = 0; tile < n_tiles(n); ++tile) all.add(parts[tile]);
    const double valid = all.returns.n;
    const double scale = inverse_normalizer(valid, has_normalizer, normalizer);
    A* s = static_cast<A*>(stats);
    *static_cast<A*>(loss) = static_cast<A>(valid == 0.0 ? 0.0 : 0.5 * all.loss * scale);
    s[0] = static_cast<A>(all.clipped / max_of(valid, 1.0));
    s[1] = static_cast<A>(all.returns.m2 == 0.0 ? 0.0 : 1.0 - all.errors.m2 / all.returns.m2);
    s[2] = static_cast<A>(scale);
    return nullptr;
  });
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
