"""linear_logprobs beside bare products, PyTorch's forms, compiled too, and TRL's chunked head.

    pytest bench/bench_linear_logprobs.py

FLOPs: 2 N V H forward (one product), 8 N V H with the backward pass, which makes the logits again.
The row "bare products" is that many of them into preallocated outputs: see linear_cases.py. Peak
memory of forward + backward includes the gradients, 4 H (N + V) bytes in fp32.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from common import DEVICE, Missing, ours
from linear_cases import case, cases, distinct, exact, products, repeated
from peers import each, trl_chunked_head
from torch import Tensor

from fastrlhf_kernels import linear_logprobs

CASES = cases(
    cpu=[(2048, 128, 163)],
    gpu=[(4096, 2048, 50257), (4096, 4096, 131072), (8192, 4096, 151936)],
)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


@cache  # compiled ones serve all cases
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
    n = distinct(N)
    exact_rows = (hidden[:n].double(), weight.double(), labels[:n])
    oracle = repeated(linear_logprobs(*exact_rows, backend="ref"), N)
    del exact_rows
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
    upstream = repeated(torch.randn(distinct(N), device=DEVICE), N)

    def both(f, h: Tensor, w: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        logprobs = f(h, w, y)
        return logprobs, *torch.autograd.grad(logprobs, (h, w), d.to(logprobs.dtype))

    reference = partial(both, partial(linear_logprobs, backend="ref"))
    oracle = exact(reference, hidden, weight, labels, upstream)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    compare(
        "linear_logprobs",
        each(functions(), lambda f: both(f, *leaves, labels, upstream)[1:]),
        shape=f"N={N} H={H} V={V} forward+backward",
        dtype=dtype,
        oracle=oracle[1:],
        tolerance=1.0 if dtype == torch.bfloat16 else 1e-3,
        ceilings={"four bare products": products(*leaves, "zzwh")},
        flops=8 * N * V * H,
    )
