"""shape_rewards beside the formula in plain PyTorch and compiled.

    pytest bench/bench_shape_rewards.py

Bytes: KL and mask read once, rewards written once: 9 a token in fp32.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from common import DEVICE

from fastrlhf_kernels import available_backends, shape_rewards
from fastrlhf_kernels.shape_rewards import shape_rewards_ref

OURS = "triton" if DEVICE == "cuda" else "cpu"
BYTES_A_TOKEN = 9


@pytest.mark.parametrize(("B", "T"), [(16, 128), (64, 1024)])
def test_shape_rewards(compare, B: int, T: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, generator=generator).to(DEVICE)
    kl = torch.randn(B, T, generator=generator).to(DEVICE)
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator).to(DEVICE)
    mask = torch.arange(T, device=DEVICE) < lengths
    settings = {"beta": 0.02, "clip": 5.0}
    compiled = torch.compile(shape_rewards_ref)
    variants = {
        "PyTorch": partial(shape_rewards_ref, scores, kl, mask, **settings),
        "torch.compile": partial(compiled, scores, kl, mask, **settings),
    }
    if OURS in available_backends():
        ours = partial(shape_rewards, scores, kl, mask, **settings, backend=OURS)
        variants = {OURS: ours} | variants
    compare(
        "shape_rewards",
        variants,
        shape=f"B={B} T={T}",
        dtype=kl.dtype,
        oracle=shape_rewards_ref(scores.double(), kl.double(), mask, **settings),
        tolerance=1e-5,
        bytes_moved=B * T * BYTES_A_TOKEN,
    )
