"""Reductions and a gather over a process group; the former are identities where it is None.

Gradients follow the tensor-parallel convention: every rank computes the same loss from the reduced
values, so the gradient of a sum goes unchanged to each rank's part (`reduce_sum`), and a tensor
that every rank holds a copy of gets the sum of the ranks' gradients (`copy_to_group`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which a torch without distributed does not have


class _ReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def reduce_sum(x: Tensor, group: Group | None) -> Tensor:
    """The sum of every rank's `x`; differentiable."""
    return x if group is None else _ReduceSum.apply(x, group)


def copy_to_group(x: Tensor, group: Group | None) -> Tensor:
    """`x` itself, the same on every rank; its gradient is summed over the ranks."""
    return x if group is None else _CopyToGroup.apply(x, group)


def reduce_max(x: Tensor, group: Group | None) -> Tensor:
    """The elementwise maximum over the ranks, NaN where any rank has NaN; not differentiable."""
    x = x.detach()
    if group is None:
        return x
    nan = x.isnan().to(torch.int32)  # all_reduce(MAX) does not promise to keep NaN
    top = torch.where(x.isnan(), -torch.inf, x)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(nan, op=dist.ReduceOp.MAX, group=group)
    return torch.where(nan != 0, torch.nan, top)


def reduce_min_index(x: Tensor, group: Group | None) -> Tensor:
    """The elementwise minimum of an integer tensor over the ranks."""
    if group is None:
        return x
    least = x.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return least


def gather(x: Tensor, group: Group) -> Tensor:
    """Every rank's `x`, stacked in rank order; not differentiable."""
    x = x.detach().contiguous()
    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    # Flat on both sides: gloo refuses to gather x into a stack of x's shape.
    dist.all_gather_into_tensor(parts.view(-1), x.view(-1), group=group)
    return parts


def shard_range(size: int, device: torch.device, group: Group | None) -> tuple[Tensor, Tensor]:
    """(first, total): where this rank's shard of `size` rows begins, and the rows of all ranks."""
    if group is None:
        return torch.zeros((), dtype=torch.int64, device=device), torch.full(
            (), size, dtype=torch.int64, device=device
        )
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    rank = dist.get_rank(group)
    sizes[rank] = size
    dist.all_reduce(sizes, group=group)
    return sizes[:rank].sum(), sizes.sum()
