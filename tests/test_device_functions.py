"""The small device functions of `_triton`, compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import _triton
from fastrlhf_kernels._logit_row import exponent
from fastrlhf_kernels._triton import (
    exp,
    exp_nonpositive,
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
def apply_share(x, out, m, temperature, n, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The share of a logit in a row whose maximum is m."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, exp_nonpositive(exponent(z, m, temperature, UNIT)), mask=i < n)


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


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-30, 1e37])
def test_shares_keep_large_offsets_exact(temperature: float) -> None:
    down = torch.tensor([0.0, 0.5, 3.0, 20.0, 80.0])
    x = torch.cat([1e4 - down * min(temperature, 1.0), torch.tensor([-math.inf])]).to(DEVICE)
    out = torch.empty_like(x)
    apply_share[(1,)](x, out, 1e4, temperature, 6, temperature == 1.0, 8)
    exact = ((x.double() - 1e4) / temperature).exp()
    assert relative_error(out, exact) < (8 if DEVICE == "cuda" else 48) * EPS  # see below
    assert out[0] == 1.0
    assert out[5] == 0.0


def test_shares_everywhere() -> None:
    x = torch.linspace(-87.0, 0.0, 8000, device=DEVICE)
    out = torch.empty_like(x)
    apply_share[(math.ceil(x.numel() / BLOCK),)](x, out, 0.0, 1.0, x.numel(), True, BLOCK)
    # The interpreter rounds the product of tl.fma, which is what a GPU's is there to avoid.
    ulps = 4.0 + (0.5 * x.double().abs() if DEVICE == "cpu" else 0.0)
    exact = x.double().exp()
    assert bool(((out.double() - exact).abs() <= ulps * EPS * exact).all())
    x = torch.tensor([-math.inf, -3e38, -200.0, math.nan], device=DEVICE)
    for unit in (True, False):
        out = torch.empty_like(x)
        apply_share[(1,)](x, out, 0.0, 1.0, 4, unit, 4)
        assert torch.equal(out[:3], torch.zeros_like(out[:3]))
        assert bool(out[3].isnan())


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
