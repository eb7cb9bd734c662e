"""What the losses share: the normalizer, the launch of a sum over tiles, and the backward.

A loss's forward op returns (loss, stats, gradient). `stats` holds its statistics and, last, the
inverse of the normalizer; `gradient` is that of the sum before it is divided, in the dtype of the
arithmetic, made in the same pass where one is wanted. The backward is then one multiplication,

    d_input = gradient * (grad_loss * stats[-1])

and no input has to be kept. With no valid entry the inverse normalizer is 0: loss and gradient are
0, whatever the normalizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._library import register_backward
from ._triton import AotConfig, jit, launch, on_device, tl

# Not tuned. A tile's width fixes the order in which a sum is made: another gives other last bits.
BLOCK_N = 1024  # entries a program
NUM_WARPS = 8  # with four, value_loss spills registers on sm_100 under Triton 3.6
BLOCK_TILES = 256  # tiles' sums that the last step adds at once

# What divides the sum: NORMALIZER of the kernels.
BY_COUNT, BY_NUMBER, BY_TENSOR = 0, 1, 2

SUM_TILE = 1024  # entries that the cpu backend's ops sum at once: TILE of csrc/tiles.h


def n_tiles(n: int, tile: int) -> int:
    """Tiles of n entries; one where there are none, since even then the results are written."""
    return max((n + tile - 1) // tile, 1)


def split_normalizer(normalizer: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """The normalizer as an op takes it: (tensor, number), at most one of them there."""
    if isinstance(normalizer, Tensor):
        return normalizer.detach(), None
    return None, None if normalizer is None else float(normalizer)


def wants_gradient(x: Tensor) -> bool:
    """Whether the forward must make the gradient of `x`."""
    return x.requires_grad and torch.is_grad_enabled()


def results(
    x: Tensor, dtype: torch.dtype, n_stats: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the loss, `n_stats` stats and the inverse normalizer, and the gradient of `x`."""
    # Naming a dtype or a shape costs up to a microsecond an allocation, more than the work of 96
    # tokens: so neither is named where it need not be.
    if x.dtype is not dtype:
        stats = x.new_empty(n_stats + 1, dtype=dtype)
        gradient = stats.new_empty(x.shape if with_gradient else 0)
    else:
        stats = x.new_empty(n_stats + 1)
        if not with_gradient:
            gradient = x.new_empty(0)
        elif x.is_contiguous():
            gradient = torch.empty_like(x)
        else:
            gradient = x.new_empty(x.shape)
    return stats.new_empty(()), stats, gradient


def native_normalizer(tensor: Tensor | None, number: float | None) -> tuple[int, float]:
    """(given, value) for csrc/; reads the tensor, which is free on a CPU."""
    if tensor is not None:
        return 1, float(tensor)
    return (0, 1.0) if number is None else (1, number)


def triton_normalizer(
    tensor: Tensor | None, number: float | None, device: torch.device
) -> tuple[Tensor | None, float, int]:
    """(pointer, value, NORMALIZER) for the kernels."""
    if tensor is not None:
        return tensor.to(device=device, dtype=torch.float32), 1.0, BY_TENSOR
    return (None, 1.0, BY_COUNT) if number is None else (None, number, BY_NUMBER)


def reference_loss(
    total: Tensor, valid: Tensor, default: Tensor | int, normalizer: float | Tensor | None
) -> Tensor:
    """The references' division of a sum; 0 where `valid`, how many terms it has, is 0."""
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach()
    divided = total / (default if normalizer is None else normalizer)
    # A 0-d normalizer takes part in promotion, as a number does not; the loss has its own dtype.
    return torch.where(valid > 0, divided.to(total.dtype), 0.0)


@jit()
def inverse_normalizer(normalizer, value, count, valid, NORMALIZER: tl.constexpr):
    """1 / the normalizer in fp64, 0 where nothing is valid."""
    divisor = count
    if NORMALIZER == 1:
        divisor = count * 0.0 + value
    if NORMALIZER == 2:
        divisor = tl.load(normalizer).to(tl.float64)
    return tl.where(valid > 0.0, 1.0 / tl.where(valid > 0.0, divisor, 1.0), 0.0)


@jit()
def sum_of_tiles(partials, n_tiles, FIELDS: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """The sum of one field over the tiles: `partials` points to it in the first of them."""
    lane = tl.arange(0, BLOCK_TILES)
    total = tl.zeros((BLOCK_TILES,), tl.float64)
    for first in range(0, n_tiles, BLOCK_TILES):
        tile = first + lane
        total += tl.load(partials + tile * FIELDS, mask=tile < n_tiles, other=0.0)
    return tl.sum(total)


@jit(any_value=("N",))
def _scale_kernel(
    grad_loss, inverse, gradient, out,  # pointers
    N,  # size
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(grad_loss) * tl.load(inverse)
    g = tl.load(gradient + i, mask=i < N, other=0.0)
    tl.store(out + i, g * factor, mask=i < N)


# Each loss's AOT_CONFIGS ends with these: it ships the kernel.
SCALE_CONFIGS = [
    AotConfig(
        f"backward, {dtype}",
        _scale_kernel,
        dict.fromkeys(("grad_loss", "inverse", "gradient"), "*fp32")
        | {"out": f"*{dtype}", "N": "i32"},
        {"BLOCK_N": BLOCK_N},
    )
    for dtype in ("fp32", "bf16")
]


def tile_configs(
    kernel: Any,
    *,
    inputs: tuple[str, ...],
    numbers: tuple[str, ...],
    constants: Mapping[str, Any],
    fields: int,
) -> list[AotConfig]:
    """The ways in which a loss's kernel over tiles ships.

    `inputs` are its floating tensors, `numbers` its fp32 scalars beside the normalizer, `constants`
    its constants of its own.
    """
    configs = []
    for dtype, has_mask, has_gradient, normalizer, one_tile in (
        ("fp32", True, True, BY_NUMBER, True),
        ("fp32", True, True, BY_NUMBER, False),
        ("bf16", False, False, BY_COUNT, True),
        ("bf16", True, True, BY_TENSOR, False),
    ):
        optional = {
            "mask": "*u8" if has_mask else None,
            "gradient": "*fp32" if has_gradient else None,
            "normalizer": "*fp32" if normalizer == BY_TENSOR else None,
            "partials": None if one_tile else "*fp64",
        }
        configs.append(
            AotConfig(
                f"{dtype}, normalizer {normalizer}, {'one tile' if one_tile else 'tiles'}, "
                f"{', '.join(f'{k} {v}' for k, v in constants.items())}",
                kernel,
                dict.fromkeys(inputs, f"*{dtype}")
                | dict.fromkeys(("loss", "stats"), "*fp32")
                | dict.fromkeys((*numbers, "normalizer_value"), "fp32")
                | {"N": "i32"}
                | {name: kind for name, kind in optional.items() if kind is not None},
                {"HAS_MASK": has_mask, "HAS_GRADIENT": has_gradient, "NORMALIZER": normalizer}
                | {"ONE_TILE": one_tile, "FIELDS": fields, "BLOCK_N": BLOCK_N}
                | dict(constants)
                | {name: None for name, kind in optional.items() if kind is None},
                num_warps=NUM_WARPS,
            )
        )
    return configs


def finish_configs(finish: Any, fields: int, sizes: tuple[str, ...]) -> list[AotConfig]:
    """The ways in which a loss's last step ships, and its backward."""
    configs = []
    for normalizer in (BY_COUNT, BY_NUMBER, BY_TENSOR):
        tensor = {"normalizer": "*fp32"} if normalizer == BY_TENSOR else {}
        configs.append(
            AotConfig(
                f"finish, normalizer {normalizer}",
                finish,
                {"partials": "*fp64", "loss": "*fp32", "stats": "*fp32"}
                | dict.fromkeys(sizes, "i32")
                | {"normalizer_value": "fp32"}
                | tensor,
                {"NORMALIZER": normalizer, "FIELDS": fields, "BLOCK_TILES": BLOCK_TILES}
                | ({} if tensor else {"normalizer": None}),
            )
        )
    return configs + SCALE_CONFIGS


def _scale_triton(grad_loss: Tensor, stats: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(gradient, dtype=dtype)
    N = out.numel()
    if N == 0:
        return out
    with on_device(out):
        launch(_scale_kernel, (n_tiles(N, BLOCK_N),))(
            grad_loss.contiguous(), stats[-1:], gradient, out, N, BLOCK_N=BLOCK_N
        )
    return out


def _scale_native(grad_loss: Tensor, stats: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    wide = gradient.dtype
    if wide == torch.float64 and dtype != torch.float64:
        return _scale_native(grad_loss, stats, gradient, torch.float64).to(dtype)
    out = torch.empty_like(gradient) if dtype is wide else torch.empty_like(gradient, dtype=dtype)
    _native.call(
        "loss_backward", out,
        grad_loss.data_ptr(), stats.data_ptr() + (stats.numel() - 1) * stats.element_size(),
        gradient.data_ptr(), out.data_ptr(),
        out.numel(),
        _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return out


def _scale_fake(
    grad_loss: Tensor, stats: Tensor, gradient: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


_scale = register_backward(
    "loss_backward(Tensor grad_loss, Tensor stats, Tensor gradient, ScalarType dtype, "
    "str backend) -> Tensor",
    {"cpu": _scale_native, "triton": _scale_triton, "cuda": _scale_native},
    _scale_fake,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps what the backward needs; the differentiable input of a loss is its first."""
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]


def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None]:
    """The gradient of the first input."""
    if grad_loss is None:
        return (None,)
    stats, gradient = ctx.saved_tensors
    return (_scale(grad_loss, stats, gradient, ctx.dtype, ctx.backend),)
