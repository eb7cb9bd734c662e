"""linear_logprobs beside bare products, PyTorch's forms, compiled too, and TRL's chunked head.

    pytest bench/bench_linear_logprobs.py

FLOPs: 2 N V H forward (one product), 8 N V H with the backward pass, which makes the logits again.
The row "bare products" is that many of them into preallocated outputs: see linear_cases.py. Peak
memory of forward + backward includes the gradients, 4 H (N + V) bytes in fp32.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE, Missing, ours
from linear_cases import case, cases, products
from peers import each, trl_chunked_head
from torch import Tensor

from fastrlhf_kernels import linear_logprobs

CASES = cases(
    cpu=[(2048, 128, 163)],
    gpu=[(4096, 2048, 50257), (4096, 4096, 131072), (8192, 4096, 151936)],
)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def functions() -> dict:
    found = {
        name: lambda h, w, y, name=name: linear_logprobs(h, w, y, backend=name)
        for name in ours("linear_logprobs")
    }
    found["product, log_softmax, gather"] = plain
    found["the same, torch.compile"] = torch.compile(plain, dynamic=True)
    head = trl_chunked_head()
    found["TRL"] = head if isinstance(head, Missing) else lambda h, w, y: head(h, w, y, False)[0]
    return found


@pytest.mark.parametrize(("N", "H", "V", "dtype"), CASES, ids=str)
def test_forward(compare, N: int, H: int, V: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = case(N, H, V, dtype)
    oracle = linear_logprobs(hidden.double(), weight.double(), labels, backend="ref")
    compare(
        "linear_logprobs",
        each(functions(), lambda f: f(hidden, weight, labels)),
        shape=f"N={N} H={H} V={V} forward",
        dtype=dtype,
        oracle=oracle,
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-4,
        ceilings={"bare product": products(hidden, weight, "z")},
        flops=2 * N * V * H,
    )


@pytest.mark.parametrize(("N", "H", "V", "dtype"), CASES, ids=str)
def test_with_gradient(compare, N: int, H: int, V: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = case(N, H, V, dtype)
    upstream = torch.randn(N, device=DEVICE)

    def both(f, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = f(h, w, labels)
        return torch.autograd.grad(logprobs, (h, w), upstream.to(logprobs.dtype))

    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    oracle = both(lambda h, w, y: linear_logprobs(h, w, y, backend="ref"), *wide)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    compare(
        "linear_logprobs",
        each(functions(), lambda f: both(f, *leaves)),
        shape=f"N={N} H={H} V={V} forward+backward",
        dtype=dtype,
        oracle=oracle,
        tolerance=1.0 if dtype == torch.bfloat16 else 1e-3,
        ceilings={"four bare products": products(*leaves, "zzwh")},
        flops=8 * N * V * H,
    )
