"""What a small op's call with gradient costs above its C++ work, on 96 tokens of the CPU.

    pytest bench/bench_overhead.py

Rows, in microseconds, medians over interleaved rounds of many calls each:

    forward           the public function, its first argument requiring a gradient
    + backward        what torch.autograd.grad adds to it
    bare              the C++ entry alone, called by position into buffers that are there
    over              the difference: what the bar of 20 us is about

and, as floors, the same of `x.sum()`, whose graph is all C++, and of an autograd.Function in Python
that does nothing but save and return a tensor: their "+ backward" is what torch's engine and
torch.autograd.grad take, whoever wrote the op. Results are compared in the ops' own benchmarks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import _native, kl_penalty, policy_loss, ranking_loss, value_loss

N = 96
ROUNDS, CALLS = 60, 50


class Nothing(torch.autograd.Function):
    """The least that a differentiable op in Python can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Makes a number."""
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Hands back what was saved."""
        return ctx.saved_tensors[0]


def bare_calls(x: Tensor, y: Tensor, mask: Tensor, ranks: Tensor, sizes: Tensor) -> dict[str, Any]:
    """Op -> (its C++ forward, its C++ backward or None), on buffers that are kept."""
    native, f32 = _native.cpu, _native.DTYPE_TAGS[torch.float32]
    out, one = torch.empty(N), torch.ones(8)
    scratch = torch.empty(4 * len(sizes), dtype=torch.float64)
    px, py, po, p1 = (t.data_ptr() for t in (x, y, out, one))
    pm, pr, ps, pd = (t.data_ptr() for t in (mask, ranks, sizes, scratch))
    loss, stats = torch.empty(()), torch.empty(8)
    pl, pt = loss.data_ptr(), stats.data_ptr()
    keep = (out, one, scratch, loss, stats)

    def scale(_keep: Any = keep) -> None:
        native.loss_backward(p1, p1, px, po, N, f32, 1)

    return {
        "policy_loss": (
            lambda: native.policy_loss(
                px, py, py, pm, None, pl, pt, po, N, 0.8, 1.2, 0, 1.0, f32, 1
            ),
            scale,
        ),
        "value_loss": (
            lambda: native.value_loss(px, py, py, pm, None, pl, pt, po, N, 0.2, 0, 1.0, f32, 1),
            scale,
        ),
        "ranking_loss": (
            lambda: native.ranking_loss(px, pr, ps, pd, pl, pt, po, len(sizes), N, 0, 1.0, f32, 1),
            scale,
        ),
        "kl_penalty k1": (lambda: native.kl_penalty(px, py, po, N, 0, f32, 1), None),
        "kl_penalty k3": (
            lambda: native.kl_penalty(px, py, po, N, 2, f32, 1),
            lambda: native.kl_penalty_backward(px, px, py, po, N, 2, f32, 1),
        ),
    }


def median_us(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if round_:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


@pytest.mark.skipif(_native.cpu is None, reason="the C++ extension is not built")
def test_overhead(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, N, generator=generator)
    mask = torch.rand(N, generator=generator) > 0.3
    ranks = torch.randint(0, 5, (N,), generator=generator)
    sizes = torch.full((N // 6,), 6)
    leaf = x.clone().requires_grad_()
    forward: dict[str, Callable[[], Tensor]] = {
        "policy_loss": lambda: policy_loss(leaf, y, y, mask, backend="cpu")[0],
        "value_loss": lambda: value_loss(leaf, y, y, mask, backend="cpu")[0],
        "ranking_loss": lambda: ranking_loss(leaf, ranks, sizes, backend="cpu")[0],
        "kl_penalty k1": lambda: kl_penalty(leaf, y, backend="cpu"),
        "kl_penalty k3": lambda: kl_penalty(leaf, y, estimator="k3", backend="cpu"),
        "floor: x.sum()": lambda: leaf.sum(),
        "floor: Function": lambda: Nothing.apply(leaf),
    }
    bare = bare_calls(x, y, mask, ranks, sizes)
    calls: dict[str, Callable[[], Any]] = {}
    for name, f in forward.items():
        upstream = torch.ones_like(f())
        calls[name, "forward"] = f
        calls[name, "both"] = lambda f=f, u=upstream: torch.autograd.grad(f(), leaf, u)
        for part, call in zip(("bare", "bare backward"), bare.get(name, ()), strict=False):
            if call is not None:
                calls[name, part] = call
    try:
        found = median_us(calls)
    finally:
        torch.set_num_threads(before)
    rows = []
    for name in forward:
        ahead, both = found[name, "forward"], found[name, "both"]
        work, back = found.get((name, "bare"), 0.0), found.get((name, "bare backward"), 0.0)
        rows.append(
            {
                "op": name,
                "forward_us": ahead,
                "bare_us": work,
                "over_us": ahead - work,
                "backward_us": both - ahead,
                "bare_backward_us": back,
                "over_backward_us": both - ahead - back,
            }
        )
    benchmark.extra_info["calls"] = rows
    with capsys.disabled():
        print(f"\noverhead  N={N}  cpu, us".ljust(20))
        print("".ljust(18) + "".join(k.removesuffix("_us").rjust(15) for k in list(rows[0])[1:]))
        for row in rows:
            print(row["op"].ljust(18) + "".join(f"{v:15.1f}" for v in list(row.values())[1:]))
    benchmark.pedantic(forward["policy_loss"], rounds=5, iterations=CALLS, warmup_rounds=1)
