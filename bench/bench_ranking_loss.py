"""ranking_loss, forward and backward, beside three ways to write it in plain PyTorch.

    pytest bench/bench_ranking_loss.py

- a loop over groups, all pairs of one at once;
- padded: scores and ranks scattered into (G, Kmax), the pairs of all groups as (G, Kmax, Kmax);
- pair lists: the index of each pair's two outputs, made from the sizes, and one gather, one sum.

The last two are the best vectorised ones that we found. All start from the op's own arguments. The
loop and the specification, which take milliseconds and leave cold caches, are compared apart.
Bytes: scores and ranks read once, the gradient written once: 16 a score, and 8 a group. The work is
in the pairs: K (K - 1) / 2 a group, an exponential and a logarithm each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DEVICE, ours
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrlhf_kernels import ranking_loss
from fastrlhf_kernels.ranking_loss import ranking_loss_ref

K_MIN, K_MAX = 4, 9  # Ouyang et al. 2022


def loop(scores: Tensor, ranks: Tensor, group_sizes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A group at a time, all its pairs at once."""
    losses = []
    sizes = group_sizes.tolist()
    for s, r in zip(scores.split(sizes), ranks.split(sizes), strict=True):
        decided = r[:, None] < r[None, :]
        margin = s[:, None] - s[None, :]
        pairs = max(len(s) * (len(s) - 1) // 2, 1)
        losses.append(-torch.where(decided, logsigmoid(margin), 0.0).sum() / pairs)
    return torch.stack(losses).mean(), {}


def padded(scores: Tensor, ranks: Tensor, group_sizes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """All pairs of all groups at once, each group padded to K_MAX."""
    there = torch.arange(K_MAX, device=scores.device) < group_sizes[:, None]
    s = torch.zeros(there.shape, dtype=scores.dtype, device=scores.device)
    s = s.masked_scatter(there, scores)
    last = torch.iinfo(ranks.dtype).max
    r = torch.full(there.shape, last, device=scores.device).masked_scatter(there, ranks)
    # A padded output ties with the others and ranks below all: it wins nothing, and may not lose.
    decided = (r[:, :, None] < r[:, None, :]) & there[:, None, :]
    weight = (2.0 / (group_sizes * (group_sizes - 1)).clamp(min=1)).to(scores.dtype)
    margin = s[:, :, None] - s[:, None, :]
    cost = torch.where(decided, logsigmoid(margin), 0.0).sum((1, 2))
    with torch.no_grad():
        pairs = decided.sum()
        accuracy = (decided & (margin > 0)).sum() / pairs
    return -(cost @ weight) / len(group_sizes), {"pair_accuracy": accuracy, "pairs": pairs}


def pair_lists(
    scores: Tensor, ranks: Tensor, group_sizes: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pairs alone, one after another: the first output's index and the second's."""
    first, second = torch.triu_indices(K_MAX, K_MAX, 1, device=scores.device)
    group, pair = (second < group_sizes[:, None]).nonzero(as_tuple=True)
    start = (group_sizes.cumsum(0) - group_sizes)[group]
    i, j = start + first[pair], start + second[pair]
    sign = (ranks[j] - ranks[i]).sign().to(scores.dtype)  # 1: i is the better; 0: a tie
    margin = sign * (scores[i] - scores[j])
    weight = (2.0 / (group_sizes * (group_sizes - 1)).clamp(min=1)).to(scores.dtype)
    total = logsigmoid(margin) @ (weight[group] * sign.abs())
    with torch.no_grad():
        pairs = sign.abs().sum()
        accuracy = (margin > 0).sum() / pairs
    return -total / len(group_sizes), {"pair_accuracy": accuracy, "pairs": pairs}


@pytest.mark.parametrize("G", [4, 64, 1024])
@pytest.mark.parametrize("peers", ["vectorised", "slow"])
def test_ranking_loss(compare, G: int, peers: str) -> None:
    generator = torch.Generator().manual_seed(0)
    group_sizes = torch.randint(K_MIN, K_MAX + 1, (G,), generator=generator)
    n = int(group_sizes.sum())
    scores = torch.randn(n, generator=generator).to(DEVICE).requires_grad_()
    ranks = torch.randint(0, 5, (n,), generator=generator).to(DEVICE)
    group_sizes = group_sizes.to(DEVICE)

    def both(f: Callable[..., Any], x: Tensor, **backend: str) -> tuple[Tensor, Tensor]:
        loss, _ = f(x, ranks, group_sizes, **backend)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    names = ours("ranking_loss")
    variants: dict[str, Callable[[], Any]] = {
        name: lambda name=name: both(ranking_loss, scores, backend=name) for name in names
    }
    if peers == "vectorised":
        variants["padded"] = lambda: both(padded, scores)
        variants["pair lists"] = lambda: both(pair_lists, scores)
    else:
        variants["loop over groups"] = lambda: both(loop, scores)
        if n < 1000:  # it holds n * n numbers, many times
            variants["all pairs of all groups"] = lambda: both(ranking_loss_ref, scores)
    compare(
        "ranking_loss",
        variants,
        shape=f"G={G} n={n}",
        dtype=scores.dtype,
        oracle=both(loop, scores.detach().double().requires_grad_()),
        tolerance=1e-5,
        bytes_moved=16 * n + 8 * G,
        rounds=41 if peers == "vectorised" else 15,
    )
