"""Checks that the tests of the small ops share: layouts, derivatives, tracing, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import Backend, assert_same_bits
from torch import Tensor

Tensors = tuple[Tensor, ...]


def layouts(*tensors: Tensor) -> Iterator[Tensors]:
    """The same (B, T) values transposed, sliced, with gaps, and off the alignment of vectors."""
    yield tuple(x.T.contiguous().T for x in tensors)
    yield tuple(torch.stack([x, x], -1)[..., 1] for x in tensors)
    yield tuple(torch.cat([x, x], 1)[:, : x.shape[1]] for x in tensors)
    yield tuple(torch.cat([x[0, :1], x.flatten()])[1:].view_as(x) for x in tensors)


def far_apart(x: Tensor) -> Tensor:
    """The last row 2^31 elements past the first, on pages of which few are ever touched.

    Two rows are 2^31 apart: a stride that is no int32. Three are 2^30 apart, a stride that is one,
    and whose product with the row is none: what a kernel that counts in int32 gets wrong.
    """
    far = 2**31 // (len(x) - 1)
    wide = torch.empty(2**31 + x.shape[1], dtype=x.dtype, device=x.device)
    return wide.as_strided(x.shape, (far, 1)).copy_(x)


def outputs(result: Any) -> list[Tensor]:
    """The tensors of an op's result, a loss's statistics included."""
    if isinstance(result, Tensor):
        return [result]
    loss, stats = result
    return [loss, *stats.values()]


def with_gradients(op: Callable[..., Any], *args: Tensor, wanted: int = 1) -> list[Tensor]:
    """An op's results and the gradients of its first `wanted` arguments, for uneven weights."""
    args = tuple(x.detach().requires_grad_(i < wanted) for i, x in enumerate(args))
    found = outputs(op(*args))
    weights = torch.linspace(0.5, 2.0, max(found[0].numel(), 1), device=found[0].device)
    total = (found[0].flatten() * weights[: found[0].numel()]).sum()
    return [x.detach() for x in found] + list(torch.autograd.grad(total, args[:wanted]))


def assert_layout_changes_no_bit(op: Callable[..., Any], *args: Tensor, wanted: int = 1) -> None:
    expected = with_gradients(op, *args, wanted=wanted)
    for odd in layouts(*args):
        for x, y in zip(with_gradients(op, *odd, wanted=wanted), expected, strict=True):
            assert_same_bits(x, y)


def assert_upstream_layout_changes_no_bit(
    op: Callable[..., Any], *args: Tensor, wanted: int = 1
) -> None:
    """Upstream gradients of a (B, T) result that are laid out in other ways, stride 0 included."""
    args = tuple(x.detach().requires_grad_(i < wanted) for i, x in enumerate(args))
    result = op(*args)
    weights = torch.linspace(-1.0, 2.0, result.numel(), device=result.device).view_as(result)
    row, column = weights[:1].expand_as(result), weights[:, :1].expand_as(result)
    one = weights[0, 1].expand_as(result)
    for dense, odd in (
        *((weights, odd) for (odd,) in layouts(weights)),
        *((x.contiguous(), x) for x in (row, column, one)),
    ):
        expected = torch.autograd.grad(result, args[:wanted], dense, retain_graph=True)
        found = torch.autograd.grad(result, args[:wanted], odd, retain_graph=True)
        for x, y in zip(found, expected, strict=True):
            assert_same_bits(x, y)


def assert_second_derivative_raises(op: Callable[..., Any], x: Tensor) -> None:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(outputs(op(x))[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        first.sum().backward()


def assert_compiled_is_eager(op: Callable[..., Any], *args: Tensor, wanted: int = 1) -> None:
    """One graph, the same bits in results and gradients."""
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager = with_gradients(op, *args, wanted=wanted)
    for x, y in zip(with_gradients(compiled, *args, wanted=wanted), eager, strict=True):
        assert_same_bits(x, y)


def assert_repeats(
    backend: Backend, op: Callable[..., Any], *args: Tensor, wanted: int = 1
) -> None:
    """The same bits run after run; with one thread or four, where the threads are our own."""
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1) if backend.name == "ref" else (1, 1, 4):
            torch.set_num_threads(threads)
            runs.append(with_gradients(op, *args, wanted=wanted))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for x, y in zip(run, runs[0], strict=True):
            assert_same_bits(x, y)
