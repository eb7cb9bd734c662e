"""Argument checks shared by the ops: each raises one error that names the op and the argument.

Checks of shapes, dtypes, devices and Python numbers are done in the public function and are traced
away by torch.compile. Checks of *values* (labels, sizes, offsets) read data: they are done for CPU
tensors always, and for GPU tensors only with `FASTRLHF_DEBUG=1`, since they synchronise. They
belong in an op's body, or before a call of the reference, never where a compiler traces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _env

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any argument is fp64, else fp32: the dtype of the arithmetic and of the results."""
    for x in tensors:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


# A check that passes costs a call or two of Python: what is right is asked first, at once, and the
# messages are made by functions that run on failure alone.


def check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def check_float(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        check_tensor(op, name, x)
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {x.dtype}")


def check_integer(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        check_tensor(op, name, x)
    if x.dtype not in INTEGERS:
        raise ValueError(f"{op}: {name} must be int64 or int32, got {x.dtype}")


def check_dims(op: str, name: str, x: Tensor, dims: int, wanted: str) -> None:
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(x.shape)}")


def check_shape(op: str, name: str, x: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def check_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def check_like(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """A floating tensor with the shape and device of `like`."""
    if (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.shape == like.shape
        and x.device == like.device
    ):
        return
    check_float(op, name, x)
    check_shape(op, name, x, like.shape)
    check_device(op, name, x, like.device)


def check_number(
    op: str,
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    """A Python number in [low, high], or (low, high] with `open_low`; NaN is refused."""
    if type(value) is float and low < value <= high:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{op}: {name} must be a number, got {type(value).__name__}")
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:
        left = "(" if open_low else "["
        raise ValueError(f"{op}: {name} must be in {left}{low}, {high}], got {value}")


def check_finite(op: str, name: str, value: float) -> None:
    """A number that `check_number` took is not infinite: where infinity would make NaN."""
    if math.isinf(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_int(op: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{op}: {name} must be an integer, got {value!r}")


def check_flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be True or False, got {value!r}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_normalizer(op: str, normalizer: float | Tensor | None) -> None:
    if normalizer is None:
        return
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"{op}: normalizer must be a number or a 0-d tensor, "
                f"got shape {tuple(normalizer.shape)}"
            )
        if normalizer.dtype.is_complex:
            raise ValueError(f"{op}: normalizer must be bool, int or float, got {normalizer.dtype}")
    else:
        check_number(op, "normalizer", normalizer, low=0.0, open_low=True)


def as_mask(op: str, name: str, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """`mask` (bool, int or float; nonzero is valid) as bool, shaped and placed like `like`."""
    if mask is None:
        return None
    if (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.shape == like.shape
        and mask.device == like.device
    ):
        return mask
    check_tensor(op, name, mask)
    if mask.dtype.is_complex:
        raise ValueError(f"{op}: {name} must be bool, int or float, got {mask.dtype}")
    check_shape(op, name, mask, like.shape)
    check_device(op, name, mask, like.device)
    return mask if mask.dtype == torch.bool else mask != 0


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """No tensor needs a gradient, or none is recorded: for ops that serve inference alone."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{op}: {name} must not require a gradient, which {op} does not have; "
                    "call it under torch.no_grad()"
                )


def values_are_checked(x: Tensor) -> bool:
    """Whether the values of `x` may be read: not while tracing, on a GPU in debug mode only."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or _env.DEBUG


def check_labels(op: str, labels: Tensor, V: int, ignore_index: int) -> None:
    """Every label is in [0, V) or equals `ignore_index`; IndexError otherwise."""
    if not values_are_checked(labels) or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= V)) & (labels != ignore_index)
    if bool(bad.any()):
        worst = int(labels[bad][0])
        raise IndexError(
            f"{op}: labels must be in [0, {V}) or equal ignore_index ({ignore_index}), got {worst}"
        )


def check_values(op: str, name: str, ok: Tensor, wanted: str) -> None:
    """Every element of the bool tensor `ok` is true; ValueError otherwise."""
    if values_are_checked(ok) and not bool(ok.all()):
        raise ValueError(f"{op}: {name} must be {wanted}")
