"""kl_penalty against the definitions in fp64, and against the divergence that it estimates."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import (
    assert_compiled_is_eager,
    assert_layout_changes_no_bit,
    assert_repeats,
    assert_second_derivative_raises,
    assert_upstream_layout_changes_no_bit,
    far_apart,
    with_gradients,
)
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import available_backends, kl_penalty
from fastrlhf_kernels.kl_penalty import kl_penalty_ref

OP = "kl_penalty"
ESTIMATORS = ["k1", "k2", "k3", "abs"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def definition(d: float, estimator: str) -> tuple[float, float]:
    """The estimate and its derivative in the policy's log-prob."""
    if estimator == "k1":
        return d, 1.0
    if estimator == "k2":
        return d * d / 2, d
    if estimator == "abs":
        return abs(d), math.copysign(1.0, d) if d else 0.0
    if -d > 20.0:
        return math.expm1(20.0) + d, 1.0
    if abs(d) < 1e-3:  # expm1(-d) + d without its cancellation
        return d * d / 2 - d**3 / 6 + d**4 / 24 - d**5 / 120, -math.expm1(-d)
    return math.expm1(-d) + d, -math.expm1(-d)


def oracle(x: Tensor, y: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    pairs = [
        definition(d, estimator) for d in (x.double().cpu() - y.double().cpu()).flatten().tolist()
    ]
    both = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    return both[:, 0].reshape(x.shape), both[:, 1].reshape(x.shape)


def case(backend: Backend, shape: tuple[int, ...], dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = -3.0 * torch.rand(shape, generator=generator)
    # Differences of all sizes, from rounding to far past the clamp of k3.
    gap = torch.randn(shape, generator=generator)
    gap = gap * 10.0 ** torch.randint(-5, 2, shape, generator=generator)
    return x.to(dtype).to(backend.device), (x + gap).to(dtype).to(backend.device)


@given(
    shape=st.sampled_from([(), (0,), (1,), (7,), (33,), (2, 3, 5), (3, 0)]),
    estimator=st.sampled_from(ESTIMATORS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_matches_definition(backend: Backend, shape, estimator, dtype, seed) -> None:
    x, y = case(backend, shape, dtype, seed)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    references = [t.clone().requires_grad_() for t in (x, y)]
    actual = kl_penalty(*leaves, estimator=estimator, backend=backend.name)
    reference = kl_penalty_ref(*references, estimator=estimator)
    value, slope = oracle(x, y, estimator)
    assert_accurate(actual, reference, value)
    actual.sum().backward()
    reference.sum().backward()
    for sign, leaf, ref in zip((1.0, -1.0), leaves, references, strict=True):
        assert_accurate(leaf.grad, ref.grad, sign * slope, interpreted=backend.interpreted)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_many_entries(backend: Backend, estimator: str) -> None:
    """More than a tile of any backend, with a rest."""
    x, y = case(backend, (2500,))
    value, _ = oracle(x, y, estimator)
    actual = kl_penalty(x, y, estimator=estimator, backend=backend.name)
    assert_accurate(actual, kl_penalty_ref(x, y, estimator=estimator), value)


def test_k3_keeps_its_digits_near_zero(backend: Backend) -> None:
    d = torch.logspace(-6, 1, 200, device=backend.device)
    d = torch.cat([d, -d])
    actual = kl_penalty(d, torch.zeros_like(d), estimator="k3", backend=backend.name)
    value, _ = oracle(d, torch.zeros_like(d), "k3")
    lost = 1e-6 if backend.name == "ref" else 0.0  # the reference is the plain formula
    torch.testing.assert_close(actual.double().cpu(), value, rtol=1e-6, atol=lost)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_finite_for_finite_input(backend: Backend, estimator: str) -> None:
    gaps = torch.tensor([0.0, -0.0, 20.0, -20.0, 20.5, -20.5, 1e4, -1e4, 1e15, -1e15])
    gaps = gaps.to(backend.device)
    x, y = gaps.requires_grad_(), torch.zeros_like(gaps).requires_grad_()
    actual = kl_penalty(x, y, estimator=estimator, backend=backend.name)
    actual.sum().backward()
    value, slope = oracle(x.detach(), y.detach(), estimator)
    torch.testing.assert_close(actual.detach().double().cpu(), value, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(x.grad.double().cpu(), slope, rtol=1e-6, atol=0.0)
    assert_same_bits(x.grad, -y.grad)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gaps_in_other_dtypes(backend: Backend, estimator: str) -> None:
    """At the clamp and far past it; the gradients of fp16 are finite too, but for k3's e^20."""
    gaps = torch.tensor([20.0, -20.0, 100.0, -100.0, 1e4, -1e4], device=backend.device)
    dtypes = [torch.bfloat16, torch.float16]
    for dtype in [torch.float64, *dtypes] if backend.name in ("ref", "cpu") else dtypes:
        x = gaps.to(dtype).requires_grad_()
        y = torch.zeros_like(x).requires_grad_()
        actual = kl_penalty(x, y, estimator=estimator, backend=backend.name)
        value, slope = oracle(x.detach(), y.detach(), estimator)
        close = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(actual.detach().double().cpu(), value, rtol=close, atol=0.0)
        actual.sum().backward()
        slope = slope.masked_fill(slope.abs() > torch.finfo(dtype).max, -math.inf)
        for sign, leaf in ((1.0, x), (-1.0, y)):
            assert leaf.grad.dtype == dtype
            close = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
            exact = sign * slope
            torch.testing.assert_close(leaf.grad.double().cpu(), exact, rtol=close, atol=0.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mixed_dtypes(backend: Backend, estimator: str) -> None:
    """Arithmetic in fp32 whichever argument is narrow; each gradient in its argument's dtype."""
    x, y = case(backend, (3, 20))
    for first, second in itertools.permutations(DTYPES, 2):
        args = (x.to(first), y.to(second))
        op = partial(kl_penalty, estimator=estimator, backend=backend.name)
        found = with_gradients(op, *args, wanted=2)
        expected = with_gradients(op, *(t.float() for t in args), wanted=2)
        for t, e, dtype in zip(found, expected, (torch.float32, first, second), strict=True):
            assert_same_bits(t, e.to(dtype))


def test_nan_and_infinity_stay_where_they_are(backend: Backend) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -1.0], device=backend.device)
    for estimator in ESTIMATORS:
        y = torch.zeros_like(x)
        actual = kl_penalty(x, y, estimator=estimator, backend=backend.name)
        expected = kl_penalty_ref(x, y, estimator=estimator)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_k1_and_k3_estimate_the_divergence(backend: Backend) -> None:
    """Summed over a whole small distribution, with the policy's weights, both are KL(p || q)."""
    generator = torch.Generator().manual_seed(0)
    p, q = (
        torch.randn(50, generator=generator).log_softmax(0).to(backend.device) for _ in range(2)
    )
    exact = (p.double().exp() * (p.double() - q.double())).sum()
    for estimator in ("k1", "k3"):
        estimate = (p.exp() * kl_penalty(p, q, estimator=estimator, backend=backend.name)).sum()
        torch.testing.assert_close(estimate.double(), exact, rtol=1e-5, atol=0)


def test_layouts_and_expanded_gradients(backend: Backend) -> None:
    x, y = case(backend, (4, 33))
    for estimator in ("k1", "k3"):
        op = partial(kl_penalty, estimator=estimator, backend=backend.name)
        assert_layout_changes_no_bit(op, x, y, wanted=2)
        row = y[:1].expand(4, 33)
        assert_same_bits(op(x, row), op(x, row.contiguous()))
        leaf = x.clone().requires_grad_()
        (expanded,) = torch.autograd.grad(op(leaf, y).sum(), leaf)  # a stride-0 upstream gradient
        (dense,) = torch.autograd.grad(op(leaf, y), leaf, torch.ones_like(x))
        assert_same_bits(expanded, dense)
        assert_upstream_layout_changes_no_bit(op, x, y, wanted=2)


def test_rows_far_apart(backend: Backend) -> None:
    x, y = case(backend, (2, 40), torch.float16)
    expected = kl_penalty(x, y, estimator="k3", backend=backend.name)
    for args in ((far_apart(x), y), (x, far_apart(y))):
        found = kl_penalty(*args, estimator="k3", backend=backend.name)
        assert_same_bits(found, expected)


def test_entries_do_not_depend_on_the_batch(backend: Backend) -> None:
    x, y = case(backend, (33,))
    for estimator in ESTIMATORS:
        op = partial(kl_penalty, estimator=estimator, backend=backend.name)
        together = op(x, y)
        leaves = (x.detach().requires_grad_(), y.detach().requires_grad_())
        gradients = torch.autograd.grad(op(*leaves).sum(), leaves)
        for n in (0, 15, 32):
            one = slice(n, n + 1)
            assert_same_bits(op(x[one], y[one]), together[one])
            alone = torch.autograd.grad(op(*(t[one] for t in leaves)).sum(), leaves)
            for found, expected in zip(alone, gradients, strict=True):
                assert_same_bits(found[one], expected[one])


def test_repeats(backend: Backend) -> None:
    x, y = case(backend, (2500 if backend.interpreted else 40000,))
    assert_repeats(
        backend, partial(kl_penalty, estimator="k3", backend=backend.name), x, y, wanted=2
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = 3.0 * torch.randn(2, 40, generator=generator, dtype=torch.float64)
    for name in {"ref", "cpu"} & set(available_backends()):
        op = partial(kl_penalty, estimator=estimator, backend=name)
        assert torch.autograd.gradcheck(op, (x.requires_grad_(), y.requires_grad_()))
        assert op(x, y.detach().float()).dtype == torch.float64


def test_arguments_keep_their_values(backend: Backend) -> None:
    args = case(backend, (3, 20))
    before = [x.clone() for x in args]
    with_gradients(partial(kl_penalty, estimator="k3", backend=backend.name), *args, wanted=2)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_opcheck_compile_and_second_derivative(backend: Backend) -> None:
    x, y = case(backend, (3, 20))
    op = partial(kl_penalty, estimator="k3", backend=backend.name)
    assert_compiled_is_eager(op, x, y, wanted=2)
    if backend.name != "ref":
        args = (x.clone().requires_grad_(), y.clone().requires_grad_(), "k3", backend.name)
        torch.library.opcheck(torch.ops.fastrlhf.kl_penalty.default, args)
        assert_second_derivative_raises(lambda x: op(x, y), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [0.0]}, "logprobs must be a tensor, got list"),
        ({"logprobs": torch.zeros(3).int()}, "logprobs must be fp32, bf16, fp16 or fp64"),
        ({"ref_logprobs": torch.zeros(4)}, r"ref_logprobs must have shape \(3,\), got \(4,\)"),
        ({"ref_logprobs": torch.zeros(3, device="meta")}, "ref_logprobs must be on cpu, got meta"),
        ({"estimator": "k4"}, "estimator must be one of k1, k2, k3, abs, got 'k4'"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"logprobs": torch.zeros(3), "ref_logprobs": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        kl_penalty(**arguments)
