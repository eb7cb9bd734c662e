"""linear_cross_entropy with its gradient, beside bare products, PyTorch's forms and peers'.

    pytest bench/bench_linear_cross_entropy.py

FLOPs: 6 N V H, the three products that a loss and its gradients need; "recomputing" is the mean of
linear_logprobs, which makes four. Peak memory includes the gradients, 4 H (N + V) bytes in fp32.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from common import Missing, ours
from linear_cases import case, cases, exact, products
from peers import cut_cross_entropy, each, liger_cross_entropy, trl_chunked_head
from torch import Tensor
from torch.nn import functional as F

from fastrlhf_kernels import linear_cross_entropy, linear_logprobs

CASES = cases(
    cpu=[(256, 128, 163), (1000, 128, 163)],
    gpu=[(4096, 2048, 50257), (8192, 4096, 151936)],
)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels)


@cache  # compiled ones serve all cases
def functions() -> dict:
    found = {
        name: lambda h, w, y, name=name: linear_cross_entropy(h, w, y, backend=name)
        for name in ours("linear_cross_entropy")
    }
    for name in list(found):
        found[f"{name}, recomputing"] = lambda h, w, y, name=name: (
            -linear_logprobs(h, w, y, backend=name).mean()
        )
    found["product, cross_entropy"] = plain
    found["the same, torch.compile"] = torch.compile(plain, dynamic=True)
    if hasattr(F, "linear_cross_entropy"):
        found["torch's own"] = F.linear_cross_entropy
        found["torch's own, chunked"] = lambda h, w, y: F.linear_cross_entropy(
            h, w, y, options=torch.nn.LinearCrossEntropyOptions()
        )
    else:
        found["torch's own"] = Missing(f"not in torch {torch.__version__}")
    head = trl_chunked_head()
    found["TRL"] = (
        head if isinstance(head, Missing) else lambda h, w, y: -head(h, w, y, False)[0].mean()
    )
    found["Liger"] = liger_cross_entropy()
    found["cut-cross-entropy"] = cut_cross_entropy()
    return found


@pytest.mark.parametrize(("N", "H", "V", "dtype"), CASES, ids=str)
def test_with_gradient(compare, N: int, H: int, V: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = case(N, H, V, dtype)

    def step(f, h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = f(h, w, y)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    reference = partial(step, partial(linear_cross_entropy, backend="ref"))
    oracle = exact(reference, hidden, weight, labels, mean=True)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    compare(
        "linear_cross_entropy",
        each(functions(), lambda f: step(f, *leaves, labels)),
        shape=f"N={N} H={H} V={V}",
        dtype=dtype,
        oracle=oracle,
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-3,
        ceilings={"three bare products": products(*leaves, "zwh")},
        flops=6 * N * V * H,
    )
