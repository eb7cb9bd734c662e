"""linear_cross_entropy with its gradient, beside bare products, PyTorch's forms, TRL's, Liger's.

    pytest bench/bench_linear_cross_entropy.py

FLOPs: 6 N V H, the three products that a loss and its gradients need; "recomputing" is the mean of
linear_logprobs, which makes four. Peak memory includes the gradients, 4 H (N + V) bytes in fp32.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE, ours
from linear_cases import PARTS, case, products, trl_logprobs
from torch import Tensor
from torch.nn import functional as F

from fastrlhf_kernels import linear_cross_entropy, linear_logprobs

SHAPES = (
    [(4096, 2048, 50257), (8192, 4096, 151936)]
    if DEVICE == "cuda"
    else [(256, 128, 163), (1000, 128, 163), (2048, 512, 50257)]
)
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def functions(part: str) -> dict:
    found = {
        name: lambda h, w, y, name=name: linear_cross_entropy(h, w, y, backend=name)
        for name in ours("linear_cross_entropy")
    }
    if part == "ceilings":
        for name in list(found):
            found[f"{name}, recomputing"] = lambda h, w, y, name=name: (
                -linear_logprobs(h, w, y, backend=name).mean()
            )
    if part == "torch":
        found["product, cross_entropy"] = plain
        found["the same, torch.compile"] = torch.compile(plain, dynamic=True)
    if part == "peers":
        if hasattr(F, "linear_cross_entropy"):
            found["torch's own"] = F.linear_cross_entropy
            found["torch's own, chunked"] = lambda h, w, y: F.linear_cross_entropy(
                h, w, y, options=torch.nn.LinearCrossEntropyOptions()
            )
        trl = trl_logprobs()
        if trl is not None:
            found["TRL"] = lambda h, w, y: -trl(h, w, y, False)[0].mean()
        if DEVICE == "cuda":  # Triton alone
            try:
                from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
            except ImportError:
                return found
            found["Liger"] = lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y)
    return found


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_with_gradient(compare, N: int, H: int, V: int, dtype: torch.dtype, part: str) -> None:
    hidden, weight, labels = case(N, H, V, dtype)

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
        {name: lambda f=f: step(f, *leaves) for name, f in functions(part).items()},
        shape=f"N={N} H={H} V={V}",
        dtype=dtype,
        oracle=oracle,
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-3,
        ceilings={"three bare products": products(*leaves, "zwh")} if part == "ceilings" else None,
        flops=6 * N * V * H,
    )
