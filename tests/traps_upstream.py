"""Traps of what comes back to a loss: the upstream gradient of a 0-d tensor, and the normalizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import assert_same_bits
from torch import Tensor
from traps import Op, noise, trap

from fastrlhf_kernels.policy_loss import policy_loss_ref
from fastrlhf_kernels.ranking_loss import ranking_loss_ref
from fastrlhf_kernels.value_loss import value_loss_ref


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient  # save_for_backward would notice that it is written
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        first = grad_loss.as_strided((), (), 0)  # of the storage, not of the tensor
        return ctx.gradient.mul_(first), None, None


def made_in_the_forward(exact: Op) -> Op:
    """A loss that makes its gradient in the forward pass, as ours do, and naively keeps it.

    In the dtype of its argument, already divided; scaled in place, by the number where the upstream
    gradient's storage begins.
    """

    def loss(x: Tensor, *rest: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        leaf = x.detach().clone().requires_grad_()
        value, stats = exact(leaf, *rest, **settings)
        return _Scaled.apply(x, value.detach(), torch.autograd.grad(value, leaf)[0]), stats

    return loss


def _tokens(device: str) -> list[Tensor]:
    x, y, z = (0.3 * noise(5, 9, seed=s).to(device) for s in range(3))
    return [x, y, z, torch.arange(45, device=device).view(5, 9) % 4 > 0]


def _groups(device: str) -> list[Tensor]:
    ranks = torch.arange(14, device=device) * 5 % 7
    return [noise(14).to(device), ranks, torch.tensor([5, 1, 0, 8], device=device)]


Case = tuple[str, Op, Callable[[str], list[Tensor]]]
CASES: list[Case] = [
    ("policy_loss", policy_loss_ref, _tokens),
    ("value_loss", value_loss_ref, _tokens),
    ("ranking_loss", ranking_loss_ref, _groups),
]


def upstream_gradients_that_are_views(
    op: Op, device: str, arguments: Callable[[str], list[Tensor]]
) -> None:
    """Of a larger tensor, expanded, lazily negated; and a graph that is walked again and again."""
    x, *rest = arguments(device)
    x = x.clone().requires_grad_()
    loss = op(x, *rest)[0]
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert bool(once.any())
    once = once.clone()
    store = torch.tensor([9.0, 4.0, -9.0], device=device)  # a power of 2, which rounds nothing
    views = (
        store[1],
        store.view(1, 3)[0, 1:2].expand(4, 1, 1)[3, 0, 0],
        torch._neg_view(-store)[1],
        store[1].double(),
    )
    for upstream in views:
        (found,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        assert_same_bits(found, 4.0 * once)
    (found,) = torch.autograd.grad(torch.stack([loss.expand(2, 2), loss.expand(2, 2).T]).sum(), x)
    assert_same_bits(found, 8.0 * once)


def loss_scaling_of_fp16(op: Op, device: str, arguments: Callable[[str], list[Tensor]]) -> None:
    """What is small before it is scaled and after is not: 2^100 in the normalizer and upstream."""
    x, *rest = arguments(device)
    x = x.half()

    def gradient(scale: float, normalizer: float | Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss, _ = op(leaf, *rest, normalizer=normalizer)
        (found,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))
        assert found.dtype == torch.float16
        return found

    wanted = gradient(1.0, 1.0)
    assert bool(wanted.any())
    for normalizer in (2.0**100, torch.tensor(2.0**100, device=device)):
        assert_same_bits(gradient(2.0**100, normalizer), wanted)


def _add(check: Callable[..., None], op: str, exact: Op, arguments: Callable[..., Any]) -> None:
    def one(function: Op, device: str) -> None:
        check(function, device, arguments)

    one.__name__ = check.__name__
    trap(op, made_in_the_forward(exact))(one)


for case in CASES:
    for trapped in (upstream_gradients_that_are_views, loss_scaling_of_fp16):
        _add(trapped, *case)
