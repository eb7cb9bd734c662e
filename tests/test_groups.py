"""A vocabulary split over processes gives the values and gradients of the whole: two real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf_kernels import available_backends, linear_logprobs
from fastrlhf_kernels._groups import reduce_max, reduce_min_index, shard_range

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SHARDS = (slice(0, 5), slice(5, 7))  # uneven


def head(hidden: Tensor, weight: Tensor, bias: Tensor, group: object, backend: str) -> list[Tensor]:
    """Log-probs, entropy, and the gradients of a function of both."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    labels = torch.tensor([0, 6, 3, -100, 2, 4])
    logprobs, entropy = linear_logprobs(
        leaves[0],
        leaves[1],
        labels,
        bias=leaves[2],
        softcap=3.0,
        temperature=0.7,
        return_entropy=True,
        group=group,
        backend=backend,
    )
    row_weights = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    (logprobs * row_weights + entropy * row_weights.flip(0)).sum().backward()
    return [logprobs.detach(), entropy.detach(), *(x.grad for x in leaves)]


def rank_main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (7, 4), (7,))
    hidden, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
    )
    bias[1] = -torch.inf
    mine = SHARDS[rank]
    for backend in sorted({"ref", "cpu"} & set(available_backends())):
        whole = head(hidden, weight, bias, None, backend)
        part = head(hidden, weight[mine], bias[mine], group, backend)
        expected = [*whole[:3], whole[3][mine], whole[4][mine]]
        for x, y in zip(part, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    with pytest.raises(IndexError, match=r"labels must be in \[0, 7\)"):
        linear_logprobs(hidden, weight[mine], torch.full((6,), 7), group=group)

    first, total = shard_range(mine.stop - mine.start, hidden.device, group)
    assert (int(first), int(total)) == (mine.start, 7)
    x = torch.tensor([[1.0, torch.nan, -torch.inf], [2.0, 3.0, -torch.inf]])[rank]
    expected_max = torch.tensor([2.0, torch.nan, -torch.inf])
    torch.testing.assert_close(reduce_max(x, group), expected_max, equal_nan=True)
    assert int(reduce_min_index(torch.tensor(rank + 3), group)) == 3
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
