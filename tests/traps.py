"""A trap: a check, and the implementation that one writes first and that fails it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
Op = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Trap:
    """`check(function, device)` passes for a function that is right and fails for `naive`."""

    op: str
    name: str
    check: Callable[[Op, str], None]
    naive: Op
    not_on: tuple[str, ...] = ()  # backends of which the check says nothing


TRAPS: list[Trap] = []


def trap(
    op: str, naive: Op, *, not_on: tuple[str, ...] = ()
) -> Callable[[Callable[[Op, str], None]], Callable[[Op, str], None]]:
    """Makes a trap of a check."""

    def add(check: Callable[[Op, str], None]) -> Callable[[Op, str], None]:
        TRAPS.append(Trap(op, check.__name__, check, naive, not_on))
        return check

    return add


def loss_and_gradient(op: Op, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of an op that returns (loss, stats), and its gradient in the first argument."""
    x = x.clone().requires_grad_()
    loss = op(x, *rest)[0]
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def close(
    actual: Tensor, wanted: Tensor, relative: float = 1e-5, absolute: float = 0.0, nan: bool = False
) -> None:
    torch.testing.assert_close(
        actual.detach().cpu().double(),
        wanted.cpu().double(),
        rtol=relative,
        atol=absolute,
        equal_nan=nan,
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
