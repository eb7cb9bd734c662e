// Generalised advantage estimation by a warp: any length in the same registers.
//
// Each step maps the advantage after it to its own, A -> c A + d, with (c, d) = (gamma lambda,
// delta), or (1, 0) where a step is stepped over. A warp walks its row right to left in tiles of 32
// steps, composes the tile's maps by an inclusive scan of shuffles and carries the advantage and
// the value at the tile's left edge into the next tile, which is already on its way from memory.
// The order of operations is fixed by T alone: the same bits, run after run.
//
// A Row says what a step is, and what becomes of its advantage:
//   load(t)                    what memory holds of steps t, which may lie outside the row
//   step(t, loaded)            the GaeStep of each; runs: inside the row, and passed through
//   store(t, loaded, step, advantage)
#pragma once

#ifdef FASTRLHF_ISA

#include "gae_body.h"
#include "warp.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

template <class W, class A, class Row>
FASTRLHF_WARP void gae_scan(Row& row, int64_t T, A gamma, A gamma_lam) {
  using V = lane_t<W, A>;
  using M = lane_t<W, bool>;
  A carry_adv = 0, carry_value = 0;  // of the first step that runs to the right of the tile
  int64_t first = (T - 1) / WARP * WARP;
  auto ahead = row.load(W::steps(first));
  for (; first >= 0; first -= WARP) {
    const auto t = W::steps(first);
    const auto loaded = ahead;
    ahead = row.load(W::steps(first - WARP));
    const auto step = row.step(t, loaded);

    const unsigned running = W::ballot(step.runs);
    const lane_t<W, unsigned> after = running & W::lanes_after();
    const M none = after == 0u;
    const auto source = select(none, W::lane(), lowest_bit(after));
    const V next_value = select(none, V{} + carry_value, W::shuffle(step.value, source));

    V c = select(step.runs, V{} + gamma_lam, V{} + A(1));
    V d = select(step.runs, gae_delta(step.reward, step.value, next_value, gamma), V{});
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int offset = 1; offset < WARP; offset *= 2) {  // (c, d) after the maps to the right
      const V right_c = W::shuffle_down(c, offset);
      const V right_d = W::shuffle_down(d, offset);
      const M inside = W::lane() < WARP - offset;
      d = select(inside, d + c * right_d, d);
      c = select(inside, c * right_c, c);
    }
    const V advantage = d + c * carry_adv;
    row.store(t, loaded, step, advantage);
    carry_adv = W::broadcast(advantage, 0);
    const A leftmost = W::broadcast(step.value, running == 0u ? 0 : lowest_bit(running));
    carry_value = running == 0u ? carry_value : leftmost;
  }
}

// gae's own rows. Without mask every step is valid; without value_mask values live where mask says.
template <class W, class A>
struct GaeRow {
  using V = lane_t<W, A>;
  using M = lane_t<W, bool>;
  using Index = lane_t<W, int64_t>;
  struct Loaded {
    V reward, value;
    M inside, valid, has_value;
  };

  const A *rewards, *values;
  const uint8_t *mask, *value_mask;
  A *adv, *ret;
  int64_t T;
  int mode;

  FASTRLHF_WARP M set(const uint8_t* bytes, Index t, M inside) const {
    return W::load(bytes, t, inside, uint8_t(0)) != uint8_t(0);
  }
  FASTRLHF_WARP Loaded load(Index t) const {
    const M inside = t >= int64_t(0) && t < T;
    const M valid = mask == nullptr ? inside : set(mask, t, inside);
    const M has_value = value_mask == nullptr ? valid : set(value_mask, t, inside);
    return {W::load(rewards, t, inside, A(0)), W::load(values, t, inside, A(0)), inside, valid,
            has_value};
  }
  FASTRLHF_WARP GaeStep<V, M> step(Index, const Loaded& at) const {
    GaeStep<V, M> step(at.reward, at.value, at.valid, at.has_value, mode);
    step.runs = step.runs && at.inside;
    return step;
  }
  FASTRLHF_WARP void store(Index t, const Loaded& at, const GaeStep<V, M>& step,
                           V advantage) const {
    W::store(adv, t, at.inside, select(at.valid, advantage, V{}));
    W::store(ret, t, at.inside, select(at.has_value, advantage + step.value, V{}));
  }
};

}  // namespace
}  // namespace fastrlhf::FASTRLHF_ISA
#endif
