"""How every benchmark here measures: variants on the same inputs, in interleaved rounds.

A benchmark gives `compare` (a fixture) its variants, each a function without arguments, what they
must move or compute, and the fp64 result. Results are compared before anything is timed. Each row
of the table says: median and interquartile range, GB/s or TFLOP/s from the stated count, the share
of the speed of a copy that moves as many bytes, timed in the same rounds, peak memory above the
inputs (torch's allocator), and the error.

On a GPU times are CUDA events around a call, with the L2 cache flushed before it; on a CPU they are
wall-clock times. `pytest bench/bench_<op>.py --benchmark-json=FILE` writes all rows to FILE, in
each benchmark's `extra_info["rows"]`, beside pytest-benchmark's record of machine, commit and date.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels import available_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several times the largest L2, and long enough that the host has enqueued what is timed before the
# GPU has done with it: times are the device's, not the launches'.
L2_FLUSH_BYTES = 1 << 30
COPY_BYTES = 256 << 20  # a longer copy is no faster
MAX_SECONDS = 2.0  # a variant slower than this in its warm-up gets fewer rounds
ROUNDS = 15

Variant = Callable[[], Any]


def ours(op: str) -> list[str]:
    """The backends of `op` that run on DEVICE here, but for the reference."""
    has = importlib.import_module(f"fastrlhf_kernels.{op}").IMPLEMENTATIONS
    wanted = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
    return [name for name in wanted if name in has and name in available_backends()]


@dataclasses.dataclass
class Row:
    """One line of the results."""

    op: str
    variant: str
    device: str
    shape: str
    dtype: str
    median_s: float
    iqr_s: float
    rounds: int
    gb_per_s: float | None
    tflop_per_s: float | None
    share_of_copy: float | None
    peak_bytes: int
    max_error: float | None


def time_once(call: Variant, flush: Tensor | None) -> float:
    """Seconds of one call."""
    if flush is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def peak_bytes(call: Variant) -> int:
    """The most memory that one call holds of torch's allocator, above what was there before."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        result = call()
        del result
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = itertools.accumulate(nbytes for _, nbytes in sorted(changes))
    return max(held, default=0)


def max_error(result: Any, oracle: Any) -> float:
    """The largest difference from the fp64 oracle, over all results."""
    if callable(oracle):
        return float(oracle(result))
    if isinstance(oracle, Tensor):
        return float((result.double() - oracle).abs().max())
    return max(max_error(r, o) for r, o in zip(result, oracle, strict=True))


def interleave(
    variants: Mapping[str, Variant], rounds: int = ROUNDS, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every call: round after round, each variant once a round, `pause` before each."""
    flush = (
        torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if DEVICE == "cuda" else None
    )
    first = {name: time_once(call, flush) for name, call in variants.items()}  # warm-up
    slow = {name for name, seconds in first.items() if seconds > MAX_SECONDS}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name, call in variants.items():
            if name not in slow or i < 3:
                time.sleep(pause)
                times[name].append(time_once(call, flush))
    return times


def measure(
    op: str,
    variants: Mapping[str, Variant],
    *,
    shape: str,
    dtype: torch.dtype,
    oracle: Any = None,
    tolerance: float | None = None,
    bytes_moved: int = 0,
    flops: int = 0,
    ceilings: Mapping[str, Variant] | None = None,
    rounds: int = ROUNDS,
    pause: float = 0.0,
) -> list[Row]:
    """Compares the variants' results, times them, and gives a row for each.

    Args:
        op: the op's name.
        variants: name -> call; ours, plain PyTorch, torch.compile, the peers.
        shape, dtype: of the inputs, for the table.
        oracle: the fp64 result, a tensor or a tuple of such; or a function from a variant's result
            to its error, where the whole fp64 result would be too large.
        tolerance: an error above this fails the benchmark: it would time different things.
        bytes_moved, flops: what a call must at least move and compute.
        ceilings: name -> call, timed in the same rounds as bounds; what they give is not compared.
        rounds: how often each variant is timed.
        pause: seconds of sleep before each timed call. OpenMP's threads, which torch uses, spin on
            for some milliseconds after a call, and would take a core from the next variant's.
    """
    errors: dict[str, float | None] = dict.fromkeys(variants)
    if oracle is not None:
        for name, call in variants.items():
            error = errors[name] = max_error(call(), oracle)
            if tolerance is not None and not error <= tolerance:
                raise AssertionError(f"{op}: {name} is off by {error:.3g} on {shape}")
    half = max(bytes_moved // 2, 1)
    copied = min(half, COPY_BYTES)
    source = torch.empty(copied, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    calls = {**variants, **(ceilings or {})}
    times = interleave({**calls, "copy": lambda: target.copy_(source)}, rounds, pause)
    copy = statistics.median(times.pop("copy")) * (half / copied)
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4)
        rows.append(
            Row(
                op=op,
                variant=name,
                device=DEVICE,
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                median_s=median,
                iqr_s=high - low,
                rounds=len(seconds),
                gb_per_s=bytes_moved / median * 1e-9 if bytes_moved else None,
                tflop_per_s=flops / median * 1e-12 if flops else None,
                share_of_copy=copy / median if bytes_moved else None,
                peak_bytes=peak_bytes(calls[name]),
                max_error=errors.get(name),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text, the fastest first; losing rows are printed too."""
    head = ["variant", "median", "iqr", "GB/s", "TFLOP/s", "of copy", "peak MB", "error"]
    lines = [head]
    for row in sorted(rows, key=lambda row: row.median_s):
        lines.append(
            [
                row.variant,
                f"{row.median_s * 1e3:.3f} ms",
                f"{row.iqr_s * 1e3:.3f} ms",
                "" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
                "" if row.tflop_per_s is None else f"{row.tflop_per_s:.3f}",
                "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
                f"{row.peak_bytes / 1e6:.1f}",
                "" if row.max_error is None else f"{row.max_error:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    title = f"{rows[0].op}  {rows[0].shape}  {rows[0].dtype}  {rows[0].device}"
    body = ("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([title, *body])
