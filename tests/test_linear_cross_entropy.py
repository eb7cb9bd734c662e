"""linear_cross_entropy against cross_entropy of the product in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_second_derivative_raises
from oracle import Backend, assert_accurate, assert_same_bits, reference_of_head
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastrlhf_kernels import (
    _linear_losses,
    available_backends,
    linear_cross_entropy,
    linear_logprobs,
)
from fastrlhf_kernels.linear_cross_entropy import linear_cross_entropy_ref

OP = "linear_cross_entropy"
INF, NAN = float("inf"), float("nan")
Leaves = tuple[Tensor, Tensor, Tensor | None]


def oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias=None, logit_scale=1.0, softcap=None,
    ignore_index=-100, normalizer=None,
) -> Tensor:  # fmt: skip
    """The definition in fp64: torch's cross_entropy of the logits."""
    valid = labels != ignore_index
    h = torch.where(valid[..., None], hidden.double(), 0.0).reshape(-1, hidden.shape[-1])
    z = logit_scale * linear(h, weight.double(), None if bias is None else bias.double())
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    total = cross_entropy(z, labels.reshape(-1), ignore_index=ignore_index, reduction="sum")
    return total / (valid.sum().clamp(min=1) if normalizer is None else normalizer)


def run(function, leaves: Leaves, labels: Tensor, factor: float = 1.0, **settings) -> list[Tensor]:
    """The loss, and the gradients of `factor` times it."""
    leaves = tuple(None if x is None else x.detach().clone().requires_grad_() for x in leaves)
    hidden, weight, bias = leaves
    loss = function(hidden, weight, labels, bias=bias, **settings)
    gradients = torch.autograd.grad(loss * factor, [x for x in leaves if x is not None])
    return [loss.detach(), *gradients]


def check(backend: Backend, leaves: Leaves, labels: Tensor, **settings) -> list[Tensor]:
    actual = run(linear_cross_entropy, leaves, labels, backend=backend.name, **settings)
    plain = reference_of_head(linear_cross_entropy_ref, backend, *leaves[:2])
    reference = run(plain, leaves, labels, **settings)
    wide = tuple(None if x is None else x.double() for x in leaves)
    expected = run(oracle, wide, labels, **settings)
    for a, r, o in zip(actual, reference, expected, strict=True):
        assert_accurate(a, r, o, interpreted=backend.interpreted)
    return actual


def case(
    N: int, H: int, V: int, backend: Backend, dtype=torch.float32, bias: bool = True, seed: int = 0
) -> tuple[Leaves, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 3.0 * H**-0.5
    shift = torch.randn(V, generator=generator) if bias else None
    labels = torch.randint(0, V, (N,), generator=generator).to(backend.device)
    leaves = (hidden, weight, shift)
    return tuple(None if x is None else x.to(dtype).to(backend.device) for x in leaves), labels


@given(
    V=st.sampled_from([1, 7, 37, 163]),
    H=st.sampled_from([1, 5, 32]),
    empty=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 4.0]),
    normalizer=st.sampled_from([None, 3, 7.5, "tensor"]),
    factor=st.sampled_from([1.0, -0.3]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, V, H, empty, dtype, bias, logit_scale, softcap, normalizer, factor, ignored,
    seed,
) -> None:  # fmt: skip
    N = 0 if empty else 8 if backend.interpreted else 24
    leaves, labels = case(N, H, V, backend, dtype, bias, seed)
    generator = torch.Generator().manual_seed(seed)
    labels[torch.rand(N, generator=generator).to(labels.device) < ignored] = -100
    if normalizer == "tensor":
        normalizer = torch.tensor(11.0, device=labels.device)
    check(
        backend, leaves, labels, factor=factor,
        logit_scale=logit_scale, softcap=softcap, normalizer=normalizer,
    )  # fmt: skip


def test_many_chunks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of rows, the last one short, several tiles of columns."""
    monkeypatch.setattr(_linear_losses, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(_linear_losses, "LEAST_ROWS", {"cpu": 8, "cuda": 8})
    leaves, labels = case(22, 16, 4099, backend)
    labels[3] = -100
    check(backend, leaves, labels)


def test_is_the_mean_of_linear_logprobs(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(9, 8, 37, backend)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend.name)
    logprobs = linear_logprobs(hidden, weight, labels, bias=bias, backend=backend.name)
    torch.testing.assert_close(loss, -logprobs.mean(), rtol=1e-6, atol=0.0)


def test_nothing_valid(backend: Backend) -> None:
    """No row, or none that counts: loss 0 and gradients 0, whatever the rows hold."""
    (hidden, weight, bias), labels = case(3, 8, 37, backend)
    for keep in (0, 3):
        leaves = (torch.full_like(hidden[:keep], NAN), weight, bias)
        found = run(
            linear_cross_entropy, leaves, torch.full_like(labels[:keep], -100),
            backend=backend.name,
        )  # fmt: skip
        assert not any(bool(x.any()) for x in found)


def test_ignored_rows_reach_nothing(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(6, 8, 37, backend)
    labels[[1, 4]] = -1
    settings = {"ignore_index": -1, "backend": backend.name}
    clean = run(linear_cross_entropy, (hidden, weight, bias), labels, **settings)
    hidden[1], hidden[4, 2] = NAN, INF
    found = run(linear_cross_entropy, (hidden, weight, bias), labels, **settings)
    for x, y in zip(found, clean, strict=True):
        assert_same_bits(x, y)


def test_gradient_is_made_where_it_is_wanted_alone(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, labels = case(5, 8, 37, backend)
    full = run(linear_cross_entropy, leaves, labels, backend=backend.name)[1:]
    for i in range(3):
        some = [x.detach().clone().requires_grad_(j == i) for j, x in enumerate(leaves)]
        linear_cross_entropy(
            some[0], some[1], labels, bias=some[2], backend=backend.name
        ).backward()
        assert [x.grad is not None for x in some] == [j == i for j in range(3)]
        torch.testing.assert_close(some[i].grad, full[i], rtol=1e-5, atol=1e-7)
    if backend.name == "ref":
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was made that nobody asked for")

    monkeypatch.setattr(_linear_losses, "backward_rows", refuse)
    linear_cross_entropy(leaves[0], leaves[1], labels, backend=backend.name)
    with torch.no_grad():
        linear_cross_entropy(leaves[0].requires_grad_(), leaves[1], labels, backend=backend.name)
    with pytest.raises(AssertionError, match="nobody asked"):
        linear_cross_entropy(leaves[0], leaves[1], labels, backend=backend.name)


def test_backward_twice(backend: Backend) -> None:
    """The gradient that was made in the forward pass is scaled, not used up."""
    leaves, labels = case(5, 8, 37, backend)
    hidden = leaves[0].requires_grad_()
    loss = linear_cross_entropy(hidden, leaves[1], labels, backend=backend.name)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(-2.0 * loss, hidden)
    assert_same_bits(second, -2.0 * first)


def test_the_gradient_is_given_away_only_once(backend: Backend) -> None:
    """Without a second backward pass to come it is scaled in place; with one it is copied."""
    leaves, labels = case(5, 8, 37, backend)
    hidden, weight = leaves[0].requires_grad_(), leaves[1].requires_grad_()

    def loss() -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, backend=backend.name)

    expected = torch.autograd.grad(3.0 * loss(), (hidden, weight))
    kept = 3.0 * loss()
    for keep in (True, True, False):
        found = torch.autograd.grad(kept, (hidden, weight), retain_graph=keep)
        for x, y in zip(found, expected, strict=True):
            assert_same_bits(x, y)
            x.zero_()  # what was given is the caller's to change
    if backend.name != "ref":
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(kept, hidden)
    once = loss()
    (once + once).backward()  # one pass through the graph, whatever leads to it
    torch.testing.assert_close(weight.grad, expected[1] * (2 / 3), rtol=1e-5, atol=1e-7)


def test_leading_dimensions(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(12, 8, 37, backend)
    flat = run(linear_cross_entropy, (hidden, weight, bias), labels, backend=backend.name)
    shaped = run(
        linear_cross_entropy, (hidden.reshape(3, 4, 8), weight, bias), labels.reshape(3, 4),
        backend=backend.name,
    )  # fmt: skip
    for x, y in zip(shaped, flat, strict=True):
        assert_same_bits(x.reshape(y.shape), y)
    cube = hidden.reshape(3, 4, 8)[:, :-1]
    sliced = linear_cross_entropy(cube, weight, labels.reshape(3, 4)[:, 1:], backend=backend.name)
    dense = linear_cross_entropy(
        cube.contiguous(), weight, labels.reshape(3, 4)[:, 1:].contiguous(), backend=backend.name
    )
    assert_same_bits(sliced, dense)


def test_repeats_and_autocast(backend: Backend) -> None:
    leaves, labels = case(9, 8, 163, backend)

    def autocast(*args: Tensor, **settings) -> Tensor:
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            return linear_cross_entropy(*args, **settings)

    first = run(linear_cross_entropy, leaves, labels, backend=backend.name)
    for function in (linear_cross_entropy, autocast):
        for x, y in zip(run(function, leaves, labels, backend=backend.name), first, strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("name", sorted({"ref", "cpu"} & set(available_backends())))
def test_gradcheck(name: str) -> None:
    leaves, labels = case(5, 3, 7, Backend(name, "cpu"), torch.float64)
    labels[2] = -100

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss = linear_cross_entropy(
            hidden, weight, labels, bias=bias, logit_scale=0.5, softcap=2.0, backend=name
        )
        assert loss.dtype == torch.float64
        return loss

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


def test_opcheck_and_compile(backend: Backend) -> None:
    leaves, labels = case(5, 8, 37, backend)
    labels[1] = -100
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    if backend.name != "ref":
        normalizer = torch.tensor(3.0, device=backend.device)
        for b, n in ((bias, None), (None, normalizer)):
            args = (hidden, weight, b, labels, n, None, 0.5, 3.0, -100, True, True, b is not None)
            torch.library.opcheck(
                torch.ops.fastrlhf.linear_cross_entropy.default, (*args, False, backend.name)
            )

    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return 3.0 * linear_cross_entropy(2.0 * h, w, y, bias=b, softcap=9.0, backend=backend.name)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, found = step(hidden, weight, bias, labels), compiled(hidden, weight, bias, labels)
    assert_same_bits(found, eager)
    gradients = (torch.autograd.grad(x, (hidden, weight, bias)) for x in (found, eager))
    for x, y in zip(*gradients, strict=True):
        assert_same_bits(x, y)


@pytest.mark.not_on("ref", "the reference has second derivatives")
def test_second_derivative_raises(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(3, 4, 7, backend)
    assert_second_derivative_raises(
        lambda x: linear_cross_entropy(x, weight, labels, bias=bias, backend=backend.name), hidden
    )


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_out_of_range(backend: Backend, label: int) -> None:
    if backend.device != "cpu":
        pytest.skip("on a GPU labels are checked with FASTRLHF_DEBUG=1 only")
    with pytest.raises(IndexError, match=rf"labels must be in \[0, 7\) .* got {label}"):
        linear_cross_entropy(
            torch.zeros(2, 4), torch.zeros(7, 4), torch.tensor([0, label]), backend=backend.name
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, r"weight must have shape \(7, 4\), got \(7, 5\)"),
        ({"weight": torch.zeros(0, 4)}, r"weight must have shape \(V, H\), V >= 1"),
        ({"labels": torch.zeros(3).long()}, r"labels must have shape \(2,\), got \(3,\)"),
        ({"normalizer": 0}, "normalizer must be in"),
        ({"normalizer": torch.ones(2)}, "normalizer must be a number or a 0-d tensor"),
        ({"backend": "cuda2"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(2).long()
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
