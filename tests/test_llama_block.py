"""The parts of a Llama-like block in training, and their gradients, against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_accurate, assert_same_bits, instruction_set
from torch import Tensor

from fastrlhf_kernels import _native
from fastrlhf_kernels._llama_block import (
    attention,
    attention_ref,
    gate,
    gate_ref,
    norm,
    norm_ref,
)

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="the C++ extension is not built")
ISAS = [] if _native.cpu is None else _native.cpu.isas()
EPS = 1e-6
SIZES = st.sampled_from([1, 2, 7, 16, 33, 64, 100, 257])
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 47, 48, 49, 97]), min_size=1, max_size=5)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def tables(positions: int, D: int) -> tuple[Tensor, Tensor]:
    """Rotary tables, the sine with the sign of its half."""
    angles = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def check(
    ours: Callable[..., Any], reference: Callable[..., Any], inputs: list[Tensor], *rest: Any
) -> list[Tensor]:
    """Results and gradients of fp32 inputs, each against those of the reference in fp64."""

    def results(f: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in inputs]
        more = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in rest]
        found = f(*given, *more)
        found = found if isinstance(found, tuple) else (found,)
        upstream = [randn(*y.shape, seed=50 + i).to(dtype) for i, y in enumerate(found)]
        return [*found, *torch.autograd.grad(found, given, upstream)]

    wanted, plain = results(reference, torch.float64), results(reference, torch.float32)
    found = results(ours, torch.float32)
    for x, y, z in zip(found, plain, wanted, strict=True):
        # Sums of terms of either sign: their units in the last place are those of the largest.
        size = float(z.detach().abs().max()) if z.numel() else 0.0
        assert_accurate(x, y, z, terms=size)
    return found


@given(N=st.integers(0, 200), H=SIZES, seed=st.integers(0, 99))
def test_norm(isa: str, N: int, H: int, seed: int) -> None:
    check(norm, norm_ref, [3.0 * randn(N, H, seed=seed), 1.0 + randn(H, seed=seed + 1)], EPS)


def test_a_norm_whose_input_goes_nowhere_else(isa: str) -> None:
    x, weight = randn(70, 33).requires_grad_(), randn(33, seed=1).requires_grad_()
    d = randn(70, 33, seed=2)
    found = torch.autograd.grad(norm(x, weight, EPS)[1], (x, weight), d)
    wanted = torch.autograd.grad(norm_ref(x, weight, EPS)[1], (x, weight), d)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    through, _ = norm(x, weight, EPS)
    assert_same_bits(torch.autograd.grad(through, x, d)[0], d)


@given(
    lengths=LENGTHS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    D=st.sampled_from([2, 6, 16, 32, 40, 64, 128]),
    seed=st.integers(0, 99),
)
def test_attention(
    isa: str, lengths: list[int], kv_heads: int, group: int, D: int, seed: int
) -> None:
    qkv = randn(sum(lengths), kv_heads * (group + 2), D, seed=seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    check(attention, attention_ref, [qkv], cu, *tables(97, D), kv_heads, D**-0.5)


@given(N=st.integers(0, 40), width=SIZES, seed=st.integers(0, 99))
def test_gate(isa: str, N: int, width: int, seed: int) -> None:
    check(gate, gate_ref, [4.0 * randn(N, 2 * width, seed=seed)])


def test_gates_far_out(isa: str) -> None:
    at = torch.tensor([[-1e30, -200.0, -90.0, -80.0, 0.0, 200.0, 1e30]])
    gate_up = torch.cat([at, torch.ones_like(at)], 1)
    for x, y in zip(*(both(f, gate_up) for f in (gate, gate_ref)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-30)


def both(f: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_large_scores_do_not_overflow_and_a_nan_stays_in_its_sequence(isa: str) -> None:
    qkv, cu = 30.0 * randn(60, 3, 16), torch.tensor([0, 20, 60])
    check(attention, attention_ref, [qkv], cu, *tables(60, 16), 1, 1.0)
    qkv = qkv.detach().clone()
    qkv[5] = torch.nan
    found = attention(qkv, cu, *tables(60, 16), 1, 1.0)
    assert bool(found[5:20].isnan().all())
    assert bool(found[20:].isfinite().all())


def test_sequences_and_threads_change_no_bit(isa: str) -> None:
    lengths, before = [30, 1, 97, 60], torch.get_num_threads()
    qkv, cu = randn(sum(lengths), 6, 32), torch.tensor([0, *lengths]).cumsum(0)
    d_out = randn(sum(lengths), 4, 32, seed=1)

    def results(qkv: Tensor, cu: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        x = qkv.clone().requires_grad_()
        out = attention(x, cu, *tables(97, 32), 1, 0.2)
        return out.detach(), torch.autograd.grad(out, x, d_out)[0]

    try:
        torch.set_num_threads(1)
        one = results(qkv, cu, d_out)
        torch.set_num_threads(4)
        four = results(qkv, cu, d_out)
    finally:
        torch.set_num_threads(before)
    part = slice(31, 128)
    alone = results(qkv[part], torch.tensor([0, 97]), d_out[part])
    for x, y, z in zip(one, four, alone, strict=True):
        assert_same_bits(x, y)
        assert_same_bits(x[part], z)


def test_rows_change_no_bit_of_norms_and_gates(isa: str) -> None:
    x, weight = randn(150, 96), randn(96, seed=1)
    assert_same_bits(norm(x, weight, EPS)[1][70:71], norm(x[70:71].clone(), weight, EPS)[1])
    assert_same_bits(gate(x)[70:71], gate(x[70:71].clone()))


def test_a_second_derivative_raises() -> None:
    x = randn(3, 8).requires_grad_()
    for f in (gate, lambda x: norm(x, torch.ones(8), EPS)[1]):
        (d,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            d.sum().backward()


@pytest.mark.parametrize(
    ("cu", "heads", "kv_heads", "D", "message"),
    [
        ([0, 5], 3, 1, 8, "cu_seqlens must go from 0 to the number of tokens"),
        ([0, 7, 6], 3, 1, 8, "cu_seqlens must not fall"),
        ([0, 6], 3, 1, 7, "D must be even"),
        ([0, 6], 7, 2, 8, "query heads must be a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(
    cu: list[int], heads: int, kv_heads: int, D: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention(randn(6, heads, D), torch.tensor(cu), *tables(7, D + D % 2), kv_heads, 1.0)
    with pytest.raises(ValueError, match="more tokens than there are positions"):
        attention(randn(6, 3, 8), torch.tensor([0, 6]), *tables(5, 8), 1, 1.0)
