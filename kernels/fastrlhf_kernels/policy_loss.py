"""PPO's clipped surrogate loss.

    d     = clamp(logprobs - old_logprobs, -20, 20),   ratio = exp(d)
    loss  = sum over valid max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip)) / normalizer

Shapes: logprobs, old_logprobs, advantages A, mask the same, any; loss and stats are 0-d. Dtypes:
fp32, bf16, fp16 or fp64; arithmetic and results are fp32, or fp64 if an argument is. The gradient
reaches logprobs alone: old_logprobs and advantages are data. `normalizer` defaults to the number of
valid entries; with none the loss, its gradient and the stats are 0, whatever the normalizer.

Stats, over the valid entries of this call, whatever the normalizer: clip_fraction, how often the
clipped term is the larger; approx_kl, the mean of d^2 / 2; ratio_mean; ratio_max.

Promises: NaN in a masked slot reaches neither values nor gradients. Where d is clamped at 20 the
gradient is 0, and all is finite for finite input. Sums are made over fixed tiles, in order.

The gradient is made in the forward pass: -A * ratio where the plain term counts and d is not
clamped, else 0.

Source: Schulman et al. 2017, equation 7; the clamp of d: verl and TRL have one like it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _losses, _native
from ._backends import choose
from ._checks import (
    as_mask,
    check_float,
    check_like,
    check_normalizer,
    check_number,
    compute_dtype,
)
from ._library import register
from ._losses import (
    BLOCK_N,
    BLOCK_TILES,
    SUM_TILE,
    inverse_normalizer,
    n_tiles,
    reference_loss,
    results,
    split_normalizer,
    sum_of_tiles,
    wants_gradient,
)
from ._native import dense, pointer
from ._triton import aligned, exp, jit, launch, on_device, tl

STATS = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max")
MAX_LOG_RATIO = 20.0  # exp(20) is 4.9e8: any such ratio is clipped or a sign of a broken rollout


def policy_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification; arguments as in `policy_loss`."""
    dtype = compute_dtype(logprobs, old_logprobs, advantages)
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    new = torch.where(valid, logprobs, 0.0).to(dtype)
    old = torch.where(valid, old_logprobs.detach(), 0.0).to(dtype)
    A = torch.where(valid, advantages.detach(), 0.0).to(dtype)
    d = (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = d.exp()
    plain = -A * ratio
    clipped = -A * ratio.clamp(1.0 - clip, 1.0 + clip)
    n = valid.sum()
    total = torch.where(clipped > plain, clipped, plain).sum()
    loss = reference_loss(total, n, n, normalizer)
    count = n.clamp(min=1)
    with torch.no_grad():
        ratio = torch.where(valid, ratio, 0.0)
        stats = {
            "clip_fraction": (clipped > plain).sum().to(dtype) / count,
            "approx_kl": (0.5 * d * d).sum() / count,
            "ratio_mean": ratio.sum() / count,
            "ratio_max": ratio.max() if ratio.numel() else ratio.new_zeros(()),
        }
    return loss, stats


FIELDS = 6  # sums a tile: valid, loss, clipped, d^2 / 2, ratio, and the largest ratio


@jit()
def _finish(
    loss, stats, normalizer,  # pointers
    valid, total, clipped, squares, ratios, top, normalizer_value,  # fp64 numbers
    NORMALIZER: tl.constexpr,
):  # fmt: skip
    inverse = inverse_normalizer(normalizer, normalizer_value, valid, valid, NORMALIZER)
    one = tl.maximum(valid, 1.0)
    tl.store(loss, tl.where(valid > 0.0, total * inverse, 0.0))
    tl.store(stats, clipped / one)
    tl.store(stats + 1, squares / one)
    tl.store(stats + 2, ratios / one)
    tl.store(stats + 3, tl.where(ratios != ratios, ratios, top))  # a maximum drops a NaN
    tl.store(stats + 4, inverse)


@jit(any_value=("N",))
def _policy_loss_kernel(
    logprobs, old_logprobs, advantages, mask, normalizer,  # pointers to arguments
    loss, stats, gradient, partials,  # pointers to results; one tile needs no partials
    N,  # size
    low, high, normalizer_value,  # constants
    MAX_LOG_RATIO: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    NORMALIZER: tl.constexpr, ONE_TILE: tl.constexpr, FIELDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < N
    if HAS_MASK:
        valid = tl.load(mask + i, mask=valid, other=0) != 0
    new = tl.load(logprobs + i, mask=valid, other=0.0).to(tl.float32)
    old = tl.load(old_logprobs + i, mask=valid, other=0.0).to(tl.float32)
    a = tl.load(advantages + i, mask=valid, other=0.0).to(tl.float32)
    x = new - old
    d = tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, x)  # a NaN stays
    d = tl.where(d < -MAX_LOG_RATIO, -MAX_LOG_RATIO, d)
    ratio = exp(d)
    plain = -a * ratio
    clipped = -a * tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    is_clipped = clipped > plain  # then the ratio is out of range: gradient 0
    if HAS_GRADIENT:
        moves = valid & ~is_clipped & (tl.abs(x) <= MAX_LOG_RATIO)
        tl.store(gradient + i, tl.where(moves, plain, 0.0), mask=i < N)
    n = tl.sum(valid.to(tl.int32)).to(tl.float64)
    total = tl.sum(tl.where(is_clipped, clipped, plain)).to(tl.float64)
    clips = tl.sum(is_clipped.to(tl.int32)).to(tl.float64)
    squares = tl.sum(0.5 * d * d).to(tl.float64)
    ratios = tl.sum(tl.where(valid, ratio, 0.0)).to(tl.float64)
    top = tl.max(tl.where(valid, ratio, 0.0)).to(tl.float64)
    if ONE_TILE:
        _finish(
            loss, stats, normalizer,
            n, total, clips, squares, ratios, top, normalizer_value,
            NORMALIZER,
        )  # fmt: skip
    else:
        partials += tile * FIELDS
        tl.store(partials, n)
        tl.store(partials + 1, total)
        tl.store(partials + 2, clips)
        tl.store(partials + 3, squares)
        tl.store(partials + 4, ratios)
        tl.store(partials + 5, top)


@jit(any_value=("tiles",))
def _finish_kernel(
    partials, normalizer, loss, stats,  # pointers
    tiles,  # size
    normalizer_value,  # constant
    NORMALIZER: tl.constexpr, FIELDS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    highest = tl.zeros((BLOCK_TILES,), tl.float64)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        top = tl.load(partials + 5 + tile * FIELDS, mask=tile < tiles, other=0.0)
        highest = tl.maximum(highest, top)
    _finish(
        loss, stats, normalizer,
        sum_of_tiles(partials, tiles, FIELDS, BLOCK_TILES),
        sum_of_tiles(partials + 1, tiles, FIELDS, BLOCK_TILES),
        sum_of_tiles(partials + 2, tiles, FIELDS, BLOCK_TILES),
        sum_of_tiles(partials + 3, tiles, FIELDS, BLOCK_TILES),
        sum_of_tiles(partials + 4, tiles, FIELDS, BLOCK_TILES),
        tl.max(highest), normalizer_value,
        NORMALIZER,
    )  # fmt: skip


AOT_CONFIGS = _losses.tile_configs(
    _policy_loss_kernel,
    inputs=("logprobs", "old_logprobs", "advantages"),
    numbers=("low", "high"),
    constants={"MAX_LOG_RATIO": MAX_LOG_RATIO},
    fields=FIELDS,
) + _losses.finish_configs(_finish_kernel, FIELDS, ("tiles",))


def _results(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logprobs, old_logprobs, advantages)
    return results(logprobs, dtype, len(STATS), with_gradient)


def _policy_loss_triton(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: float,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, gradient = _results(logprobs, old_logprobs, advantages, with_gradient)
    N = logprobs.numel()
    tiles = n_tiles(N, BLOCK_N)
    partials = loss.new_empty((tiles, FIELDS), dtype=torch.float64) if tiles > 1 else None
    divisor, number, by = _losses.triton_normalizer(normalizer, normalizer_number, loss.device)
    with on_device(loss):
        launch(_policy_loss_kernel, (tiles,))(
            aligned(logprobs.contiguous()), aligned(old_logprobs.contiguous()),
            aligned(advantages.contiguous()),
            None if mask is None else aligned(mask.contiguous().view(torch.uint8)), divisor,
            loss, stats, gradient if with_gradient else None, partials,
            N,
            1.0 - clip, 1.0 + clip, number,
            MAX_LOG_RATIO=MAX_LOG_RATIO, HAS_MASK=mask is not None, HAS_GRADIENT=with_gradient,
            NORMALIZER=by, ONE_TILE=tiles == 1, FIELDS=FIELDS, BLOCK_N=BLOCK_N,
            num_warps=_losses.NUM_WARPS,
        )  # fmt: skip
        if partials is not None:
            launch(_finish_kernel, (1,))(
                partials, divisor, loss, stats,
                tiles,
                number,
                NORMALIZER=by, FIELDS=FIELDS, BLOCK_TILES=BLOCK_TILES,
            )  # fmt: skip
    return loss, stats, gradient


def _policy_loss_native(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: float,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, gradient = _results(logprobs, old_logprobs, advantages, with_gradient)
    dtype = loss.dtype
    new = dense(logprobs, dtype)
    old = dense(old_logprobs, dtype)
    a = dense(advantages, dtype)
    valid = None if mask is None else mask.contiguous()
    N = new.numel()
    scratch = None
    if N > SUM_TILE:
        scratch = loss.new_empty((n_tiles(N, SUM_TILE), FIELDS), dtype=torch.float64)
    _native.call(
        "policy_loss", loss,
        new.data_ptr(), old.data_ptr(), a.data_ptr(), pointer(valid), pointer(scratch),
        loss.data_ptr(), stats.data_ptr(), gradient.data_ptr() if with_gradient else None,
        N,
        1.0 - clip, 1.0 + clip, *_losses.native_normalizer(normalizer, normalizer_number),
        _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return loss, stats, gradient


def _policy_loss_fake(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: float,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(logprobs, old_logprobs, advantages, with_gradient)


IMPLEMENTATIONS = {"cpu": _policy_loss_native, "triton": _policy_loss_triton}

_policy_loss = register(
    "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, "
    "float clip, Tensor? normalizer, float? normalizer_number, bool with_gradient, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _policy_loss_fake,
    setup_context=_losses.setup_context,
    backward=_losses.backward,
    inputs=(0,),
)


def policy_loss(
    logprobs: Tensor,  # (...)
    old_logprobs: Tensor,  # (...)
    advantages: Tensor,  # (...)
    mask: Tensor | None = None,  # (...)
    *,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss and its statistics.

    Args:
        logprobs: log-probs of the tokens taken, under the policy; any shape, in nats.
        old_logprobs: the same at the time of the rollout.
        advantages: the advantage of each token.
        mask: bool, int or float; nonzero is valid; None: every entry is.
        clip: half-width of the range of the ratio; at least 0.
        normalizer: what the sum is divided by, a number or a 0-d tensor; default: valid entries.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        (loss, stats): loss is 0-d, fp32, or fp64 if an argument is, and differentiable in
        `logprobs`; a second derivative raises. Stats are detached 0-d tensors: clip_fraction,
        approx_kl, ratio_mean, ratio_max.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "policy_loss"
    check_float(op, "logprobs", logprobs)
    check_like(op, "old_logprobs", old_logprobs, logprobs)
    check_like(op, "advantages", advantages, logprobs)
    valid = as_mask(op, "mask", mask, logprobs)
    check_number(op, "clip", clip, low=0.0)
    check_normalizer(op, normalizer)
    backend = choose(op, (logprobs, old_logprobs, advantages), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return policy_loss_ref(
            logprobs, old_logprobs, advantages, valid, clip=clip, normalizer=normalizer
        )
    loss, stats, _ = _policy_loss(
        logprobs, old_logprobs, advantages, valid, clip, *split_normalizer(normalizer),
        wants_gradient(logprobs), backend,
    )  # fmt: skip
    return loss, dict(zip(STATS, stats.unbind(), strict=False))
