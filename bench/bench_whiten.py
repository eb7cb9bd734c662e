"""whiten beside the usual masked form in plain PyTorch and compiled.

    pytest bench/bench_whiten.py

Bytes: x and mask read once, the result written once: 9 an entry in fp32. (The moments must be known
before anything is written, so that a large x is read twice, from cache where it fits.)
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE
from torch import Tensor

from fastrlhf_kernels import available_backends, whiten

OURS = "triton" if DEVICE == "cuda" else "cpu"
BYTES_AN_ENTRY = 9


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Masked sums in the dtype of x, as the trainers write it."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    centred = x - mean
    var = (centred * centred * mask).sum() / n
    return centred * torch.rsqrt(var + 1e-8) * mask


@pytest.mark.parametrize("N", [2048, 65536, 1 << 22])
def test_whiten(compare, N: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, generator=generator).to(DEVICE)
    mask = torch.rand(N, generator=generator).to(DEVICE) > 0.3
    compiled = torch.compile(masked_whiten)
    variants = {
        "PyTorch": lambda: masked_whiten(x, mask),
        "torch.compile": lambda: compiled(x, mask),
    }
    if OURS in available_backends():
        variants = {OURS: lambda: whiten(x, mask, backend=OURS)} | variants
    compare(
        "whiten",
        variants,
        shape=f"N={N}",
        dtype=x.dtype,
        oracle=masked_whiten(x.double(), mask),
        tolerance=1e-4,
        bytes_moved=N * BYTES_AN_ENTRY,
    )
