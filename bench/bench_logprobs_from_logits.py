"""logprobs_from_logits beside log_softmax and gather, a logsumexp form, compiled, and peers.

    pytest bench/bench_logprobs_from_logits.py

Bytes: the logits read once in the forward pass; in both passes together read twice and their
gradient written once. Labels and results are not counted. Ceilings of the forward pass on a CPU: a
C++ sum of the same logits on the same threads, and the op on one row, over and over, which stays in
the level-2 cache. Rows are DISTINCT ones over and over, each with labels of its own; gradients are
compared with fp64 on every 63rd row.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from common import DEVICE, ours
from peers import each, openrlhf_logprobs, trl_selective_log_softmax, verl_logprobs
from torch import Tensor

from fastrlhf_kernels import _native, logprobs_from_logits

SHAPES = (
    [(2048, 50257), (8192, 128256), (8192, 151936)]
    if DEVICE == "cuda"
    else [(1000, 163), (4096, 50257), (2048, 151936)]
)
DTYPES = [torch.float32, torch.bfloat16]
DISTINCT = 64  # more would only take longer to draw than to measure


def timing(N: int, V: int) -> dict:
    """For large cases on a CPU: fewer rounds, and a pause, see `common.measure`."""
    return {"rounds": 5, "pause": 0.02} if DEVICE == "cpu" and N * V > 10**7 else {}


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    picked = logits.gather(1, labels[:, None])[:, 0].float()
    return picked - logits.float().logsumexp(-1)


@cache  # compiled ones serve all cases
def functions() -> dict:
    found = {
        name: lambda x, y, name=name: logprobs_from_logits(x, y, backend=name)
        for name in ours("logprobs_from_logits")
    }
    found["log_softmax().gather()"] = log_softmax_gather
    found["logsumexp"] = logsumexp
    found["log_softmax, torch.compile"] = torch.compile(log_softmax_gather, dynamic=True)
    found["TRL selective_log_softmax"] = trl_selective_log_softmax()
    found["verl logprobs_from_logits"] = verl_logprobs()
    found["OpenRLHF log_probs_from_logits"] = openrlhf_logprobs()
    return found


def case(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.randn(DISTINCT, V, generator=generator, device=DEVICE).to(dtype)
    logits = rows.repeat(-(-N // DISTINCT), 1)[:N]
    return logits, torch.randint(0, V, (N,), generator=generator, device=DEVICE)


def ceilings(logits: Tensor, labels: Tensor) -> dict:
    if DEVICE == "cuda":
        return {}
    N, V = logits.shape
    sums = torch.empty(N, dtype=torch.float64)
    tag = _native.DTYPE_TAGS[logits.dtype]

    def read() -> Tensor:
        _native.call("row_sums", logits, logits.data_ptr(), sums.data_ptr(), N, V, tag)
        return sums

    one = logits[:1].expand(N, V)
    return {
        "ceiling: sum": read,
        "ceiling: one row in L2": lambda: logprobs_from_logits(one, labels, backend="cpu"),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_forward(compare, N: int, V: int, dtype: torch.dtype) -> None:
    logits, labels = case(N, V, dtype)
    exact = logits[:DISTINCT].double().log_softmax(-1)
    compare(
        "logprobs_from_logits",
        each(functions(), lambda f: f(logits, labels)),
        shape=f"N={N} V={V} forward",
        dtype=dtype,
        **timing(N, V),
        oracle=exact[torch.arange(N, device=DEVICE) % DISTINCT, labels],
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-4,  # TRL's results are bf16 for bf16
        bytes_moved=logits.nbytes,
        ceilings=ceilings(logits, labels),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_forward_with_entropy(compare, N: int, V: int, dtype: torch.dtype) -> None:
    """Beside the forward pass without it."""
    logits, labels = case(N, V, dtype)
    names = ours("logprobs_from_logits")
    plain = {
        f"{name}, log-probs alone": lambda name=name: logprobs_from_logits(
            logits, labels, backend=name
        )
        for name in names
    }
    with_entropy = {
        name: lambda name=name: logprobs_from_logits(
            logits, labels, return_entropy=True, backend=name
        )
        for name in names
    }
    compare(
        "logprobs_from_logits",
        with_entropy | plain,
        shape=f"N={N} V={V} forward with entropy",
        dtype=dtype,
        **timing(N, V),
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

    some = slice(None, None, DISTINCT - 1)
    wide = logits.detach()[some].double().requires_grad_()
    logprobs = log_softmax_gather(wide, labels[some])
    (oracle,) = torch.autograd.grad(logprobs, wide, upstream[some].double())
    compare(
        "logprobs_from_logits",
        each({name: f for name, f in functions().items() if name != "logsumexp"}, both),
        shape=f"N={N} V={V} forward+backward",
        dtype=dtype,
        **timing(N, V),
        oracle=lambda gradient: (gradient[some].double() - oracle).abs().max(),
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-4,
        bytes_moved=3 * logits.nbytes,
    )
