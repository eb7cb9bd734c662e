"""gae beside the loop over time that verl and OpenRLHF run, in plain PyTorch and compiled.

    pytest bench/bench_gae.py

The second benchmark is ours alone, for rows of 1024 to 131072 steps, 2^21 steps in all each time:
the time a step must not grow with T.

Bytes: rewards, values and mask read once, advantages and returns written once: 17 a step in fp32.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from common import DEVICE, Variant, max_error, ours
from peers import each, verl_gae
from torch import Tensor

from fastrlhf_kernels import gae

SETTINGS = {"gamma": 1.0, "lam": 0.95}


def verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over time with masked steps carried over, all rows at once, as verl's is."""
    m = mask.to(rewards.dtype)
    carried, next_value, columns = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        stepped = rewards[:, t] + SETTINGS["gamma"] * next_value - values[:, t]
        stepped = stepped + SETTINGS["gamma"] * SETTINGS["lam"] * carried
        next_value = values[:, t] * m[:, t] + (1 - m[:, t]) * next_value
        carried = stepped * m[:, t] + (1 - m[:, t]) * carried
        columns.append(carried)
    advantages = torch.stack(columns[::-1], dim=1) * m
    return advantages, (advantages + values) * m


def backends() -> list[str]:
    return ours("gae")


SHAPES = [(2048, 128), (512, 1024), (512, 8192), *([(8192, 2048)] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize(("B", "T"), SHAPES)
def test_gae(compare, B: int, T: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(B, T, generator=generator).to(DEVICE) for _ in range(2))
    mask = torch.rand(B, T, generator=generator).to(DEVICE) > 0.1
    variants: dict[str, Variant] = {
        name: lambda name=name: gae(rewards, values, mask, **SETTINGS, backend=name)
        for name in backends()
    }
    variants["loop (verl's)"] = lambda: verl_loop(rewards, values, mask)
    if T <= 128:  # a graph of T steps: compiling 1024 of them takes more than five minutes
        compiled = torch.compile(verl_loop)
        variants["loop, torch.compile"] = lambda: compiled(rewards, values, mask)
    # verl's own whitens the advantages too, and leaves masked returns as they come.
    variants |= each(
        {"verl's own": verl_gae()}, lambda f: (f(rewards, values, mask, 1.0, 0.95)[1] * mask,)
    )
    oracle = gae(rewards.double(), values.double(), mask, **SETTINGS, backend="ref")
    compare(
        "gae",
        variants,
        shape=f"B={B} T={T}",
        dtype=rewards.dtype,
        oracle=lambda found: max_error(found, oracle[-len(found) :]),
        tolerance=1e-3,
        bytes_moved=B * T * 17,
    )


STEPS = 1 << 21


def test_time_is_linear_in_t(compare, benchmark, capsys) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(STEPS, generator=generator).to(DEVICE) for _ in range(2))
    mask = torch.rand(STEPS, generator=generator).to(DEVICE) > 0.1
    variants = {}
    for T in (1 << n for n in range(10, 18)):
        rows = [x.view(-1, T) for x in (rewards, values, mask)]
        for name in backends():
            variants[f"{name}, T={T} B={STEPS // T}"] = partial(gae, *rows, backend=name)
    compare(
        "gae",
        variants,
        shape=f"B T = {STEPS}",
        dtype=rewards.dtype,
        bytes_moved=STEPS * 17,
    )
    with capsys.disabled():
        for row in benchmark.extra_info["rows"]:
            print(f"{row['variant']}: {row['median_s'] / STEPS * 1e9:.2f} ns a step")
