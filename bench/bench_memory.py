"""Peak memory of the linear heads, forward and backward, as the number of tokens doubles.

    pytest bench/bench_memory.py

What torch's allocator holds above the inputs; the gradients, H (N + V) numbers, are part of that.
V = 50257 in fp32 on a CPU, 151936 in bf16 on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from bench_linear_logprobs import functions
from common import DEVICE
from linear_cases import case
from peers import each
from torch import Tensor

H = 128
V, DTYPE = (151936, torch.bfloat16) if DEVICE == "cuda" else (50257, torch.float32)
TOKENS = [1024, 4096, 16384] if DEVICE == "cuda" else [256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("N", TOKENS)
def test_memory(compare, N: int) -> None:
    hidden, weight, labels = case(N, H, V, DTYPE)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    upstream = torch.ones(N, device=DEVICE)

    def both(f) -> tuple[Tensor, ...]:
        logprobs = f(*leaves, labels)
        return torch.autograd.grad(logprobs, leaves, upstream.to(logprobs.dtype))

    # Results are compared in bench_linear_logprobs.py.
    compare(
        "memory of a head",
        each(functions(), both),
        shape=f"N={N} H={H} V={V}",
        dtype=DTYPE,
        rounds=0,
    )
