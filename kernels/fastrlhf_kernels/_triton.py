"""Triton, imported once, and the small device functions that the kernels share.

An op file takes `jit` and `tl` from here, so that it can be imported where Triton is not installed:
`jit` then leaves a function as it is, and nobody calls it, since `choose` refuses the backend.
Write `from __future__ import annotations` and no default arguments in kernels, so that `tl` is not
needed at import.

The device functions run compiled and in the interpreter, in fp32. Triton's libdevice has no place
in the interpreter, and `tl.math` has neither expm1 nor log1p nor tanh; hence these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _env

__all__ = [
    "LOG2E",
    "AotConfig",
    "aligned",
    "exp",
    "exp_nonpositive",
    "expm1",
    "jit",
    "launch",
    "log1p",
    "missing",
    "on_device",
    "philox_uniforms",
    "softplus",
    "tanh",
    "tl",
]

missing: str | None  # why the backend `triton` cannot run here; None if it can

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    tl = None
    missing = f"triton is not installed ({error}); run `pip install triton`"
else:
    missing = (
        None
        if _env.INTERPRET or torch.cuda.is_available()
        else "torch finds no GPU (TRITON_INTERPRET=1, set before the import, runs it in Python)"
    )


@dataclass(frozen=True)
class AotConfig:
    """One way in which a kernel ships.

    `signature` gives the type of each argument that is not a constant, in the kernel's order:
    "*fp32", "*bf16", "*u8", "i32", "i64", "fp32". Pointers are taken to be aligned to 16 bytes, as
    torch allocates them. `constants` gives the tl.constexpr arguments, and None for absent
    pointers.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # as for `launch`


def jit(*, any_value: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit. Arguments in `any_value` are not specialised: a new value compiles nothing.

    Token counts, vocabularies and strides belong in `any_value`; Triton would otherwise compile
    again where one becomes 1, or divisible by 16.
    """
    if triton is None:
        return lambda kernel: kernel
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=any_value)
    return decorate


def launch(
    kernel: Any, grid: tuple[int, ...], *, max_registers: int | None = None
) -> Callable[..., Any]:
    """`kernel[grid]`, with every product and sum rounded by itself, as the source has them.

    ptxas would otherwise contract some into fused multiply-adds, and which ones changes with what
    stands around them: one routine would give other bits in another kernel. Where a fused one is
    wanted the source says tl.fma.

    `max_registers` a thread is for NVIDIA GPUs: without it ptxas may keep fewer than a kernel
    needs, and spill some, for the sake of more warps on a multiprocessor.
    """
    on_nvidia = torch.version.hip is None
    limit = {"maxnreg": max_registers} if max_registers is not None and on_nvidia else {}
    return partial(kernel[grid], enable_fp_fusion=False, **limit)


def aligned(x: Tensor) -> Tensor:
    """`x` itself if it starts at a multiple of 16 bytes, else a copy; for contiguous tensors.

    Triton loads as widely as the alignment allows, and the order of a sum over a tile follows from
    that width: so that equal values give equal bits, all have the same.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `x` the current one for a launch; nothing for a CPU tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
    LN2_HIGH = tl.constexpr(
        0.693145751953125
    )  # 15 bits: a whole number below 2^9 times it is exact
    LN2_LOW = tl.constexpr(1.428606765330187e-06)
    LN2_TOP = tl.constexpr(0.693147182464599609375)  # ln 2 in fp32, and what it lacks
    LN2_REST = tl.constexpr(-1.904654323148236e-09)
    TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)


@jit()
def exp(x):
    """exp(x) to a few ulp wherever it is a normal number.

    On a GPU tl.exp rounds x * log2(e) and hands it to exp2: an error of some |x| ulp.
    """
    y = tl.where(x < -104.0, -104.0, x)  # a NaN stays
    y = tl.where(y > 89.0, 89.0, y)
    n = tl.floor(y * LOG2E + 0.5)
    n = tl.where(n > 127.0, 127.0, n)  # exp2(128) is infinite, exp(88.5) is not
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(r * LOG2E) * tl.exp2(n)


@jit()
def exp_nonpositive(u):
    """exp(u) to a few ulp for u in [-150, 0]; 0 where it is no normal number, exactly 1 at 0.

    The rounding of u * log2(e), which exp2 would raise to |u| ulp, is found by an exact product and
    made good. (The interpreter rounds that product: there, |u| / 2 ulp.)
    """
    a = u * LOG2E
    e = tl.exp2(a)
    off = tl.fma(a, -LN2_REST, tl.fma(a, -LN2_TOP, u))
    return tl.fma(e, off, e)


@jit()
def expm1(x):
    """exp(x) - 1 to a few ulp; -1 at -inf, inf at inf."""
    # Below ln 2 in size: the series, whose next term is under 1e-9 of the sum. Above it, exp(x) - 1
    # loses less than two bits.
    near = tl.abs(x) < 0.69
    return tl.where(near, expm1_near(tl.where(near, x, 0.0)), exp(x) - 1.0)


@jit()
def expm1_near(y):
    """exp(y) - 1 to a few ulp, for |y| < 0.69."""
    s = tl.fma(y, 1.0 / 3628800.0, 1.0 / 362880.0)
    s = tl.fma(s, y, 1.0 / 40320.0)
    s = tl.fma(s, y, 1.0 / 5040.0)
    s = tl.fma(s, y, 1.0 / 720.0)
    s = tl.fma(s, y, 1.0 / 120.0)
    s = tl.fma(s, y, 1.0 / 24.0)
    s = tl.fma(s, y, 1.0 / 6.0)
    s = tl.fma(s, y, 0.5)
    return tl.fma(y * y, s, y)


@jit()
def log1p(x):
    """log(1 + x) to a few ulp, for x >= -1; -inf at -1, inf at inf."""
    # Near 0: log1p(x) = 2 atanh(s) with s = x / (2 + x), |s| < 0.172; the next term of the series
    # is under 3e-9 of the sum. Elsewhere log(1 + x) is over 0.28 in size and loses two bits.
    near = (x > -0.25) & (x < 0.4)
    y = tl.where(near, x, 0.0)
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return tl.where(near, 2.0 * (s + s * q * series), tl.log(tl.where(near, 1.0, 1.0 + x)))


@jit()
def softplus(x):
    """log(1 + exp(x)), with its relative precision kept where it is close to 0."""
    return tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))


@jit()
def tanh(x):
    """tanh(x) to a few ulp."""
    u = tl.maximum(-2.0 * tl.abs(x), -150.0, propagate_nan=tl.PropagateNan.ALL)
    near = u > -0.69
    e = tl.where(near, expm1_near(tl.where(near, u, 0.0)), exp_nonpositive(u) - 1.0)
    t = -e / (e + 2.0)
    return tl.where(x < 0.0, -t, t)


@jit()
def philox_uniforms(seed, position):
    """u0 and u1 of sample's specification, fp32 in [0, 1], from int64 seed and position."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    x0, x1, _, _ = tl.philox(seed, low, high, zero, zero)
    return x0.to(tl.float32) * TWO_TO_MINUS_32, x1.to(tl.float32) * TWO_TO_MINUS_32
