"""policy_loss, forward and backward, beside the formula in plain PyTorch and compiled.

    pytest bench/bench_policy_loss.py

Bytes: logprobs, old_logprobs, advantages and mask read once, the gradient written once: 17 a token
in fp32. (Ours writes it in the forward pass and scales it in the backward: 25.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DEVICE
from torch import Tensor

from fastrlhf_kernels import available_backends, policy_loss
from fastrlhf_kernels.policy_loss import policy_loss_ref

OURS = "triton" if DEVICE == "cuda" else "cpu"
BYTES_A_TOKEN = 17


@pytest.mark.parametrize("N", [2048, 65536])
def test_policy_loss(compare, N: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, *data = (0.3 * torch.randn(N, generator=generator).to(DEVICE) for _ in range(3))
    mask = torch.rand(N, generator=generator).to(DEVICE) > 0.3
    logprobs.requires_grad_()

    def both(f: Callable[..., Any], x: Tensor, **backend: str) -> tuple[Tensor, Tensor]:
        loss, _ = f(x, *(t.to(x.dtype) for t in data), mask, **backend)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    compiled = torch.compile(policy_loss_ref)
    variants = {
        "PyTorch": lambda: both(policy_loss_ref, logprobs),
        "torch.compile": lambda: both(compiled, logprobs),
    }
    if OURS in available_backends():
        variants = {OURS: lambda: both(policy_loss, logprobs, backend=OURS)} | variants
    compare(
        "policy_loss",
        variants,
        shape=f"N={N}",
        dtype=logprobs.dtype,
        oracle=both(policy_loss_ref, logprobs.detach().double().requires_grad_()),
        tolerance=1e-5,
        bytes_moved=N * BYTES_A_TOKEN,
    )
