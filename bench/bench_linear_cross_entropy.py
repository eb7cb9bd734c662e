"""linear_cross_entropy with its gradient, beside the product and cross_entropy, and Liger's.

    pytest bench/bench_linear_cross_entropy.py

FLOPs: 6 N V H, the three products that a loss and its gradients need.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastrlhf_kernels import available_backends, linear_cross_entropy

SHAPES = (
    [(4096, 2048, 50257), (8192, 4096, 151936)]
    if DEVICE == "cuda"
    else [(256, 128, 163), (2048, 128, 163), (512, 512, 50257)]
)
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float(), labels)


def functions() -> dict:
    wanted = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
    found = {
        name: lambda h, w, y, name=name: linear_cross_entropy(h, w, y, backend=name)
        for name in wanted
        if name in available_backends()
    }
    found["product, cross_entropy"] = plain
    found["the same, torch.compile"] = torch.compile(plain, dynamic=True)
    if DEVICE == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError:
            return found
        found["Liger"] = lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_loss_and_gradients(compare, N: int, H: int, V: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(V, H, generator=generator) * H**-0.5).to(dtype).to(DEVICE)
    labels = torch.randint(0, V, (N,), generator=generator).to(DEVICE)

    def step(f, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss = f(h, w, labels)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    oracle = step(
        lambda h, w, y: linear_cross_entropy(h, w, y, backend="ref"),
        *(x.double().requires_grad_() for x in (hidden, weight)),
    )
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    compare(
        "linear_cross_entropy",
        {name: lambda f=f: step(f, *leaves) for name, f in functions().items()},
        shape=f"N={N} H={H} V={V}",
        dtype=dtype,
        oracle=oracle,
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-3,
        flops=6 * N * V * H,
    )
