"""logprobs_from_logits beside log_softmax and gather, a logsumexp form, torch.compile and TRL's.

    pytest bench/bench_logprobs_from_logits.py

Bytes: the logits read once in the forward pass; in both passes together read twice and their
gradient written once. Labels and results are not counted.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE
from torch import Tensor

from fastrlhf_kernels import available_backends, logprobs_from_logits

SHAPES = (
    [(2048, 50257), (8192, 128256), (8192, 151936)]
    if DEVICE == "cuda"
    else [(2048, 163), (256, 50257), (128, 151936)]
)
DTYPES = [torch.float32, torch.bfloat16]


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    picked = logits.gather(1, labels[:, None])[:, 0].float()
    return picked - logits.float().logsumexp(-1)


def functions() -> dict:
    wanted = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
    found = {
        name: lambda x, y, name=name: logprobs_from_logits(x, y, backend=name)
        for name in wanted
        if name in available_backends()
    }
    found["log_softmax().gather()"] = log_softmax_gather
    found["logsumexp"] = logsumexp
    found["log_softmax, torch.compile"] = torch.compile(log_softmax_gather, dynamic=True)
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError:
        return found
    return found | {"TRL selective_log_softmax": selective_log_softmax}


def case(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator).to(dtype).to(DEVICE)
    return logits, torch.randint(0, V, (N,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_forward(compare, N: int, V: int, dtype: torch.dtype) -> None:
    logits, labels = case(N, V, dtype)
    compare(
        "logprobs_from_logits",
        {name: lambda f=f: f(logits, labels) for name, f in functions().items()},
        shape=f"N={N} V={V} forward",
        dtype=dtype,
        oracle=logprobs_from_logits(logits.double(), labels, backend="ref"),
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-4,  # TRL's results are bf16 for bf16
        bytes_moved=logits.nbytes,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_forward_and_backward(compare, N: int, V: int, dtype: torch.dtype) -> None:
    logits, labels = case(N, V, dtype)
    logits.requires_grad_()
    upstream = torch.randn(N, device=DEVICE)

    def both(f) -> Tensor:
        logprobs = f(logits, labels)
        (gradient,) = torch.autograd.grad(logprobs, logits, upstream.to(logprobs.dtype))
        return gradient

    wide = logits.detach().double().requires_grad_()
    logprobs = logprobs_from_logits(wide, labels, backend="ref")
    (oracle,) = torch.autograd.grad(logprobs, wide, upstream.double())
    compare(
        "logprobs_from_logits",
        {name: lambda f=f: both(f) for name, f in functions().items()},
        shape=f"N={N} V={V} forward+backward",
        dtype=dtype,
        oracle=oracle,
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-4,
        bytes_moved=3 * logits.nbytes,
    )
