"""The small device functions of `_triton`, compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import _triton
from fastrlhf_kernels._triton import (
    exp,
    exp_scaled,
    expm1,
    jit,
    log1p,
    philox_uniforms,
    softplus,
    tanh,
    tl,
)
from fastrlhf_kernels.sample import philox_ref

pytestmark = pytest.mark.skipif(_triton.missing is not None, reason=str(_triton.missing))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 4096
EPS = torch.finfo(torch.float32).eps


@jit()
def apply_all(x, a, b, c, d, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(a + i, expm1(v), mask=i < n)
    tl.store(b + i, log1p(v), mask=i < n)
    tl.store(c + i, tanh(v), mask=i < n)
    tl.store(d + i, softplus(v), mask=i < n)


@jit()
def apply_exp(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, exp(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)


@jit()
def apply_exp_scaled(x, out, m, temperature, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, exp_scaled(tl.load(x + i), m, temperature))


@jit()
def apply_philox(seeds, positions, a, b, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    u, v = philox_uniforms(tl.load(seeds + i), tl.load(positions + i))
    tl.store(a + i, u)
    tl.store(b + i, v)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    return float(((actual.double() - exact) / exact)[normal].abs().max())


def test_a_few_ulp_everywhere() -> None:
    tiny_to_large = torch.logspace(-30, 1.9, 3000)
    x = torch.cat(
        [torch.linspace(-0.999, 3.0, 6000), tiny_to_large, -torch.logspace(-30, -0.001, 3000)]
    ).to(DEVICE)
    out = [torch.empty_like(x) for _ in range(4)]
    apply_all[(math.ceil(x.numel() / BLOCK),)](x, *out, x.numel(), BLOCK)
    exact = x.double()
    functions = (torch.expm1, torch.log1p, torch.tanh, lambda x: torch.logaddexp(x, 0 * x))
    for actual, function in zip(out, functions, strict=True):
        assert relative_error(actual, function(exact)) < 4 * EPS


def test_exp_everywhere() -> None:
    x = torch.linspace(-87.0, 88.7, 8000, device=DEVICE)
    out = torch.empty_like(x)
    apply_exp[(math.ceil(x.numel() / BLOCK),)](x, out, x.numel(), BLOCK)
    assert relative_error(out, x.double().exp()) < 4 * EPS
    x = torch.tensor([-math.inf, -200.0, 0.0, 89.0, math.inf, math.nan], device=DEVICE)
    out = torch.empty_like(x)
    apply_exp[(1,)](x, out, x.numel(), BLOCK)
    torch.testing.assert_close(out, x.exp(), rtol=0, atol=0, equal_nan=True)


def test_limits() -> None:
    x = torch.tensor([-math.inf, -1.0, 0.0, math.inf, math.nan], device=DEVICE)
    out = [torch.empty_like(x) for _ in range(4)]
    apply_all[(1,)](x, *out, x.numel(), BLOCK)
    for actual, function in zip(out, (torch.expm1, torch.log1p, torch.tanh), strict=False):
        torch.testing.assert_close(actual, function(x), rtol=4 * EPS, atol=0, equal_nan=True)
    softplus_limits = torch.tensor([0.0, math.inf], device=DEVICE)
    assert torch.equal(out[3][[0, 3]], softplus_limits)


def test_exp_scaled_keeps_large_offsets_exact() -> None:
    x = torch.tensor([1e4, 1e4 - 0.5, 1e4 - 3.0, -math.inf], device=DEVICE)
    out = torch.empty_like(x)
    apply_exp_scaled[(1,)](x, out, 1e4, 0.7, 4)
    exact = ((x.double() - 1e4) / 0.7).exp()
    assert relative_error(out, exact) < 8 * EPS
    assert out[3] == 0.0
    nothing = torch.full_like(x, -math.inf)
    apply_exp_scaled[(1,)](nothing, out, -math.inf, 1.0, 4)
    assert torch.equal(out, torch.zeros_like(x))


def test_philox_draws_the_reference_s_numbers() -> None:
    # Salmon et al.'s known answer for a counter and a key of zeros, and some others
    seeds = torch.tensor([0, 0x299F31D0A4093822, -1, 7], device=DEVICE)
    positions = torch.tensor([0, -1, -3, 2**40], device=DEVICE)
    x0, x1 = philox_ref(seeds, positions)
    assert (int(x0[0]), int(x1[0])) == (0x6627E8D5, 0xE169C58D)
    u0, u1 = torch.empty(2, 4, device=DEVICE)
    apply_philox[(1,)](seeds, positions, u0, u1, 4)
    assert torch.equal(u0, x0.float() * 2.0**-32)
    assert torch.equal(u1, x1.float() * 2.0**-32)
