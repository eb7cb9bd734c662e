"""shape_rewards against a loop over tokens in fp64."""

from __future__ import annotations

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

from fastrlhf_kernels import available_backends, shape_rewards
from fastrlhf_kernels.shape_rewards import shape_rewards_ref

OP = "shape_rewards"
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(
    scores: Tensor, kl: Tensor, mask: Tensor, beta: float, clip: float | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, and the gradients of scores and kl for an upstream gradient `weights`."""
    B, T = kl.shape
    rewards, d_kl = torch.zeros(B, T).double(), torch.zeros(B, T).double()
    d_scores = torch.zeros(B).double()
    for b in range(B):
        valid = [t for t in range(T) if mask[b, t] != 0]
        for t in valid:
            rewards[b, t] = -beta * float(kl[b, t])
            d_kl[b, t] = -beta * float(weights[b, t])
        if valid:
            score = float(scores[b])
            held = score if clip is None else max(-clip, min(clip, score))
            rewards[b, valid[-1]] += held
            d_scores[b] = float(weights[b, valid[-1]]) if held == score else 0.0
    return rewards, d_scores, d_kl


def case(backend: Backend, B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(B, generator=generator)
    kl = torch.randn(B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.4  # with holes, and rows of nothing
    return tuple(x.to(backend.device) for x in (scores, kl, mask))


def check(backend: Backend, scores: Tensor, kl: Tensor, mask: Tensor, beta, clip) -> None:
    weights = torch.linspace(-1.0, 1.0, kl.numel(), device=kl.device).reshape(kl.shape)
    found = []
    for f in (partial(shape_rewards, backend=backend.name), shape_rewards_ref):
        leaves = [x.clone().requires_grad_() for x in (scores, kl)]
        rewards = f(*leaves, mask, beta=beta, clip=clip)
        found.append([rewards, *torch.autograd.grad(rewards, leaves, weights)])
    expected = oracle(scores, kl, mask, beta, clip, weights)
    for actual, reference, exact in zip(*found, expected, strict=True):
        assert_accurate(actual, reference, exact, interpreted=backend.interpreted)


@given(
    B=st.integers(0, 4),
    T=st.integers(0, 20),
    beta=st.sampled_from([0.0, 0.02, 1.5, -1.0]),
    clip=st.sampled_from([None, 0.5, 5.0]),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32]),
    dtype=st.sampled_from(DTYPES),
    kl_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, B, T, beta, clip, mask_dtype, dtype, kl_dtype, seed
) -> None:
    scores, kl, mask = case(backend, B, T, seed)
    check(backend, scores.to(dtype), kl.to(kl_dtype), mask.to(mask_dtype), beta, clip)


def test_long_rows(backend: Backend) -> None:
    """The last valid token in the first, a middle and the last tile, and nowhere."""
    scores, kl, mask = case(backend, 4, 2100)
    for b, length in enumerate((5, 1500, 2100, 0)):
        mask[b] = torch.arange(2100, device=mask.device) < length
    check(backend, scores, kl, mask, 0.1, None)


def test_the_score_is_at_the_last_valid_token(backend: Backend) -> None:
    """Not in the last column, and not behind a hole (trl#3750)."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    args = (x.to(backend.device) for x in (scores, torch.zeros(4, 4), mask))
    rewards = shape_rewards(*args, beta=0.1, backend=backend.name)
    expected = torch.zeros(4, 4)
    expected[0, 1], expected[1, 3], expected[2, 3] = 1.0, 2.0, 3.0
    assert torch.equal(rewards.cpu(), expected)


def test_scores_are_clamped(backend: Backend) -> None:
    scores = torch.tensor([-9.0, -2.0, 2.0, 9.0, float("inf")], device=backend.device)
    scores.requires_grad_()
    ones = torch.ones(5, 1, device=backend.device)
    rewards = shape_rewards(scores, 0 * ones, ones, beta=1.0, clip=2.0, backend=backend.name)
    rewards.sum().backward()
    assert rewards.flatten().tolist() == [-2.0, -2.0, 2.0, 2.0, 2.0]
    assert scores.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]  # at the bound it still passes


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_what_is_masked_reaches_nothing(backend: Backend, bad: float) -> None:
    scores, kl, mask = case(backend, 4, 12)
    mask[2] = False
    op = partial(shape_rewards, beta=0.1, backend=backend.name)
    clean = with_gradients(lambda s, k: op(s, k, mask), scores, kl, wanted=2)
    scores[2] = bad
    kl = kl.masked_fill(~mask, bad)
    for x, y in zip(
        with_gradients(lambda s, k: op(s, k, mask), scores, kl, wanted=2), clean, strict=True
    ):
        assert_same_bits(x, y)
    upstream = torch.ones_like(kl).masked_fill(~mask, bad)
    leaves = (scores.requires_grad_(), kl.requires_grad_())
    d_scores, d_kl = torch.autograd.grad(op(*leaves, mask), leaves, upstream)
    assert d_scores.isfinite().all()
    assert not d_kl[~mask].any()


def test_layouts_and_expanded_gradients(backend: Backend) -> None:
    scores, kl, mask = case(backend, 4, 33)
    op = partial(shape_rewards, beta=0.1, clip=1.0, backend=backend.name)
    assert_layout_changes_no_bit(lambda k, m: op(scores, k, m), kl, mask.float())
    assert_layout_changes_no_bit(lambda k, m: op(scores, k, m != 0), kl, mask.float())
    wide = torch.stack([scores, scores], -1)[:, 0]
    assert_same_bits(op(wide, kl, mask), op(scores, kl, mask))
    row = (scores[:1].expand(4), kl[:1].expand(4, 33), mask[:1].expand(4, 33))
    assert_same_bits(op(*row), op(*(x.contiguous() for x in row)))
    leaves = (scores.requires_grad_(), kl.requires_grad_())
    expanded = torch.autograd.grad(op(*leaves, mask).sum(), leaves)
    dense = torch.autograd.grad(op(*leaves, mask), leaves, torch.ones(4, 33, device=kl.device))
    for x, y in zip(expanded, dense, strict=True):
        assert_same_bits(x, y)
    assert_upstream_layout_changes_no_bit(lambda s, k: op(s, k, mask), scores, kl, wanted=2)


def test_a_valid_nan_stays_at_its_token(backend: Backend) -> None:
    """Of kl, and of a score; a score that is no number has no gradient where it is clamped."""
    scores, kl, _ = case(backend, 3, 9)
    mask = torch.ones_like(kl, dtype=torch.bool)
    for clip in (None, 1.0):
        op = partial(shape_rewards, mask=mask, beta=0.1, clip=clip, backend=backend.name)
        clean = with_gradients(op, scores, kl, wanted=2)
        bad_scores, bad_kl = scores.clone(), kl.clone()
        bad_scores[1], bad_kl[0, 4] = NAN, NAN
        rewards, d_scores, d_kl = with_gradients(op, bad_scores, bad_kl, wanted=2)
        spoilt = torch.zeros_like(mask)
        spoilt[1, 8] = spoilt[0, 4] = True
        assert rewards[spoilt].isnan().all()
        assert_same_bits(rewards[~spoilt], clean[0][~spoilt])
        assert_same_bits(d_scores[[0, 2]], clean[1][[0, 2]])
        assert_same_bits(d_kl, clean[2])
        if clip is not None:
            assert float(d_scores[1]) == 0.0


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_far_apart(backend: Backend, rows: int) -> None:
    scores, kl, mask = case(backend, rows, 40)
    kl = kl.half()
    op = partial(shape_rewards, beta=0.1, backend=backend.name)
    expected = op(scores, kl, mask)
    assert_same_bits(op(scores, far_apart(kl), mask), expected)
    assert_same_bits(op(scores, kl, far_apart(mask)), expected)
    apart = far_apart(scores.half()[:, None])[:, 0]
    assert apart.stride() == (2**31 // (rows - 1),)
    assert_same_bits(op(apart, kl, mask), op(scores.half(), kl, mask))
    (far,) = torch.autograd.grad(op(scores, kl.requires_grad_(), far_apart(mask)).sum(), kl)
    (near,) = torch.autograd.grad(op(scores, kl, mask).sum(), kl)
    assert_same_bits(far, near)


def test_nothing_and_next_to_nothing(backend: Backend) -> None:
    for B, T in ((0, 0), (0, 5), (3, 0)):
        scores, kl, mask = case(backend, B, T)
        assert shape_rewards(scores, kl, mask, beta=0.1, backend=backend.name).shape == (B, T)
    scores, kl, mask = case(backend, 3, 1)
    mask[:] = torch.tensor([[True], [False], [True]])
    check(backend, scores, kl, mask, 0.1, 1.0)
    scores[0] = NAN  # of a row without a valid token
    assert not shape_rewards(
        scores, kl, torch.zeros_like(mask), beta=0.1, backend=backend.name
    ).any()


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    scores, kl, mask = case(backend, 5 if backend.interpreted else 33, 70)
    op = partial(shape_rewards, beta=0.1, backend=backend.name)
    leaves = (scores.requires_grad_(), kl.requires_grad_())
    together = op(*leaves, mask)
    gradients = torch.autograd.grad(together.sum(), leaves)
    for b in (0, 2, len(scores) - 1):
        row = slice(b, b + 1)
        alone = op(scores[row], kl[row], mask[row])
        assert_same_bits(alone, together[row])
        for x, y in zip(torch.autograd.grad(alone.sum(), leaves), gradients, strict=True):
            assert_same_bits(x[row], y[row])


def test_repeats(backend: Backend) -> None:
    B = 4 if backend.interpreted else 300
    scores, kl, mask = case(backend, B, 200)
    op = partial(shape_rewards, beta=0.1, backend=backend.name)
    assert_repeats(backend, lambda s, k: op(s, k, mask), scores, kl, wanted=2)


def test_gradcheck() -> None:
    scores, kl, mask = case(Backend("cpu", "cpu"), 4, 6)
    leaves = (scores.double().requires_grad_(), kl.double().requires_grad_())
    for name in {"ref", "cpu"} & set(available_backends()):
        for clip in (None, 1.0):
            op = partial(shape_rewards, mask=mask, beta=0.3, clip=clip, backend=name)
            assert torch.autograd.gradcheck(op, leaves)
        assert shape_rewards(scores.double(), kl, mask, beta=1.0, backend=name).dtype == (
            torch.float64
        )


def test_opcheck_compile_and_second_derivative(backend: Backend) -> None:
    scores, kl, mask = case(backend, 3, 20)
    op = partial(shape_rewards, beta=0.1, clip=1.0, backend=backend.name)
    assert_compiled_is_eager(lambda s, k: op(2.0 * s, k, mask), scores, kl, wanted=2)
    if backend.name != "ref":
        leaves = (scores.clone().requires_grad_(), kl.clone().requires_grad_())
        for clip in (None, 1.0):
            args = (*leaves, mask, 0.1, clip, backend.name)
            torch.library.opcheck(torch.ops.fastrlhf.shape_rewards.default, args)
        assert_second_derivative_raises(lambda k: op(scores, k, mask), kl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": torch.zeros(4)}, r"kl must have shape \(B, T\), got \(4,\)"),
        ({"kl": torch.zeros(3, 4).int()}, "kl must be fp32, bf16, fp16 or fp64"),
        ({"scores": torch.zeros(4)}, r"scores must have shape \(3,\), got \(4,\)"),
        ({"scores": 1.0}, "scores must be a tensor, got float"),
        ({"scores": torch.zeros(3, device="meta")}, "scores must be on cpu, got meta"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(3, 4\), got \(4,\)"),
        ({"mask": None}, "mask must be a tensor, got None"),
        ({"beta": NAN}, "beta must be in"),
        ({"beta": "1"}, "beta must be a number, got str"),
        ({"clip": 0.0}, r"clip must be in \(0.0, inf\], got 0.0"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"scores": torch.zeros(3), "kl": torch.zeros(3, 4), "mask": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=message):
        shape_rewards(**({**arguments, "beta": 0.1} | change))
