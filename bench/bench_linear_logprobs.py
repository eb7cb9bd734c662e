"""linear_logprobs beside the head's product followed by log_softmax, compiled too.

    pytest bench/bench_linear_logprobs.py

FLOPs: 2 N V H forward (one product), 8 N V H with the backward pass, which makes the logits again.
The row "products alone" is that many bare products into preallocated outputs.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE
from torch import Tensor

from fastrlhf_kernels import available_backends, linear_logprobs

SHAPES = (
    [(4096, 2048, 50257), (4096, 4096, 131072), (8192, 4096, 151936)]
    if DEVICE == "cuda"
    else [(2048, 128, 163), (512, 512, 50257)]
)
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def functions() -> dict:
    wanted = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
    found = {
        name: lambda h, w, y, name=name: linear_logprobs(h, w, y, backend=name)
        for name in wanted
        if name in available_backends()
    }
    found["product, log_softmax, gather"] = plain
    found["the same, torch.compile"] = torch.compile(plain, dynamic=True)
    return found


def case(N: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(V, H, generator=generator) * H**-0.5).to(dtype).to(DEVICE)
    return hidden, weight, torch.randint(0, V, (N,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_forward(compare, N: int, H: int, V: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = case(N, H, V, dtype)
    logits = torch.empty(N, V, dtype=dtype, device=DEVICE)
    variants = {name: lambda f=f: f(hidden, weight, labels) for name, f in functions().items()}
    oracle = linear_logprobs(hidden.double(), weight.double(), labels, backend="ref")
    for name, call in variants.items():
        error = float((call().double() - oracle).abs().max())
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-4), (name, error)
    variants["products alone"] = lambda: torch.mm(hidden, weight.T, out=logits)
    compare(
        "linear_logprobs",
        variants,
        shape=f"N={N} H={H} V={V} forward",
        dtype=dtype,
        flops=2 * N * V * H,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_forward_and_backward(compare, N: int, H: int, V: int, dtype: torch.dtype) -> None:
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
        {name: lambda f=f: both(f, *leaves) for name, f in functions().items()},
        shape=f"N={N} H={H} V={V} forward+backward",
        dtype=dtype,
        oracle=oracle,
        tolerance=1.0 if dtype == torch.bfloat16 else 1e-3,
        flops=8 * N * V * H,
    )
