"""gae_varlen beside padding the sequences, a loop over time, and packing them again.

    pytest bench/bench_gae_varlen.py

Bytes: rewards and values read once, advantages and returns written once: 16 a step in fp32.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE, ours

from fastrlhf_kernels import gae_varlen
from fastrlhf_kernels.gae_varlen import gae_varlen_ref


@pytest.mark.parametrize(("G", "longest"), [(64, 1024), (1024, 1024), (4096, 2048)])
def test_gae_varlen(compare, G: int, longest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (G,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    total = int(cu_seqlens[-1])
    rewards, values = (torch.randn(total, generator=generator).to(DEVICE) for _ in range(2))
    variants = {
        name: lambda name=name: gae_varlen(rewards, values, cu_seqlens, backend=name)
        for name in ours("gae_varlen")
    }
    variants["pad, loop, pack"] = lambda: gae_varlen_ref(rewards, values, cu_seqlens)
    oracle = gae_varlen(rewards.double(), values.double(), cu_seqlens, backend="ref")
    compare(
        "gae_varlen",
        variants,
        shape=f"G={G} sum T={total}",
        dtype=rewards.dtype,
        oracle=oracle,
        tolerance=1e-3,
        bytes_moved=total * 16,
    )
