"""rollout_advantages beside the same made of torch operations, and of our own ops one by one.

    pytest bench/bench_rollout_advantages.py

Masks are those of sampled responses: valid up to the response's end. "torch, loop" runs verl's loop
over time; "torch, blocks" is the best we could write in torch for such masks: GAE as products with
a triangular matrix of powers, 128 steps at a time, and a loop over blocks alone.

Bytes: three inputs and a mask read once, four results written once: 29 a token in fp32. (Whitening
must read and write advantages again, from cache where they fit.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bench_gae import verl_loop
from common import DEVICE, ours
from torch import Tensor

from fastrlhf_kernels import (
    gae,
    kl_penalty,
    rollout_advantages,
    shape_rewards,
    whiten,
)
from fastrlhf_kernels.rollout_advantages import rollout_advantages_ref

BETA, LAM = 0.05, 0.95  # gamma is 1
BYTES_A_TOKEN = 29
BLOCK = 128
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def powers(device: str) -> tuple[Tensor, Tensor]:
    """(s, t): LAM^(s - t) where s >= t, and what a block hands to each step before it."""
    t = torch.arange(BLOCK, device=device)
    gap = t[:, None] - t
    return torch.where(gap >= 0, LAM ** gap.float(), 0.0), LAM ** (BLOCK - t).float()


def blocked_gae(
    within: Tensor, handed: Tensor, rewards: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """For masks that are valid up to an end, T a multiple of BLOCK, gamma 1."""
    B, T = rewards.shape
    v = torch.where(mask, values, 0.0)
    deltas = rewards - v
    deltas[:, :-1] += v[:, 1:]
    advantages = (deltas.view(-1, BLOCK) @ within).view(B, T // BLOCK, BLOCK)
    for block in range(T // BLOCK - 2, -1, -1):
        advantages[:, block] += advantages[:, block + 1, :1] * handed
    advantages = advantages.view(B, T) * mask
    return advantages, advantages + v


def made_of_torch(
    scan: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
) -> Results:
    kl = (logprobs - ref_logprobs) * mask
    rewards = -BETA * kl
    last = mask.sum(-1, keepdim=True) - 1
    rewards.scatter_add_(1, last, scores[:, None])
    advantages, returns = scan(rewards, values, mask)
    n = mask.sum()
    centred = (advantages - (advantages * mask).sum() / n) * mask
    return centred * torch.rsqrt(centred.square().sum() / n + 1e-8), returns, rewards, kl


def one_by_one(
    backend: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
) -> Results:
    others = "triton" if backend == "cuda" else backend
    kl = kl_penalty(logprobs, ref_logprobs, backend=others) * mask
    rewards = shape_rewards(scores, kl, mask, beta=BETA, backend=others)
    advantages, returns = gae(rewards, values, mask, lam=LAM, backend=backend)
    return whiten(advantages, mask, backend=others), returns, rewards, kl


@pytest.mark.parametrize(("B", "T"), [(64, 128), (512, 1024)])
def test_rollout_advantages(compare, B: int, T: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -3.0 * torch.rand(B, T, generator=generator)
    ref_logprobs = logprobs + 0.2 * torch.randn(B, T, generator=generator)
    values, scores = (torch.randn(s, generator=generator) for s in ((B, T), (B,)))
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    args = [x.to(DEVICE) for x in (logprobs, ref_logprobs, values, scores, mask)]
    names = ours("rollout_advantages")
    variants = {
        name: partial(rollout_advantages, *args, beta=BETA, lam=LAM, backend=name) for name in names
    }
    variants |= {f"{name}, op by op": partial(one_by_one, name, *args) for name in names}
    variants["torch, loop (verl's)"] = partial(made_of_torch, verl_loop, *args)
    blocks = partial(blocked_gae, *powers(DEVICE))
    variants["torch, blocks"] = partial(made_of_torch, blocks, *args)
    if T <= 128:  # compiling the loop over 1024 steps takes minutes
        compiled = torch.compile(partial(made_of_torch, verl_loop))
        variants["torch, loop, torch.compile"] = partial(compiled, *args)
    compiled_blocks = torch.compile(partial(made_of_torch, blocks))
    variants["torch, blocks, torch.compile"] = partial(compiled_blocks, *args)
    wide = [x.double() for x in args[:4]]
    oracle = rollout_advantages_ref(*wide, args[4], beta=BETA, lam=LAM)
    compare(
        "rollout_advantages",
        variants,
        shape=f"B={B} T={T}",
        dtype=logprobs.dtype,
        oracle=tuple(oracle),
        tolerance=1e-3,
        bytes_moved=B * T * BYTES_A_TOKEN,
    )
