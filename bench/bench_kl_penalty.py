"""kl_penalty, forward and backward, beside the formula in plain PyTorch and compiled.

    pytest bench/bench_kl_penalty.py

Bytes: forward reads both log-probs and writes the estimate; backward reads the upstream gradient
and both again and writes one gradient: 28 a token in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import DEVICE
from torch import Tensor

from fastrlhf_kernels import available_backends, kl_penalty
from fastrlhf_kernels.kl_penalty import kl_penalty_ref

OURS = "triton" if DEVICE == "cuda" else "cpu"
BYTES_A_TOKEN = 28


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("N", [2048, 65536])
def test_kl_penalty(compare, estimator: str, N: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, reference, upstream = (
        torch.randn(N, generator=generator).to(DEVICE) for _ in range(3)
    )
    logprobs.requires_grad_()

    def both(f: Callable[..., Tensor], x: Tensor, **backend: str) -> tuple[Tensor, Tensor]:
        kl = f(x, reference.to(x.dtype), estimator=estimator, **backend)
        return kl.detach(), torch.autograd.grad(kl, x, upstream.to(x.dtype))[0]

    compiled = torch.compile(kl_penalty_ref)
    variants = {
        "PyTorch": lambda: both(kl_penalty_ref, logprobs),
        "torch.compile": lambda: both(compiled, logprobs),
    }
    if OURS in available_backends():
        variants = {OURS: lambda: both(kl_penalty, logprobs, backend=OURS)} | variants
    compare(
        "kl_penalty",
        variants,
        shape=f"{estimator} N={N}",
        dtype=logprobs.dtype,
        oracle=both(kl_penalty_ref, logprobs.detach().double().requires_grad_()),
        tolerance=1e-3,
        bytes_moved=N * BYTES_A_TOKEN,
    )
