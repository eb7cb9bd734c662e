"""kl_divergence beside kl_div of two log_softmaxes, and torch.compile of that.

    pytest bench/bench_kl_divergence.py

Bytes: both arguments read once in the forward pass; in both passes together read twice and p's
gradient written once (q is a frozen reference model's). The kernels read twice a pass: the second
time from cache. Gradients are compared with fp64 on every 64th row.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from common import DEVICE, ours
from torch import Tensor
from torch.nn.functional import kl_div

from fastrlhf_kernels import kl_divergence

SHAPES = (
    [(2048, 50257), (4096, 151936)] if DEVICE == "cuda" else [(1000, 163), (1024, 50257)]
)  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def timing(N: int, V: int) -> dict:
    """For large cases on a CPU: fewer rounds, and a pause, see `common.measure`."""
    return {"rounds": 7, "pause": 0.02} if DEVICE == "cpu" and N * V > 10**7 else {}


def torch_kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = (x if x.dtype == torch.float64 else x.float() for x in (p, q))
    return kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)


@cache  # compiled ones serve all cases
def functions() -> dict:
    found = {
        name: lambda p, q, name=name: kl_divergence(p, q, backend=name)
        for name in ours("kl_divergence")
    }
    found["kl_div(log_softmax)"] = torch_kl
    found["kl_div, torch.compile"] = torch.compile(torch_kl, dynamic=True)
    return found


def case(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(N, V, generator=generator)
    q = p + 0.3 * torch.randn(N, V, generator=generator)
    return p.to(dtype).to(DEVICE), q.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_forward(compare, N: int, V: int, dtype: torch.dtype) -> None:
    p, q = case(N, V, dtype)
    pieces = zip(p.split(64), q.split(64), strict=True)
    compare(
        "kl_divergence",
        {name: lambda f=f: f(p, q) for name, f in functions().items()},
        shape=f"N={N} V={V} forward",
        dtype=dtype,
        **timing(N, V),
        oracle=torch.cat([torch_kl(a.double(), b.double()) for a, b in pieces]),
        tolerance=1e-5,
        bytes_moved=2 * p.nbytes,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_forward_and_backward(compare, N: int, V: int, dtype: torch.dtype) -> None:
    p, q = case(N, V, dtype)
    p.requires_grad_()
    upstream = torch.randn(N, device=DEVICE)

    def both(f) -> Tensor:
        (gradient,) = torch.autograd.grad(f(p, q), p, upstream)
        return gradient

    some = slice(None, None, 64)
    wide = p.detach()[some].double().requires_grad_()
    (oracle,) = torch.autograd.grad(torch_kl(wide, q[some].double()), wide, upstream[some].double())
    compare(
        "kl_divergence",
        {name: lambda f=f: both(f) for name, f in functions().items()},
        shape=f"N={N} V={V} forward+backward",
        dtype=dtype,
        **timing(N, V),
        oracle=lambda gradient: (gradient[some].double() - oracle).abs().max(),
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-4,  # the gradient is bf16 for bf16
        bytes_moved=5 * p.nbytes,
    )
