"""policy_loss against a loop over tokens in fp64."""

from __future__ import annotations

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
    far_apart,
    with_gradients,
)
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import available_backends, policy_loss
from fastrlhf_kernels._losses import BLOCK_N, BLOCK_TILES
from fastrlhf_kernels.policy_loss import policy_loss_ref

OP = "policy_loss"
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None, clip: float, normalizer
) -> tuple[dict[str, float], Tensor, float]:
    """(loss and stats, gradient, sum of the sizes of the loss's terms)."""
    x, y, a = (t.double().cpu().flatten().tolist() for t in (new, old, advantages))
    n = len(x)
    valid = [True] * n if mask is None else (mask.cpu() != 0).flatten().tolist()
    count = sum(valid)
    divisor = count if normalizer is None else float(normalizer)
    losses, ratios, squares, clips, gradient = [], [], [], 0, [0.0] * n
    for t in range(n):
        if not valid[t]:
            continue
        d = x[t] - y[t]
        held = max(-20.0, min(20.0, d))
        ratio = math.exp(held)
        plain = -a[t] * ratio
        clipped = -a[t] * max(1.0 - clip, min(1.0 + clip, ratio))
        losses.append(max(plain, clipped))
        ratios.append(ratio)
        squares.append(held * held / 2)
        clips += clipped > plain
        gradient[t] = plain / divisor if clipped <= plain and held == d else 0.0
    expected = {
        "loss": math.fsum(losses) / divisor if count else 0.0,
        "clip_fraction": clips / max(count, 1),
        "approx_kl": math.fsum(squares) / max(count, 1),
        "ratio_mean": math.fsum(ratios) / max(count, 1),
        "ratio_max": max(ratios, default=0.0),
    }
    terms = math.fsum(map(abs, losses)) / divisor if count else 0.0
    return expected, torch.tensor(gradient, dtype=torch.float64).reshape(new.shape), terms


def case(backend: Backend, shape: tuple[int, ...], seed: int = 0, wild: bool = True):
    generator = torch.Generator().manual_seed(seed)
    new = -3.0 * torch.rand(shape, generator=generator)
    gap = 0.3 * torch.randn(shape, generator=generator)
    if wild:  # some far past the clamp of the log-ratio
        gap = torch.where(torch.rand(shape, generator=generator) > 0.9, 100.0 * gap, gap)
    advantages = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.3
    return tuple(x.to(backend.device) for x in (new, new - gap, advantages, mask))


def check(backend: Backend, new, old, advantages, mask, *, clip=0.2, normalizer=None) -> None:
    found = []
    for f in (partial(policy_loss, backend=backend.name), policy_loss_ref):
        leaf = new.clone().requires_grad_()
        loss, stats = f(leaf, old, advantages, mask, clip=clip, normalizer=normalizer)
        (gradient,) = torch.autograd.grad(3.0 * loss, leaf)
        assert not any(s.requires_grad for s in stats.values())
        found.append(({"loss": loss} | stats, gradient))
    (actual, actual_gradient), (reference, reference_gradient) = found
    expected, gradient, terms = oracle(new, old, advantages, mask, clip, normalizer)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        exact = torch.tensor(value, dtype=torch.float64)
        sizes = terms if name == "loss" else 0.0
        assert_accurate(actual[name], reference[name], exact, terms=sizes)
    gradient *= 3.0
    # What is too large for the dtype is infinite in it.
    gradient[gradient.abs() > torch.finfo(new.dtype).max] *= INF
    assert_accurate(actual_gradient, reference_gradient, gradient, interpreted=backend.interpreted)


@given(
    shape=st.sampled_from([(), (0,), (1,), (7,), (33,), (2, 3, 5), (3, 0)]),
    clip=st.sampled_from([0.0, 0.2, 0.9, 1.5]),
    normalizer=st.sampled_from([None, 7, 0.5, torch.tensor(11), torch.tensor(2.5)]),
    mask_dtype=st.sampled_from([None, torch.bool, torch.int64, torch.uint8, torch.float32]),
    dtype=st.sampled_from(DTYPES),
    data_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, shape, clip, normalizer, mask_dtype, dtype, data_dtype, seed
) -> None:
    new, old, advantages, mask = case(backend, shape, seed)
    check(
        backend,
        new.to(dtype),
        old.to(dtype),
        advantages.to(data_dtype),
        None if mask_dtype is None else mask.to(mask_dtype),
        clip=clip,
        normalizer=normalizer,
    )


@pytest.mark.parametrize("normalizer", [None, 7.0, torch.tensor(7.0)])
def test_many_tiles(backend: Backend, normalizer) -> None:
    """Several tiles of any backend, one of them without a valid entry, and a rest."""
    new, old, advantages, mask = case(backend, (4500,))
    mask[1024:2048] = False
    check(backend, new, old, advantages, mask, normalizer=normalizer)


def test_many_more_tiles(backend: Backend) -> None:
    """More tiles than the last step of the Triton kernels adds at once."""
    check(backend, *case(backend, (BLOCK_TILES * BLOCK_N + 1,), wild=False))


def test_before_the_first_step_the_ratio_is_one(backend: Backend) -> None:
    new, _, advantages, mask = case(backend, (50,))
    leaf = new.clone().requires_grad_()
    loss, stats = policy_loss(leaf, new, advantages, mask, backend=backend.name)
    loss.backward()
    mean = advantages[mask].double().mean()
    torch.testing.assert_close(loss.detach().double(), -mean, rtol=1e-6, atol=1e-7)
    assert {k: float(v) for k, v in stats.items()} == {
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
    }
    expected = torch.where(mask, -advantages / mask.sum(), 0.0)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=0.0)


def test_the_clamp_of_the_log_ratio(backend: Backend) -> None:
    """At 20 the gradient passes, beyond it is 0; all is finite."""
    gaps = torch.tensor([20.0, 20.5, 1e30, INF, -20.0, -20.5, -1e30, -INF], device=backend.device)
    old = torch.zeros_like(gaps)
    leaf = gaps.clone().requires_grad_()
    loss, stats = policy_loss(leaf, old, old - 1.0, clip=0.2, backend=backend.name)
    loss.backward()
    assert loss.isfinite()
    assert all(s.isfinite() for s in stats.values())
    torch.testing.assert_close(float(stats["ratio_max"]), math.exp(20.0), rtol=1e-6, atol=0.0)
    # A = -1: the ratio counts where it is large; small ones are clipped from below
    expected = torch.tensor([math.exp(20.0) / 8, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(leaf.grad.double().cpu(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("gap", [20.0, -20.0, 100.0, -100.0, 1e4, -1e4])
def test_gaps_alone(backend: Backend, gap: float, advantage: float) -> None:
    """Each alone, in every dtype, against the definition."""
    wide = [torch.float64] if backend.name in ("ref", "cpu") else []
    for dtype in (*DTYPES, *wide):
        new = torch.full((3,), gap, dtype=dtype, device=backend.device)
        check(backend, new, 0 * new, 0 * new + advantage, None)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_masked_reaches_nothing(backend: Backend, bad: float) -> None:
    new, old, advantages, mask = case(backend, (4, 12))
    mask[2] = False

    def op(*args: Tensor):
        return policy_loss(*args, mask, backend=backend.name)

    clean = with_gradients(op, new, old, advantages)
    poisoned = (x.masked_fill(~mask, bad) for x in (new, old, advantages))
    for x, y in zip(with_gradients(op, *poisoned), clean, strict=True):
        assert_same_bits(x, y)
    assert not clean[-1][~mask].any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_valid_nan_shows(backend: Backend, which: int) -> None:
    args = list(case(backend, (40,)))
    args[which][3], args[3][3] = NAN, True
    loss, stats = policy_loss(*args, backend=backend.name)
    reference = policy_loss_ref(*args)[1]["clip_fraction"]
    torch.testing.assert_close(stats["clip_fraction"], reference, rtol=1e-6, atol=0.0)
    assert loss.isnan()
    if which < 2:
        assert all(stats[k].isnan() for k in ("approx_kl", "ratio_mean", "ratio_max"))


@pytest.mark.parametrize("normalizer", [None, 3, torch.tensor(0), torch.tensor(NAN)])
def test_nothing_valid(backend: Backend, normalizer) -> None:
    new, old, advantages, mask = case(backend, (40,))
    leaf = (NAN * new).requires_grad_()
    loss, stats = policy_loss(
        leaf, old, advantages, torch.zeros_like(mask), normalizer=normalizer, backend=backend.name
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(float(s) for s in stats.values())
    assert torch.equal(leaf.grad, torch.zeros_like(new))


@pytest.mark.not_on("ref on a GPU", "torch sums there in an order that goes by the layout")
def test_layouts(backend: Backend) -> None:
    new, old, advantages, mask = case(backend, (4, 33))
    op = partial(policy_loss, backend=backend.name)
    assert_layout_changes_no_bit(op, new, old, advantages, mask.float())
    bool_mask = partial(lambda n, o, a, m: op(n, o, a, m != 0))
    assert_layout_changes_no_bit(bool_mask, new, old, advantages, mask.float())
    row = tuple(x[:1].expand(4, 33) for x in (new, old, advantages, mask))
    for x, y in zip(
        with_gradients(lambda n: op(n, *row[1:]), row[0]),
        with_gradients(lambda n: op(n, *(t.contiguous() for t in row[1:])), row[0].contiguous()),
        strict=True,
    ):
        assert_same_bits(x, y)


def test_rows_far_apart(backend: Backend) -> None:
    *args, mask = case(backend, (2, 40))
    args = [x.half() for x in args]
    op = partial(policy_loss, backend=backend.name)
    expected = with_gradients(lambda x: op(x, *args[1:], mask), args[0])
    for i in range(3):  # one at a time: each is 4 GiB of addresses
        apart = [far_apart(x) if n == i else x for n, x in enumerate(args)]
        found = with_gradients(lambda x, rest=apart[1:]: op(x, *rest, mask), apart[0])
        for x, y in zip(found, expected, strict=True):
            assert_same_bits(x, y)
    assert_same_bits(op(*args, far_apart(mask))[0], expected[0])


def test_gradients_do_not_depend_on_the_batch(backend: Backend) -> None:
    """Divided by a number, an entry's gradient is its own: in a vector, in a rest, or alone."""
    *args, _ = case(backend, (33,))
    op = partial(policy_loss, normalizer=3.0, backend=backend.name)
    *_, together = with_gradients(lambda x: op(x, *args[1:]), args[0])
    assert together.any()
    for n in range(33):
        one, *rest = (x[n : n + 1] for x in args)
        *_, alone = with_gradients(lambda x, rest=rest: op(x, *rest), one)
        if backend.name == "ref":  # promises no bits
            torch.testing.assert_close(alone, together[n : n + 1])
        else:
            assert_same_bits(alone, together[n : n + 1])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_no_number_spoils_no_other_gradient(
    backend: Backend, bad: float, which: int
) -> None:
    *args, mask = case(backend, (40,))
    mask[3] = True
    op = partial(policy_loss, normalizer=3.0, backend=backend.name)
    *_, clean = with_gradients(lambda x: op(x, *args[1:], mask), args[0])
    args[which][3] = bad
    *_, spoilt = with_gradients(lambda x: op(x, *args[1:], mask), args[0])
    others = torch.arange(40, device=mask.device) != 3
    assert_same_bits(spoilt[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_the_normalizers_dtype_is_not_the_losss(backend: Backend, dtype: torch.dtype) -> None:
    args = case(backend, (40,))
    op = partial(policy_loss, *args, backend=backend.name)
    normalizer = torch.tensor(7, device=args[0].device).to(dtype)
    loss, _ = op(normalizer=normalizer)
    assert loss.dtype == torch.float32
    assert_same_bits(loss, op(normalizer=float(normalizer))[0])


def test_gradient_reaches_logprobs_alone(backend: Backend) -> None:
    new, old, advantages, mask = case(backend, (40,))
    leaves = [x.requires_grad_() for x in (new, old, advantages)]
    normalizer = torch.tensor(5.0, requires_grad=True)
    loss, _ = policy_loss(*leaves, mask, normalizer=normalizer, backend=backend.name)
    loss.backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    assert normalizer.grad is None
    with torch.no_grad():
        again, _ = policy_loss(*leaves, mask, normalizer=normalizer, backend=backend.name)
    assert not again.requires_grad
    assert_same_bits(again, loss.detach())


def test_repeats(backend: Backend) -> None:
    *args, mask = case(backend, (5000 if backend.interpreted else 100_000,))
    before = [x.clone() for x in args]
    assert_repeats(backend, lambda *a: policy_loss(*a, mask, backend=backend.name), *args)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_gradcheck() -> None:
    new, old, advantages, mask = case(Backend("cpu", "cpu"), (4, 6), wild=False)
    leaf = new.double().requires_grad_()
    for name in {"ref", "cpu"} & set(available_backends()):
        for normalizer in (None, 3.0, torch.tensor(3.0)):
            op = partial(policy_loss, normalizer=normalizer, backend=name)
            assert torch.autograd.gradcheck(lambda n, op=op: op(n, old, advantages, mask)[0], leaf)
        assert op(new, old.double(), advantages)[0].dtype == torch.float64


def test_opcheck_compile_and_second_derivative(backend: Backend) -> None:
    new, old, advantages, mask = case(backend, (3, 20))

    def op(n: Tensor, normalizer: Tensor | None = None):
        return policy_loss(n, old, advantages, mask, normalizer=normalizer, backend=backend.name)

    assert_compiled_is_eager(lambda n: op(2.0 * n), new)
    assert_compiled_is_eager(lambda n, z: op(n, z), new, torch.tensor(5.0, device=new.device))
    if backend.name != "ref":
        leaf = new.clone().requires_grad_()
        for tensor, number in ((None, None), (None, 4.0), (torch.tensor(4.0), None)):
            args = (leaf, old, advantages, mask, 0.2, tensor, number, True, backend.name)
            torch.library.opcheck(torch.ops.fastrlhf.policy_loss.default, args)
        assert_second_derivative_raises(op, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [0.0]}, "logprobs must be a tensor, got list"),
        ({"logprobs": torch.zeros(3).int()}, "logprobs must be fp32, bf16, fp16 or fp64"),
        ({"old_logprobs": torch.zeros(4)}, r"old_logprobs must have shape \(3,\), got \(4,\)"),
        ({"advantages": torch.zeros(3, 1)}, r"advantages must have shape \(3,\), got \(3, 1\)"),
        ({"advantages": torch.zeros(3, device="meta")}, "advantages must be on cpu, got meta"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(3,\), got \(4,\)"),
        ({"clip": -0.1}, r"clip must be in \[0.0, inf\], got -0.1"),
        ({"clip": None}, "clip must be a number, got NoneType"),
        ({"normalizer": 0}, r"normalizer must be in \(0.0, inf\], got 0"),
        ({"normalizer": torch.ones(1)}, "normalizer must be a number or a 0-d tensor"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict.fromkeys(("logprobs", "old_logprobs", "advantages"), torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        policy_loss(**(arguments | change))
