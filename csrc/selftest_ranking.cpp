// An entry for tests/test_ranking_loss.py alone: ranking_loss.cu's warps and blocks, played in order
// by one thread, so that what a GPU runs is run where there is none. What is not shared is the
// launch, and the shuffles, which are written out here.
#include "op.h"

FASTRLHF_OP(test_ranking_warps, "ranking_loss as its CUDA kernels do it; scratch: 3 doubles a group.",
            const float* scores, const int64_t* ranks, const int64_t* group_sizes, double* scratch,
            float* loss, float* stats, float* gradient, int64_t G, int64_t total,
            int has_normalizer, double normalizer)

#ifdef FASTRLHF_ISA
#include "ranking_body.h"

namespace fastrlhf::FASTRLHF_ISA {
namespace {

// shfl_down: a lane gets what the lane `offset` above it had; past the last one it gets its own.
RankSums warp_sum(RankSums* lanes) {
  for (int offset = RANK_WARP / 2; offset > 0; offset /= 2) {
    for (int lane = 0; lane < RANK_WARP; ++lane) {  // upwards: the lane above is still as it was
      lanes[lane].add(lane + offset < RANK_WARP ? lanes[lane + offset] : lanes[lane]);
    }
  }
  return lanes[0];
}

}  // namespace

FASTRLHF_KERNEL(test_ranking_warps)(const float* scores, const int64_t* ranks,
                                    const int64_t* group_sizes, double* scratch, float* loss,
                                    float* stats, float* gradient, int64_t G, int64_t total,
                                    int has_normalizer, double normalizer) {
  RankSums* groups = reinterpret_cast<RankSums*>(scratch);
  for (int64_t g = 0; g < G; ++g) {
    int64_t start = 0;
    for (int lane = 0; lane < RANK_WARP; ++lane) start += rank_start_part(group_sizes, g, lane);
    start = rank_held(start, 0, total);
    const int64_t K = rank_held(group_sizes[g], 0, total - start);
    RankSums lanes[RANK_WARP];
    for (int lane = 0; lane < RANK_WARP; ++lane) {
      lanes[lane] = rank_lane(scores + start, ranks + start,
                              gradient == nullptr ? nullptr : gradient + start, K, lane);
    }
    groups[g] = warp_sum(lanes);
  }
  RankSums all;
  for (int first = 0; first < RANK_SUM_THREADS; first += RANK_WARP) {
    RankSums lanes[RANK_WARP];
    for (int lane = 0; lane < RANK_WARP; ++lane) lanes[lane] = rank_thread(groups, G, first + lane);
    all.add(warp_sum(lanes));
  }
  rank_results(all, has_normalizer != 0 ? normalizer : static_cast<double>(G), loss, stats);
  return nullptr;
}

}  // namespace fastrlhf::FASTRLHF_ISA
#endif
