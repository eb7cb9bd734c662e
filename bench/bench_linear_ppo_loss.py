"""linear_ppo_loss with its gradient and an entropy bonus, beside bare products and other heads.

    pytest bench/bench_linear_ppo_loss.py

FLOPs: 6 N V H, three products; "recomputing" is policy_loss of linear_logprobs, which makes four.
The other heads get the loss by PyTorch's operations. Peak memory includes the gradients,
4 H (N + V) bytes in fp32.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from common import DEVICE, Missing, ours
from linear_cases import case, distinct, exact, products, repeated
from peers import each, trl_chunked_head
from torch import Tensor

from fastrlhf_kernels import linear_logprobs, linear_ppo_loss, policy_loss

SHAPES = (
    [(4096, 2048, 50257), (8192, 4096, 151936)]
    if DEVICE == "cuda"
    else [(256, 128, 163), (1000, 128, 163), (2048, 512, 50257)]
)
ENTROPY_COEF = 0.01


def surrogate(logprobs: Tensor, entropy: Tensor, old: Tensor, A: Tensor) -> Tensor:
    ratio = (logprobs - old).clamp(-20.0, 20.0).exp()
    clipped = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2))
    return clipped.mean() - ENTROPY_COEF * entropy.mean()


def plain(h: Tensor, w: Tensor, y: Tensor, old: Tensor, A: Tensor) -> Tensor:
    log_p = (h @ w.T).float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return surrogate(log_p.gather(1, y[:, None])[:, 0], entropy, old, A)


def recomputing(h: Tensor, w: Tensor, y: Tensor, old: Tensor, A: Tensor, backend: str) -> Tensor:
    logprobs, entropy = linear_logprobs(h, w, y, return_entropy=True, backend=backend)
    return policy_loss(logprobs, old, A, backend=backend)[0] - ENTROPY_COEF * entropy.mean()


@cache  # compiled ones serve all cases
def functions() -> dict:
    found = {
        name: lambda *args, name=name: linear_ppo_loss(
            *args, entropy_coef=ENTROPY_COEF, backend=name
        )[0]
        for name in ours("linear_ppo_loss")
    }
    for name in list(found):
        found[f"{name}, recomputing"] = lambda *args, name=name: recomputing(*args, name)
    found["plain PyTorch"] = plain
    found["the same, torch.compile"] = torch.compile(plain, dynamic=True)
    head = trl_chunked_head()
    found["TRL's head, PyTorch's loss"] = (
        head
        if isinstance(head, Missing)
        else lambda h, w, y, old, A: surrogate(*head(h, w, y, True), old, A)
    )
    return found


@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_with_gradient(compare, N: int, H: int, V: int) -> None:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    hidden, weight, labels = case(N, H, V, dtype)
    n = distinct(N)
    logprobs = repeated(linear_logprobs(hidden[:n], weight, labels[:n]).float(), N)
    noise, advantages = (repeated(x, N) for x in torch.randn(2, n, device=DEVICE))
    old = logprobs + 0.3 * noise
    near = ((logprobs - old).abs().exp() - 1.2).abs() < 1e-3  # where rounding could choose the side
    near |= ((-(logprobs - old).abs()).exp() - 0.8).abs() < 1e-3
    old = torch.where(near, logprobs, old)
    data = (labels, old, advantages)

    def step(f, h: Tensor, w: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        loss = f(h, w, *data)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    def reference(*args: Tensor) -> tuple[Tensor, ...]:
        loss = partial(linear_ppo_loss, entropy_coef=ENTROPY_COEF, backend="ref")
        return step(lambda *args: loss(*args)[0], *args)

    oracle = exact(reference, hidden, weight, *data, mean=True)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    compare(
        "linear_ppo_loss",
        each(functions(), lambda f: step(f, *leaves, *data)),
        shape=f"N={N} H={H} V={V}",
        dtype=dtype,
        oracle=oracle,
        tolerance=0.1 if dtype == torch.bfloat16 else 1e-3,
        ceilings={"three bare products": products(*leaves, "zwh")},
        flops=6 * N * V * H,
    )
