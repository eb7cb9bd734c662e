"""ranking_loss, forward and backward, beside a loop over groups in plain PyTorch.

    pytest bench/bench_ranking_loss.py

Bytes: scores and ranks read once, the gradient written once: 16 a score, and 8 a group. The work is
in the pairs: K (K - 1) / 2 a group, an exponential and a logarithm each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DEVICE
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrlhf_kernels import available_backends, ranking_loss
from fastrlhf_kernels.ranking_loss import ranking_loss_ref

OURS = "triton" if DEVICE == "cuda" else "cpu"


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


@pytest.mark.parametrize("G", [4, 64, 1024])
def test_ranking_loss(compare, G: int) -> None:
    generator = torch.Generator().manual_seed(0)
    group_sizes = torch.randint(4, 10, (G,), generator=generator)
    n = int(group_sizes.sum())
    scores = torch.randn(n, generator=generator).to(DEVICE).requires_grad_()
    ranks = torch.randint(0, 5, (n,), generator=generator).to(DEVICE)
    group_sizes = group_sizes.to(DEVICE)

    def both(f: Callable[..., Any], x: Tensor, **backend: str) -> tuple[Tensor, Tensor]:
        loss, _ = f(x, ranks, group_sizes, **backend)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    variants = {"loop over groups": lambda: both(loop, scores)}
    if n < 1000:  # it holds n * n numbers, many times
        variants["all pairs of all groups"] = lambda: both(ranking_loss_ref, scores)
    if OURS in available_backends():
        variants = {OURS: lambda: both(ranking_loss, scores, backend=OURS)} | variants
    compare(
        "ranking_loss",
        variants,
        shape=f"G={G} n={n}",
        dtype=scores.dtype,
        oracle=both(loop, scores.detach().double().requires_grad_()),
        tolerance=1e-5,
        bytes_moved=16 * n + 8 * G,
    )
