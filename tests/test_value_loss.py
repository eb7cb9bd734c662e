"""value_loss against a loop over tokens in fp64."""

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

from fastrlhf_kernels import available_backends, value_loss
from fastrlhf_kernels.value_loss import value_loss_ref

OP = "value_loss"
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def variance(x: list[float]) -> float:
    mean = math.fsum(x) / max(len(x), 1)
    return math.fsum((e - mean) ** 2 for e in x) / max(len(x), 1)


def oracle(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor | None, clip, normalizer
) -> tuple[dict[str, float], Tensor, float]:
    """(loss and stats, gradient, size of the explained variance's second term)."""
    v, o, r = (t.double().cpu().flatten().tolist() for t in (values, old, returns))
    n = len(v)
    valid = [True] * n if mask is None else (mask.cpu() != 0).flatten().tolist()
    entries = [t for t in range(n) if valid[t]]
    divisor = len(entries) if normalizer is None else float(normalizer)
    losses, clips, gradient = [], 0, [0.0] * n
    for t in entries:
        held = v[t] if clip is None else max(o[t] - clip, min(o[t] + clip, v[t]))
        plain, clipped = (v[t] - r[t]) ** 2, (held - r[t]) ** 2
        losses.append(max(plain, clipped) / 2)
        clips += clipped > plain
        gradient[t] = (v[t] - r[t]) / divisor if clipped <= plain else 0.0
    spread = variance([r[t] for t in entries])
    left = variance([r[t] - v[t] for t in entries]) / spread if spread > 0.0 else 0.0
    expected = {
        "loss": math.fsum(losses) / divisor if entries else 0.0,
        "clip_fraction": clips / max(len(entries), 1),
        "explained_variance": 1.0 - left if spread > 0.0 else 0.0,
    }
    return expected, torch.tensor(gradient, dtype=torch.float64).reshape(values.shape), left


def case(backend: Backend, shape: tuple[int, ...], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old, noise, more = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.rand(shape, generator=generator) > 0.3
    return tuple(x.to(backend.device) for x in (old + 0.3 * noise, old, old + more, mask))


def check(backend: Backend, values, old, returns, mask, *, clip=0.2, normalizer=None) -> None:
    found = []
    for f in (partial(value_loss, backend=backend.name), value_loss_ref):
        leaf = values.clone().requires_grad_()
        loss, stats = f(leaf, old, returns, mask, clip=clip, normalizer=normalizer)
        (gradient,) = torch.autograd.grad(3.0 * loss, leaf)
        assert not any(s.requires_grad for s in stats.values())
        found.append(({"loss": loss} | stats, gradient))
    (actual, actual_gradient), (reference, reference_gradient) = found
    expected, gradient, left = oracle(values, old, returns, mask, clip, normalizer)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        exact = torch.tensor(value, dtype=torch.float64)
        terms = 1.0 + left if name == "explained_variance" else 0.0  # of a difference
        assert_accurate(actual[name], reference[name], exact, terms=terms)
    assert_accurate(
        actual_gradient, reference_gradient, 3.0 * gradient, interpreted=backend.interpreted
    )


@given(
    shape=st.sampled_from([(), (0,), (1,), (7,), (33,), (2, 3, 5), (3, 0)]),
    clip=st.sampled_from([None, 0.0, 0.2, 5.0]),
    normalizer=st.sampled_from([None, 7, 0.5, torch.tensor(11), torch.tensor(2.5)]),
    mask_dtype=st.sampled_from([None, torch.bool, torch.int64, torch.uint8, torch.float32]),
    dtype=st.sampled_from(DTYPES),
    data_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, shape, clip, normalizer, mask_dtype, dtype, data_dtype, seed
) -> None:
    values, old, returns, mask = case(backend, shape, seed)
    check(
        backend,
        values.to(dtype),
        old.to(data_dtype),
        returns.to(data_dtype),
        None if mask_dtype is None else mask.to(mask_dtype),
        clip=clip,
        normalizer=normalizer,
    )


@pytest.mark.parametrize("normalizer", [None, 7.0, torch.tensor(7.0)])
def test_many_tiles(backend: Backend, normalizer) -> None:
    """Several tiles of any backend, one of them without a valid entry, and a rest."""
    values, old, returns, mask = case(backend, (4500,))
    mask[1024:2048] = False
    check(backend, values, old, returns, mask, normalizer=normalizer)


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_explained_variance_of_large_returns(backend: Backend, offset: float) -> None:
    """Exact although mean and values are large: both variances are of differences."""
    _, old, returns, mask = case(backend, (3000,))
    returns = returns + offset
    values = returns + 0.25 * torch.round(4.0 * old)  # so that R - v is exact
    _, stats = value_loss(values, old, returns, mask, backend=backend.name)
    expected, *_ = oracle(values, old, returns, mask, 0.2, None)
    exact = expected["explained_variance"]
    assert abs(float(stats["explained_variance"]) - exact) < 3e-7 * (1.0 + abs(exact))


@pytest.mark.parametrize("n", [3, 1999])
def test_equal_returns_have_nothing_to_explain(backend: Backend, n: int) -> None:
    values, old, _, _ = case(backend, (n,))
    returns = torch.full_like(values, 0.1)
    _, stats = value_loss(values, old, returns, backend=backend.name)
    assert float(stats["explained_variance"]) == 0.0


def test_perfect_values(backend: Backend) -> None:
    _, old, returns, mask = case(backend, (40,))
    loss, stats = value_loss(returns, old, returns, mask, clip=None, backend=backend.name)
    found = {"loss": loss} | stats
    assert {k: float(v) for k, v in found.items()} == {
        "loss": 0.0,
        "clip_fraction": 0.0,
        "explained_variance": 1.0,
    }


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_masked_reaches_nothing(backend: Backend, bad: float, clip) -> None:
    values, old, returns, mask = case(backend, (4, 12))
    mask[2] = False
    mask[0, 0] = False  # also in the first place, from which moments are shifted

    def op(*args: Tensor):
        return value_loss(*args, mask, clip=clip, backend=backend.name)

    clean = with_gradients(op, values, old, returns)
    poisoned = (x.masked_fill(~mask, bad) for x in (values, old, returns))
    for x, y in zip(with_gradients(op, *poisoned), clean, strict=True):
        assert_same_bits(x, y)
    assert not clean[-1][~mask].any()


def test_an_old_value_of_nan_clips_nothing(backend: Backend) -> None:
    values, old, returns, mask = case(backend, (40,))
    op = partial(value_loss, backend=backend.name)
    found = with_gradients(lambda v: op(v, NAN * old, returns, mask), values)
    plain = with_gradients(lambda v: op(v, old, returns, mask, clip=None), values)
    for x, y in zip(found, plain, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("which", [0, 2])
def test_a_valid_nan_shows(backend: Backend, which: int) -> None:
    args = list(case(backend, (40,)))
    args[which][3], args[3][3] = NAN, True
    loss, stats = value_loss(*args, backend=backend.name)
    reference = value_loss_ref(*args)[1]["clip_fraction"]
    torch.testing.assert_close(stats["clip_fraction"], reference, rtol=1e-6, atol=0.0)
    assert loss.isnan()
    assert stats["explained_variance"].isnan()


def test_without_clip_old_values_do_not_count(backend: Backend) -> None:
    values, old, returns, mask = case(backend, (40,))
    loss, stats = value_loss(values, NAN * old, returns, mask, clip=None, backend=backend.name)
    expected = 0.5 * ((values - returns)[mask].double() ** 2).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    assert float(stats["clip_fraction"]) == 0.0


@pytest.mark.parametrize("normalizer", [None, 3, torch.tensor(0), torch.tensor(NAN)])
def test_nothing_valid(backend: Backend, normalizer) -> None:
    values, old, returns, mask = case(backend, (40,))
    leaf = (NAN * values).requires_grad_()
    loss, stats = value_loss(
        leaf, old, returns, torch.zeros_like(mask), normalizer=normalizer, backend=backend.name
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(float(s) for s in stats.values())
    assert torch.equal(leaf.grad, torch.zeros_like(values))


def test_layouts(backend: Backend) -> None:
    values, old, returns, mask = case(backend, (4, 33))
    op = partial(value_loss, backend=backend.name)
    assert_layout_changes_no_bit(op, values, old, returns, mask.float())
    assert_layout_changes_no_bit(
        lambda v, o, r, m: op(v, o, r, m != 0), values, old, returns, mask.float()
    )
    row = tuple(x[:1].expand(4, 33) for x in (values, old, returns, mask))
    for x, y in zip(
        with_gradients(lambda v: op(v, *row[1:]), row[0]),
        with_gradients(lambda v: op(v, *(t.contiguous() for t in row[1:])), row[0].contiguous()),
        strict=True,
    ):
        assert_same_bits(x, y)


def test_rows_far_apart(backend: Backend) -> None:
    *args, mask = case(backend, (2, 40))
    args = [x.half() for x in args]
    op = partial(value_loss, backend=backend.name)
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
    op = partial(value_loss, normalizer=3.0, backend=backend.name)
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
    op = partial(value_loss, normalizer=3.0, backend=backend.name)
    *_, clean = with_gradients(lambda x: op(x, *args[1:], mask), args[0])
    args[which][3] = bad
    *_, spoilt = with_gradients(lambda x: op(x, *args[1:], mask), args[0])
    others = torch.arange(40, device=mask.device) != 3
    assert_same_bits(spoilt[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_the_normalizers_dtype_is_not_the_losss(backend: Backend, dtype: torch.dtype) -> None:
    args = case(backend, (40,))
    op = partial(value_loss, *args, backend=backend.name)
    normalizer = torch.tensor(7, device=args[0].device).to(dtype)
    loss, _ = op(normalizer=normalizer)
    assert loss.dtype == torch.float32
    assert_same_bits(loss, op(normalizer=float(normalizer))[0])


def test_gradient_reaches_values_alone(backend: Backend) -> None:
    values, old, returns, mask = case(backend, (40,))
    leaves = [x.requires_grad_() for x in (values, old, returns)]
    normalizer = torch.tensor(5.0, requires_grad=True)
    loss, _ = value_loss(*leaves, mask, normalizer=normalizer, backend=backend.name)
    loss.backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None
    assert normalizer.grad is None
    with torch.no_grad():
        again, _ = value_loss(*leaves, mask, normalizer=normalizer, backend=backend.name)
    assert not again.requires_grad
    assert_same_bits(again, loss.detach())


def test_repeats(backend: Backend) -> None:
    *args, mask = case(backend, (5000 if backend.interpreted else 100_000,))
    before = [x.clone() for x in args]
    assert_repeats(backend, lambda *a: value_loss(*a, mask, backend=backend.name), *args)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_gradcheck() -> None:
    values, old, returns, mask = case(Backend("cpu", "cpu"), (4, 6))
    leaf = values.double().requires_grad_()
    for name in {"ref", "cpu"} & set(available_backends()):
        for clip, normalizer in ((0.2, None), (None, 3.0), (0.2, torch.tensor(3.0))):
            op = partial(value_loss, clip=clip, normalizer=normalizer, backend=name)
            assert torch.autograd.gradcheck(lambda v, op=op: op(v, old, returns, mask)[0], leaf)
        assert op(values, old.double(), returns)[0].dtype == torch.float64


def test_opcheck_compile_and_second_derivative(backend: Backend) -> None:
    values, old, returns, mask = case(backend, (3, 20))

    def op(v: Tensor, normalizer: Tensor | None = None):
        return value_loss(v, old, returns, mask, normalizer=normalizer, backend=backend.name)

    assert_compiled_is_eager(lambda v: op(2.0 * v), values)
    normalizer = torch.tensor(5.0, device=values.device)
    assert_compiled_is_eager(lambda v, z: op(v, z), values, normalizer)
    if backend.name != "ref":
        leaf = values.clone().requires_grad_()
        for clip, tensor, number in ((None, None, None), (0.2, None, 4.0), (0.2, normalizer, None)):
            args = (leaf, old, returns, mask, clip, tensor, number, True, backend.name)
            torch.library.opcheck(torch.ops.fastrlhf.value_loss.default, args)
        assert_second_derivative_raises(op, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [0.0]}, "values must be a tensor, got list"),
        ({"values": torch.zeros(3).int()}, "values must be fp32, bf16, fp16 or fp64"),
        ({"old_values": torch.zeros(4)}, r"old_values must have shape \(3,\), got \(4,\)"),
        ({"returns": torch.zeros(3, 1)}, r"returns must have shape \(3,\), got \(3, 1\)"),
        ({"returns": torch.zeros(3, device="meta")}, "returns must be on cpu, got meta"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(3,\), got \(4,\)"),
        ({"clip": -0.1}, r"clip must be in \[0.0, inf\], got -0.1"),
        ({"clip": "x"}, "clip must be a number, got str"),
        ({"normalizer": 0}, r"normalizer must be in \(0.0, inf\], got 0"),
        ({"normalizer": torch.ones(1)}, "normalizer must be a number or a 0-d tensor"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict.fromkeys(("values", "old_values", "returns"), torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        value_loss(**(arguments | change))
