"""A vocabulary split over processes gives the values and gradients of the whole: two real ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastrlhf_kernels import available_backends, linear_logprobs
from fastrlhf_kernels._groups import reduce_max, reduce_min_index, shard_range

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SHARDS = (slice(0, 5), slice(5, 7))  # uneven


# What is asked of the head; in the second no label stands in the second shard, in the third a
# row's label and all of its probability stand in different ones.
CASES: list[dict[str, Any]] = [
    {"labels": [0, 6, 3, -100, 2, 4], "softcap": 3.0, "temperature": 0.7},
    {"labels": [0, 1, 3, -100, 2, 4], "temperature": [0.5, 1.0, 2.0, 0.7, 1.5, 0.9]},
    {"labels": [5, 6, -100, 5, 5, 6], "logit_scale": 40.0, "softcap": 30.0, "temperature": 0.25},
    {"labels": [-100] * 6},
]


def results(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, bias: Tensor,
    settings: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """Log-probs, entropy, and the gradients of a function of both."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    settings = {
        k: torch.tensor(v, dtype=torch.int64 if k == "labels" else torch.float64)
        if isinstance(v, list)
        else v
        for k, v in settings.items()
    }
    logprobs, entropy = function(*leaves[:2], bias=leaves[2], **settings)
    row_weights = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    (logprobs * row_weights + entropy * row_weights.flip(0)).sum().backward()
    return [logprobs.detach(), entropy.detach(), *(x.grad for x in leaves)]


def oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, logit_scale: float = 1.0,
    softcap: float | None = None, temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, all logits on one rank."""
    valid = labels != -100
    z = logit_scale * (hidden @ weight.T + bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = (z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
             ).log_softmax(-1)  # fmt: skip
    picked = log_p.gather(1, labels.where(valid, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    return picked.where(valid, 0.0), entropy.where(valid, 0.0)


def rank_main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (7, 4), (7,))
    hidden, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
    )
    mine = SHARDS[rank]
    for settings in CASES:
        if "softcap" not in settings:  # else it is -softcap
            bias[1] = -torch.inf
            settings = {**settings, "labels": [0 if y == 1 else y for y in settings["labels"]]}
        whole = results(oracle, hidden, weight, bias, settings)
        expected = [*whole[:3], whole[3][mine], whole[4][mine]]
        for backend in sorted({"ref", "cpu"} & set(available_backends())):
            sharded = partial(linear_logprobs, return_entropy=True, group=group, backend=backend)
            part = results(sharded, hidden, weight[mine], bias[mine], settings)
            for x, y in zip(part, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
            narrow = results(
                sharded, hidden.float(), weight[mine].float(), bias[mine].float(), settings
            )
            for x, y in zip(narrow, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4, check_dtype=False)
        bias[1] = 0.3
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
