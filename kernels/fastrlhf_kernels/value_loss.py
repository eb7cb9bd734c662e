"""PPO's clipped value loss.

    v_c  = clamp(v, v_old - clip, v_old + clip)
    loss = 0.5 * sum over valid max((v - R)^2, (v_c - R)^2) / normalizer      (clip=None: (v - R)^2)

Shapes: values v, old_values v_old, returns R, mask the same, any; loss and stats are 0-d. Dtypes:
fp32, bf16, fp16 or fp64; arithmetic and results are fp32, or fp64 if an argument is. The gradient
reaches values alone. `normalizer` defaults to the number of valid entries; with none the loss, its
gradient and the stats are 0, whatever the normalizer.

Stats, over the valid entries of this call, whatever the normalizer: clip_fraction, how often the
clipped term is the larger; explained_variance, 1 - var(R - v) / var(R), 0 where var(R) is 0.

Promises: NaN in a masked slot reaches neither values nor gradients. Variances are taken about the
mean, so that large returns cost no digits. Sums are made over fixed tiles, in order.

The gradient is made in the forward pass: v - R where the plain term counts, else 0, for a value
whose clipped term is the larger has been clamped.

Source: Schulman et al. 2017's released code (OpenAI baselines, ppo2).
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
from ._moments import merge_moments, moments_ref, tile_moments
from ._native import dense, pointer
from ._triton import aligned, jit, launch, on_device, tl

STATS = ("clip_fraction", "explained_variance")


def value_loss_ref(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification; arguments as in `value_loss`."""
    dtype = compute_dtype(values, old_values, returns)
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    v = torch.where(valid, values, 0.0).to(dtype)
    old = torch.where(valid, old_values.detach(), 0.0).to(dtype)
    R = torch.where(valid, returns.detach(), 0.0).to(dtype)
    plain = (v - R).square()
    clipped = plain if clip is None else (v.clamp(old - clip, old + clip) - R).square()
    n = valid.sum()
    total = 0.5 * torch.where(clipped > plain, clipped, plain).sum()
    loss = reference_loss(total, n, n, normalizer)
    with torch.no_grad():
        error, spread = moments_ref(R - v, valid)[2], moments_ref(R, valid)[2]
        stats = {
            "clip_fraction": (clipped > plain).sum().to(dtype) / n.clamp(min=1),
            "explained_variance": torch.where(spread == 0, 0.0, 1.0 - error / spread).to(dtype),
        }
    return loss, stats


FIELDS = 8  # numbers a tile: loss, clipped, and the moments of R and of R - v


@jit()
def _finish(
    loss, stats, normalizer,  # pointers
    valid, total, clipped, spread, error, normalizer_value,  # fp64 numbers
    NORMALIZER: tl.constexpr,
):  # fmt: skip
    inverse = inverse_normalizer(normalizer, normalizer_value, valid, valid, NORMALIZER)
    explained = 1.0 - error / tl.where(spread == 0.0, 1.0, spread)
    tl.store(loss, tl.where(valid > 0.0, 0.5 * total * inverse, 0.0))
    tl.store(stats, clipped / tl.maximum(valid, 1.0))
    tl.store(stats + 1, tl.where(spread == 0.0, 0.0, explained))
    tl.store(stats + 2, inverse)


@jit(any_value=("N",))
def _value_loss_kernel(
    values, old_values, returns, mask, normalizer,  # pointers to arguments
    loss, stats, gradient, partials,  # pointers to results; one tile needs no partials
    N,  # size
    clip, normalizer_value,  # constants
    HAS_CLIP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    NORMALIZER: tl.constexpr, ONE_TILE: tl.constexpr, FIELDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < N
    if HAS_MASK:
        valid = tl.load(mask + i, mask=valid, other=0) != 0
    v = tl.load(values + i, mask=valid, other=0.0).to(tl.float32)
    r = tl.load(returns + i, mask=valid, other=0.0).to(tl.float32)
    plain = v - r
    clipped = plain
    if HAS_CLIP:
        old = tl.load(old_values + i, mask=valid, other=0.0).to(tl.float32)
        held = tl.where(v > old + clip, old + clip, v)  # a NaN stays
        clipped = tl.where(held < old - clip, old - clip, held) - r
    is_clipped = clipped * clipped > plain * plain  # then the value was clamped: gradient 0
    if HAS_GRADIENT:
        tl.store(gradient + i, tl.where(valid & ~is_clipped, plain, 0.0), mask=i < N)
    error = tl.where(is_clipped, clipped, plain)
    total = tl.sum(error * error).to(tl.float64)
    clips = tl.sum(is_clipped.to(tl.int32)).to(tl.float64)
    n, mean, m2 = tile_moments(r, valid)
    _, error_mean, error_m2 = tile_moments(r - v, valid)
    if ONE_TILE:
        _finish(
            loss, stats, normalizer, n, total, clips, m2, error_m2, normalizer_value, NORMALIZER
        )
    else:
        partials += tile * FIELDS
        tl.store(partials, total)
        tl.store(partials + 1, clips)
        tl.store(partials + 2, n)
        tl.store(partials + 3, mean)
        tl.store(partials + 4, m2)
        tl.store(partials + 5, n)
        tl.store(partials + 6, error_mean)
        tl.store(partials + 7, error_m2)


@jit(any_value=("tiles",))
def _finish_kernel(
    partials, normalizer, loss, stats,  # pointers
    tiles,  # size
    normalizer_value,  # constant
    NORMALIZER: tl.constexpr, FIELDS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    total = sum_of_tiles(partials, tiles, FIELDS, BLOCK_TILES)
    clipped = sum_of_tiles(partials + 1, tiles, FIELDS, BLOCK_TILES)
    valid, _, spread = merge_moments(partials + 2, tiles, FIELDS, BLOCK_TILES)
    _, _, error = merge_moments(partials + 5, tiles, FIELDS, BLOCK_TILES)
    _finish(
        loss, stats, normalizer, valid, total, clipped, spread, error, normalizer_value, NORMALIZER
    )


AOT_CONFIGS = [
    config
    for has_clip in (True, False)
    for config in _losses.tile_configs(
        _value_loss_kernel,
        inputs=("values", "old_values", "returns"),
        numbers=("clip",),
        constants={"HAS_CLIP": has_clip},
        fields=FIELDS,
    )
] + _losses.finish_configs(_finish_kernel, FIELDS, ("tiles",))


def _results(
    values: Tensor, old_values: Tensor, returns: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(values, old_values, returns)
    return results(values, dtype, len(STATS), with_gradient)


def _value_loss_triton(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip: float | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, gradient = _results(values, old_values, returns, with_gradient)
    N = values.numel()
    tiles = n_tiles(N, BLOCK_N)
    partials = loss.new_empty((tiles, FIELDS), dtype=torch.float64) if tiles > 1 else None
    divisor, number, by = _losses.triton_normalizer(normalizer, normalizer_number, loss.device)
    with on_device(loss):
        launch(_value_loss_kernel, (tiles,))(
            aligned(values.contiguous()), aligned(old_values.contiguous()),
            aligned(returns.contiguous()),
            None if mask is None else aligned(mask.contiguous().view(torch.uint8)), divisor,
            loss, stats, gradient if with_gradient else None, partials,
            N,
            clip or 0.0, number,
            HAS_CLIP=clip is not None, HAS_MASK=mask is not None, HAS_GRADIENT=with_gradient,
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


def _value_loss_native(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip: float | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, gradient = _results(values, old_values, returns, with_gradient)
    dtype = loss.dtype
    v = dense(values, dtype)
    old = dense(old_values, dtype)
    r = dense(returns, dtype)
    valid = None if mask is None else mask.contiguous()
    N = v.numel()
    scratch = None
    if N > SUM_TILE:
        scratch = loss.new_empty((n_tiles(N, SUM_TILE), FIELDS), dtype=torch.float64)
    _native.call(
        "value_loss", loss,
        v.data_ptr(), old.data_ptr(), r.data_ptr(), pointer(valid), pointer(scratch),
        loss.data_ptr(), stats.data_ptr(), gradient.data_ptr() if with_gradient else None,
        N,
        -1.0 if clip is None else clip, *_losses.native_normalizer(normalizer, normalizer_number),
        _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return loss, stats, gradient


def _value_loss_fake(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip: float | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(values, old_values, returns, with_gradient)


IMPLEMENTATIONS = {"cpu": _value_loss_native, "triton": _value_loss_triton}

_value_loss = register(
    "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, "
    "float? clip, Tensor? normalizer, float? normalizer_number, bool with_gradient, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _value_loss_fake,
    setup_context=_losses.setup_context,
    backward=_losses.backward,
    inputs=(0,),
)


def value_loss(
    values: Tensor,  # (...)
    old_values: Tensor,  # (...)
    returns: Tensor,  # (...)
    mask: Tensor | None = None,  # (...)
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped value loss and its statistics.

    Args:
        values: the critic's values; any shape.
        old_values: the same at the time of the rollout.
        returns: the targets.
        mask: bool, int or float; nonzero is valid; None: every entry is.
        clip: how far a value may move from its old one, above 0; None: the plain squared error.
        normalizer: what the sum is divided by, a number or a 0-d tensor; default: valid entries.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        (loss, stats): loss is 0-d, fp32, or fp64 if an argument is, and differentiable in `values`;
        a second derivative raises. Stats are detached 0-d tensors: clip_fraction,
        explained_variance.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "value_loss"
    check_float(op, "values", values)
    check_like(op, "old_values", old_values, values)
    check_like(op, "returns", returns, values)
    valid = as_mask(op, "mask", mask, values)
    if clip is not None:
        check_number(op, "clip", clip, low=0.0)
    check_normalizer(op, normalizer)
    backend = choose(op, (values, old_values, returns), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return value_loss_ref(values, old_values, returns, valid, clip=clip, normalizer=normalizer)
    loss, stats, _ = _value_loss(
        values, old_values, returns, valid, clip, *split_normalizer(normalizer),
        wants_gradient(values), backend,
    )  # fmt: skip
    return loss, dict(zip(STATS, stats.unbind(), strict=False))
