"""The K-wise ranking loss of a reward model, over ragged groups of ranked outputs.

    loss = -1/G * sum over groups of 1/C(K, 2) * sum over decided pairs of log sigmoid(s_w - s_l)

A pair of outputs of one group is decided if their ranks differ; w is the one of lower rank. Pairs
of equal rank are ties: they add nothing, but C(K, 2) counts them. A group of K < 2 contributes 0.

Shapes: scores, ranks (sum K,), group_sizes (G,) int64 or int32, adding up to sum K; loss and stats
are 0-d. Dtypes: scores fp32, bf16, fp16 or fp64; arithmetic and results are fp32, or fp64 for fp64
scores; ranks int64 or int32, any values, only their order counts. The gradient reaches scores.
`normalizer` defaults to G; with no decided pair the loss and its gradient are 0, whatever it is.

Stats: pairs, the number of decided pairs; pair_accuracy, the part of them with s_w > s_l, 0 where
there are none.

Promises: log sigmoid(x) is -(max(-x, 0) + log1p(exp(-|x|))), exact at any gap; a group's sums are
made in a fixed order and do not depend on the other groups. The gradient, sigmoid(-x) a pair, is
made in the forward pass.

Source: Ouyang et al. 2022, equation 1; ties: outputs that labelers rank equal are not compared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import _losses, _native
from ._backends import choose
from ._checks import (
    check_device,
    check_dims,
    check_float,
    check_integer,
    check_normalizer,
    check_shape,
    check_values,
    compute_dtype,
)
from ._library import register
from ._losses import (
    BLOCK_TILES,
    inverse_normalizer,
    reference_loss,
    results,
    split_normalizer,
    sum_of_tiles,
    wants_gradient,
)
from ._native import dense, pointer
from ._triton import AotConfig, exp, jit, launch, log1p, on_device, tl

STATS = ("pair_accuracy", "pairs")
BLOCK_K = 16  # pairs are walked in squares of this side; InstructGPT's K is 4 to 9. Not tuned.
NUM_WARPS = 2
NATIVE_GROUPS = 64  # that csrc/ranking_loss.cpp needs no scratch for


def ranking_loss_ref(
    scores: Tensor,
    ranks: Tensor,
    group_sizes: Tensor,
    *,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification; arguments as in `ranking_loss`. Holds every pair of outputs."""
    dtype = compute_dtype(scores)
    s = scores.to(dtype)
    G = group_sizes.shape[0]
    group = torch.repeat_interleave(
        torch.arange(G, device=scores.device), group_sizes, output_size=scores.shape[0]
    )
    decided = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])
    margin = torch.where(decided, s[:, None] - s[None, :], 0.0)  # of the winner, along rows
    all_pairs = (group_sizes * (group_sizes - 1) // 2).clamp(min=1).to(dtype)
    # threshold 50: past it, log1p(exp(x)) is x in fp64 too
    cost = softplus(-margin, threshold=50.0) / all_pairs[group][:, None]
    pairs = decided.sum()
    total = torch.where(decided, cost, 0.0).sum()
    loss = reference_loss(total, pairs, G, normalizer)
    with torch.no_grad():
        accuracy = (margin > 0).sum().to(dtype) / pairs.clamp(min=1)
    return loss, {"pair_accuracy": accuracy, "pairs": pairs.to(dtype)}


def _check_sizes(scores: Tensor, group_sizes: Tensor) -> None:
    total = scores.shape[0]
    each = (group_sizes >= 0) & (group_sizes <= total)  # or their sum might wrap around
    fit = each.all() & (group_sizes.sum() == total)
    check_values(
        "ranking_loss", "group_sizes", fit, "at least 0 and add up to the number of scores"
    )


FIELDS = 3  # sums a group: loss, decided pairs, rightly ordered pairs


@jit(any_value=("G", "total"))
def _ranking_loss_kernel(
    scores, ranks, group_sizes,  # pointers to arguments
    gradient, partials,  # pointers to results
    G, total,  # sizes
    HAS_GRADIENT: tl.constexpr, FIELDS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    before = tl.zeros((BLOCK_TILES,), tl.int64)
    for first in range(0, group, BLOCK_TILES):
        g = first + tl.arange(0, BLOCK_TILES)
        before += tl.load(group_sizes + g, mask=g < group, other=0).to(tl.int64)
    # Sizes that do not fit read nothing out of bounds; their result means nothing.
    start = tl.minimum(tl.maximum(tl.sum(before), 0), total)
    K = tl.minimum(tl.load(group_sizes + group).to(tl.int64), total - start)
    scores += start
    ranks += start
    all_pairs = tl.maximum(K.to(tl.float32) * (K - 1).to(tl.float32) * 0.5, 1.0)
    lane = tl.arange(0, BLOCK_K)
    loss = tl.zeros((BLOCK_K,), tl.float64)
    pairs = tl.zeros((BLOCK_K,), tl.int64)
    right = tl.zeros((BLOCK_K,), tl.int64)
    for first_i in range(0, K, BLOCK_K):
        i = first_i + lane
        s_i = tl.load(scores + i, mask=i < K, other=0.0).to(tl.float32)
        rank_i = tl.load(ranks + i, mask=i < K, other=0)
        d_i = tl.zeros((BLOCK_K,), tl.float32)
        for first_j in range(0, K, BLOCK_K):
            j = first_j + lane
            s_j = tl.load(scores + j, mask=j < K, other=0.0).to(tl.float32)
            rank_j = tl.load(ranks + j, mask=j < K, other=0)
            inside = (i < K)[:, None] & (j < K)[None, :]
            wins = inside & (rank_i[:, None] < rank_j[None, :])
            loses = inside & (rank_i[:, None] > rank_j[None, :])
            gap = s_i[:, None] - s_j[None, :]
            margin = tl.where(wins, gap, tl.where(loses, -gap, 0.0))  # of winner over loser
            e = exp(-tl.abs(margin))
            # A NaN margin stays one: it is neither above 0 nor below.
            cost = tl.where(margin > 0.0, 0.0, -margin) + log1p(e)
            loss += tl.sum(tl.where(wins, cost, 0.0), axis=1).to(tl.float64)
            pairs += tl.sum(wins.to(tl.int32), axis=1).to(tl.int64)
            right += tl.sum((wins & (margin > 0.0)).to(tl.int32), axis=1).to(tl.int64)
            pull = tl.where(margin > 0.0, e, 1.0) / (1.0 + e)  # sigmoid(-margin)
            d_i += tl.sum(tl.where(wins, -pull, tl.where(loses, pull, 0.0)), axis=1)
        if HAS_GRADIENT:
            tl.store(gradient + start + i, d_i / all_pairs, mask=i < K)
    partials += group.to(tl.int64) * FIELDS
    tl.store(partials, tl.sum(loss) / all_pairs)
    tl.store(partials + 1, tl.sum(pairs).to(tl.float64))
    tl.store(partials + 2, tl.sum(right).to(tl.float64))


@jit(any_value=("G",))
def _finish_kernel(
    partials, normalizer, loss, stats,  # pointers
    G,  # size
    normalizer_value,  # constant
    NORMALIZER: tl.constexpr, FIELDS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    total = sum_of_tiles(partials, G, FIELDS, BLOCK_TILES)
    pairs = sum_of_tiles(partials + 1, G, FIELDS, BLOCK_TILES)
    right = sum_of_tiles(partials + 2, G, FIELDS, BLOCK_TILES)
    groups = pairs * 0.0 + G
    inverse = inverse_normalizer(normalizer, normalizer_value, groups, pairs, NORMALIZER)
    tl.store(loss, tl.where(pairs > 0.0, total * inverse, 0.0))
    tl.store(stats, right / tl.maximum(pairs, 1.0))
    tl.store(stats + 1, pairs)
    tl.store(stats + 2, inverse)


AOT_CONFIGS = [
    AotConfig(
        f"{dtype}, {integer}, {'with' if has_gradient else 'no'} gradient",
        _ranking_loss_kernel,
        {"scores": f"*{dtype}", "ranks": f"*{integer}", "group_sizes": f"*{integer}"}
        | ({"gradient": "*fp32"} if has_gradient else {})
        | {"partials": "*fp64", "G": "i32", "total": "i32"},
        {"HAS_GRADIENT": has_gradient, "FIELDS": FIELDS}
        | {"BLOCK_K": BLOCK_K, "BLOCK_TILES": BLOCK_TILES}
        | ({} if has_gradient else {"gradient": None}),
        num_warps=NUM_WARPS,
    )
    for dtype, integer in (("fp32", "i64"), ("bf16", "i32"))
    for has_gradient in (True, False)
] + _losses.finish_configs(_finish_kernel, FIELDS, ("G",))


def _results(scores: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    return results(scores, compute_dtype(scores), len(STATS), with_gradient)


def _ranking_loss_triton(
    scores: Tensor,
    ranks: Tensor,
    group_sizes: Tensor,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sizes(scores, group_sizes)
    loss, stats, gradient = _results(scores, with_gradient)
    G = group_sizes.shape[0]
    partials = loss.new_empty((G, FIELDS), dtype=torch.float64)
    divisor, number, by = _losses.triton_normalizer(normalizer, normalizer_number, loss.device)
    with on_device(loss):
        if G > 0:
            launch(_ranking_loss_kernel, (G,))(
                scores.contiguous(), ranks.contiguous(), group_sizes.contiguous(),
                gradient if with_gradient else None, partials,
                G, scores.shape[0],
                HAS_GRADIENT=with_gradient, FIELDS=FIELDS, BLOCK_K=BLOCK_K,
                BLOCK_TILES=BLOCK_TILES, num_warps=NUM_WARPS,
            )  # fmt: skip
        launch(_finish_kernel, (1,))(
            partials, divisor, loss, stats,
            G,
            number,
            NORMALIZER=by, FIELDS=FIELDS, BLOCK_TILES=BLOCK_TILES,
        )  # fmt: skip
    return loss, stats, gradient


def _ranking_loss_native(
    scores: Tensor,
    ranks: Tensor,
    group_sizes: Tensor,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, gradient = _results(scores, with_gradient)
    dtype = loss.dtype
    s = dense(scores, dtype)
    r = dense(ranks, torch.int64)
    sizes = dense(group_sizes, torch.int64)
    G = sizes.shape[0]
    scratch = None
    if G > NATIVE_GROUPS:
        scratch = loss.new_empty((G, FIELDS + 1), dtype=torch.float64)
    _native.call(
        "ranking_loss", loss,
        s.data_ptr(), r.data_ptr(), sizes.data_ptr(), pointer(scratch),
        loss.data_ptr(), stats.data_ptr(), gradient.data_ptr() if with_gradient else None,
        G, s.shape[0],
        *_losses.native_normalizer(normalizer, normalizer_number), _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return loss, stats, gradient


def _ranking_loss_fake(
    scores: Tensor,
    ranks: Tensor,
    group_sizes: Tensor,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(scores, with_gradient)


def _ranking_loss_cuda(
    scores: Tensor,
    ranks: Tensor,
    group_sizes: Tensor,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sizes(scores, group_sizes)
    loss, stats, gradient = _results(scores, with_gradient)
    s = dense(scores, loss.dtype)
    r = dense(ranks, torch.int64)
    sizes = dense(group_sizes, torch.int64)
    G = sizes.shape[0]
    scratch = loss.new_empty((G, FIELDS), dtype=torch.float64)
    divisor, number, by = _losses.triton_normalizer(normalizer, normalizer_number, loss.device)
    _native.call(
        "ranking_loss", loss,
        s.data_ptr(), r.data_ptr(), sizes.data_ptr(), scratch.data_ptr(),
        loss.data_ptr(), stats.data_ptr(), gradient.data_ptr() if with_gradient else None,
        G, s.shape[0],
        int(by != _losses.BY_COUNT), number, pointer(divisor), _native.DTYPE_TAGS[loss.dtype],
    )  # fmt: skip
    return loss, stats, gradient


IMPLEMENTATIONS = {
    "cpu": _ranking_loss_native,
    "triton": _ranking_loss_triton,
    "cuda": _ranking_loss_cuda,
}

_ranking_loss = register(
    "ranking_loss(Tensor scores, Tensor ranks, Tensor group_sizes, Tensor? normalizer, "
    "float? normalizer_number, bool with_gradient, str backend) -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _ranking_loss_fake,
    setup_context=_losses.setup_context,
    backward=_losses.backward,
    inputs=(0,),
)


def ranking_loss(
    scores: Tensor,  # (sum K,)
    ranks: Tensor,  # (sum K,)
    group_sizes: Tensor,  # (G,)
    *,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward model's K-wise ranking loss and its statistics.

    Args:
        scores: (sum K,), the scores of the outputs, group after group.
        ranks: (sum K,), int64 or int32; lower is better, equal is a tie.
        group_sizes: (G,), int64 or int32, K of each group; at least 0, adding up to sum K.
        normalizer: what the sum over groups is divided by, a number or a 0-d tensor; default: G.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        (loss, stats): loss is 0-d, in nats, fp32, or fp64 for fp64 scores, and differentiable in
        `scores`; a second derivative raises. Stats are detached 0-d tensors: pair_accuracy, pairs.

    Raises:
        ValueError: a shape, dtype, device, setting or size is wrong (sizes: for CPU tensors; on a
            GPU with FASTRLHF_DEBUG=1).
    """
    op = "ranking_loss"
    check_float(op, "scores", scores)
    check_dims(op, "scores", scores, 1, "(sum K,)")
    check_integer(op, "ranks", ranks)
    check_shape(op, "ranks", ranks, scores.shape)
    check_device(op, "ranks", ranks, scores.device)
    check_integer(op, "group_sizes", group_sizes)
    check_dims(op, "group_sizes", group_sizes, 1, "(G,)")
    check_device(op, "group_sizes", group_sizes, scores.device)
    check_normalizer(op, normalizer)
    backend = choose(op, (scores,), backend, IMPLEMENTATIONS)
    if backend == "ref":
        _check_sizes(scores, group_sizes)
        return ranking_loss_ref(scores, ranks, group_sizes, normalizer=normalizer)
    loss, stats, _ = _ranking_loss(
        scores, ranks, group_sizes, *split_normalizer(normalizer), wants_gradient(scores), backend
    )
    return loss, dict(zip(STATS, stats.unbind(), strict=False))
