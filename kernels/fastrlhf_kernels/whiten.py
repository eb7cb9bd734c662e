"""Masked whitening: zero mean and unit variance over the valid entries.

    mean = sum x / n,   var = sum (x - mean)^2 / n     (unbiased: / (n - 1))
    y    = (x - mean) * rsqrt(var + eps)   [+ mean, if not shift_mean]

Shapes: x any, mask like x; y like x. Dtypes: fp32, bf16, fp16 or fp64; arithmetic and the result
are fp32, or fp64 for fp64 x. No gradient: y is data to PPO, and comes out detached.

Promises: masked slots are 0, and NaN there reaches nothing. No valid entry: zeros. One: var is 0,
unbiased or not. Where var + eps is 0, x - mean is 0 and stays 0. The moments are kept in fp64, as
sums of differences, so that large offsets cost nothing.

group: n, the mean and the variance are those of all ranks' entries together. Ranks exchange their
moments, three numbers each, once, and merge them in rank order: all get the same bits.

Source: Ziegler et al. 2019, the code released with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import as_mask, check_flag, check_float, check_number, compute_dtype
from ._groups import Group, gather
from ._library import register
from ._losses import BLOCK_N, BLOCK_TILES, SUM_TILE, n_tiles
from ._moments import merge_moments, merge_ref, moments_ref, tile_moments
from ._native import pointer
from ._triton import AotConfig, aligned, jit, launch, on_device, tl


def whiten_ref(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    group: Group | None = None,
) -> Tensor:
    """The specification; arguments as in `whiten`."""
    dtype = compute_dtype(x)
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    parts = moments_ref(x, valid)[None]
    n, mean, m2 = merge_ref(parts if group is None else gather(parts[0], group))
    spread = torch.where(n > 1, m2 / (n - 1 if unbiased else n).clamp(min=1), 0.0) + eps
    scale = torch.where(spread == 0, 0.0, spread.rsqrt())
    y = (x.detach().double() - mean).to(dtype) * scale.to(dtype)
    return torch.where(valid, y if shift_mean else y + mean.to(dtype), 0.0)


@jit()
def _load(x, mask, i, N, HAS_MASK: tl.constexpr):
    valid = i < N
    if HAS_MASK:
        valid = tl.load(mask + i, mask=i < N, other=0) != 0
    return tl.load(x + i, mask=valid, other=0.0).to(tl.float32), valid


@jit()
def _store_moments(moments, n, mean, m2):
    tl.store(moments, n)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, m2)


@jit(any_value=("N",))
def _moments_kernel(
    x, mask, partials,  # pointers
    N,  # size
    HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    values, valid = _load(x, mask, tile * BLOCK_N + tl.arange(0, BLOCK_N), N, HAS_MASK)
    n, mean, m2 = tile_moments(values, valid)
    _store_moments(partials + 3 * tile, n, mean, m2)


@jit(any_value=("P",))
def _merge_kernel(
    parts, moments,  # pointers
    P,  # size
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    n, mean, m2 = merge_moments(parts, P, 3, BLOCK_TILES)
    _store_moments(moments, n, mean, m2)


@jit(any_value=("N", "P"))
def _whiten_kernel(
    x, mask, parts, out,  # pointers; without parts, the only tile's moments are taken
    N, P,  # sizes
    eps,  # constant
    HAS_MASK: tl.constexpr, HAS_PARTS: tl.constexpr, SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    values, valid = _load(x, mask, i, N, HAS_MASK)
    if HAS_PARTS:
        n, mean, m2 = merge_moments(parts, P, 3, BLOCK_TILES)
    else:
        n, mean, m2 = tile_moments(values, valid)
    divisor = n
    if UNBIASED:
        divisor = n - 1.0
    spread = tl.where(n > 1.0, m2 / tl.where(n > 1.0, divisor, 1.0), 0.0) + eps
    scale = tl.where(spread == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(spread == 0.0, 1.0, spread)))
    # The mean in two parts: a large one is not a number of fp32, and x - mean is exact.
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    y = ((values - high) - low) * scale.to(tl.float32)
    if not SHIFT_MEAN:
        y += high
    tl.store(out + i, tl.where(valid, y, 0.0), mask=i < N)


def _aot_configs() -> list[AotConfig]:
    merge = AotConfig(
        "merge",
        _merge_kernel,
        {"parts": "*fp64", "moments": "*fp64", "P": "i32"},
        {"BLOCK_TILES": BLOCK_TILES},
    )
    configs = [merge]
    for dtype, has_mask in (("fp32", False), ("bf16", True)):
        pointers = {"x": f"*{dtype}"} | ({"mask": "*u8"} if has_mask else {})
        flags = {"HAS_MASK": has_mask, "BLOCK_N": BLOCK_N} | ({} if has_mask else {"mask": None})
        name = f"{dtype}, {'mask' if has_mask else 'no mask'}"
        configs.append(
            AotConfig(
                f"moments, {name}",
                _moments_kernel,
                pointers | {"partials": "*fp64", "N": "i32"},
                flags,
            )
        )
        sizes = {"out": "*fp32", "N": "i32", "P": "i32", "eps": "fp32"}
        for has_parts in (False, True):
            settings = {"HAS_PARTS": has_parts, "SHIFT_MEAN": has_mask, "UNBIASED": has_parts}
            configs.append(
                AotConfig(
                    f"{'parts' if has_parts else 'one tile'}, {name}",
                    _whiten_kernel,
                    pointers | sizes | ({"parts": "*fp64"} if has_parts else {}),
                    flags
                    | settings
                    | {"BLOCK_TILES": BLOCK_TILES}
                    | ({} if has_parts else {"parts": None}),
                )
            )
    return configs


AOT_CONFIGS = _aot_configs()


def _result(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=compute_dtype(x))


def _moments_triton(x: Tensor, mask: Tensor | None) -> Tensor:
    """(tiles, 3): the moments of each tile."""
    N = x.numel()
    partials = x.new_empty((n_tiles(N, BLOCK_N), 3), dtype=torch.float64)
    with on_device(x):
        launch(_moments_kernel, (partials.shape[0],))(
            x, mask, partials, N, HAS_MASK=mask is not None, BLOCK_N=BLOCK_N
        )
    return partials


def _dense_triton(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    valid = None if mask is None else aligned(mask.contiguous().view(torch.uint8))
    return aligned(x.contiguous()), valid


def _merged_triton(parts: Tensor) -> Tensor:
    """(3,): the moments of (P, 3) parts together."""
    moments = parts.new_empty(3)
    with on_device(parts):
        launch(_merge_kernel, (1,))(parts, moments, parts.numel() // 3, BLOCK_TILES=BLOCK_TILES)
    return moments


def _whiten_moments_triton(x: Tensor, mask: Tensor | None) -> Tensor:
    return _merged_triton(_moments_triton(*_dense_triton(x, mask)))


def apply_triton(
    x: Tensor,
    mask: Tensor | None,
    parts: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    """`x` whitened by moments in (P, 3) parts, or by its own."""
    out = _result(x)
    N = x.numel()
    if N == 0:
        return out
    x, mask = _dense_triton(x, mask)
    tiles = n_tiles(N, BLOCK_N)
    if parts is None and tiles > 1:
        parts = _moments_triton(x, mask)
    if parts is not None and parts.numel() > 3 * BLOCK_TILES:
        parts = _merged_triton(parts)  # or each of many programs would read many parts
    with on_device(x):
        launch(_whiten_kernel, (tiles,))(
            x, mask, parts, out,
            N, 0 if parts is None else parts.numel() // 3,
            eps,
            HAS_MASK=mask is not None, HAS_PARTS=parts is not None, SHIFT_MEAN=shift_mean,
            UNBIASED=unbiased, BLOCK_N=BLOCK_N, BLOCK_TILES=BLOCK_TILES,
        )  # fmt: skip
    return out


def _whiten_triton(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    return apply_triton(x, mask, None, shift_mean, unbiased, eps)


def _whiten_moments_native(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.contiguous()
    valid = None if mask is None else mask.contiguous()
    N = x.numel()
    scratch = x.new_empty((n_tiles(N, SUM_TILE), 3), dtype=torch.float64)
    moments = scratch.new_empty(3)
    _native.call(
        "whiten_moments", x,
        pointer(x), pointer(valid), pointer(scratch), pointer(moments),
        N,
        _native.DTYPE_TAGS[x.dtype],
    )  # fmt: skip
    return moments


def _apply_native(
    x: Tensor, mask: Tensor | None, parts: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    out = _result(x)
    x = x.contiguous()
    valid = None if mask is None else mask.contiguous()
    _native.call(
        "whiten_apply", x,
        pointer(x), pointer(valid), pointer(parts), pointer(out),
        x.numel(), parts.numel() // 3,
        int(shift_mean), int(unbiased), eps, _native.DTYPE_TAGS[x.dtype],
    )  # fmt: skip
    return out


def _whiten_native(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    x = x.contiguous()
    return _apply_native(x, mask, _whiten_moments_native(x, mask), shift_mean, unbiased, eps)


def _whiten_fake(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float, backend: str
) -> Tensor:
    return _result(x)


def _moments_fake(x: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def _apply_fake(
    x: Tensor,
    mask: Tensor | None,
    parts: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return _result(x)


IMPLEMENTATIONS = {"cpu": _whiten_native, "triton": _whiten_triton}

_whiten = register(
    "whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps, str backend) "
    "-> Tensor",
    IMPLEMENTATIONS,
    _whiten_fake,
)
# With a group the two steps are apart, and the ranks' moments are exchanged between them.
_whiten_moments = register(
    "whiten_moments(Tensor x, Tensor? mask, str backend) -> Tensor",
    {"cpu": _whiten_moments_native, "triton": _whiten_moments_triton},
    _moments_fake,
)
_whiten_apply = register(
    "whiten_apply(Tensor x, Tensor? mask, Tensor parts, bool shift_mean, bool unbiased, float eps, "
    "str backend) -> Tensor",
    {"cpu": _apply_native, "triton": apply_triton},
    _apply_fake,
)


def whiten(
    x: Tensor,  # (...)
    mask: Tensor | None = None,  # (...)
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    group: Group | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x` scaled to unit variance, and to zero mean if `shift_mean`, over its valid entries.

    Args:
        x: any shape, fp32, bf16, fp16 or fp64; not modified.
        mask: like `x`, bool, int or float; nonzero is valid; None: every entry is.
        shift_mean: False adds the mean back.
        unbiased: divide the squares by n - 1, not n.
        eps: added to the variance; at least 0.
        group: process group whose ranks' entries are whitened together.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        A tensor like `x`, 0 at masked slots, detached; fp32, or fp64 for fp64 `x`.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "whiten"
    check_float(op, "x", x)
    valid = as_mask(op, "mask", mask, x)
    check_flag(op, "shift_mean", shift_mean)
    check_flag(op, "unbiased", unbiased)
    check_number(op, "eps", eps, low=0.0)
    backend = choose(op, (x,), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return whiten_ref(x, valid, shift_mean=shift_mean, unbiased=unbiased, eps=eps, group=group)
    if group is None:
        return _whiten(x, valid, shift_mean, unbiased, eps, backend)
    parts = gather(_whiten_moments(x, valid, backend), group)
    return _whiten_apply(x, valid, parts, shift_mean, unbiased, eps, backend)
