"""How every benchmark here measures: variants on the same inputs, in interleaved rounds.

A benchmark gives `compare` (a fixture) its variants, each a function without arguments, what they
must move or compute, and the fp64 result. Results are compared before anything is timed. Each row
of the table says: median and interquartile range, GB/s or TFLOP/s from the stated count, the share
of the speed of a copy that moves as many bytes, timed in the same rounds, peak memory above the
inputs (torch's allocator), and the error. A variant that cannot be timed keeps its row, which says
why: a peer that is not installed (`Missing`), a wrong result, too little memory, another failure.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels import available_backends

OURS = ("cuda", "triton", "cpu")  # the variants that are our backends, as benchmarks name them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several times the largest L2, and long enough that the host has enqueued what is timed before the
# GPU has done with it: times are the device's, not the launches'.
L2_FLUSH_BYTES = 1 << 30
COPY_BYTES = 256 << 20  # a longer copy is no faster
ROUNDS = 15
LEAST_ROUNDS = 5  # of our own variants and of ceilings; the others' least is one
LONG = 10.0  # seconds of rounds past which three are enough of these
SLOW = 5.0  # seconds of a peer's first call past which it counts and is the only one: rounds is 1
SECONDS = 1.0  # of a variant's rounds: past it, none begins beyond the least


@dataclasses.dataclass(frozen=True)
class Missing:
    """A variant that cannot be had here, and why."""

    why: str


Variant = Callable[[], Any] | Missing


def ours(op: str) -> list[str]:
    """The backends of `op` that run on DEVICE here, but for the reference."""
    has = importlib.import_module(f"fastrlhf_kernels.{op}").IMPLEMENTATIONS
    wanted = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
    return [name for name in wanted if name in has and name in available_backends()]


@dataclasses.dataclass
class Row:
    """One line of the results; without a median, `note` says why."""

    op: str
    variant: str
    device: str
    shape: str
    dtype: str
    median_s: float | None = None
    iqr_s: float | None = None
    rounds: int = 0
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    share_of_copy: float | None = None
    peak_bytes: int | None = None
    max_error: float | None = None
    ceiling: bool = False  # a bound, whose result is nobody's
    note: str | None = None


def time_once(call: Callable[[], Any], flush: Tensor | None) -> float:
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


def with_peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the most of torch's memory that it holds above what was there."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        result = call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = itertools.accumulate(nbytes for _, nbytes in sorted(changes))
    return result, max(held, default=0)


def max_error(result: Any, oracle: Any) -> float:
    """The largest difference from the fp64 oracle, over all results."""
    if callable(oracle):
        return float(oracle(result))
    if isinstance(oracle, Tensor):
        return float((result.double() - oracle).abs().max())
    return max(max_error(r, o) for r, o in zip(result, oracle, strict=True))


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    pause: float = 0.0,
    steady: Collection[str] = OURS,
    least: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every call, all of them warm: round after round, each once, after `pause`.

    A call that has taken SECONDS sits out the later rounds, but not before the first `least`, those
    in `steady` ("cpu" and "cpu, ..." alike) LEAST_ROUNDS, or three of them after LONG: slow peers
    need not be known as exactly.
    """
    flush = (
        torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if DEVICE == "cuda" else None
    )
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            at_least = least
            if name.split(",")[0] in steady:
                at_least = LEAST_ROUNDS if sum(times[name]) < LONG else 3
            if i < at_least or sum(times[name]) < SECONDS:
                time.sleep(pause)
                times[name].append(time_once(call, flush))
    return times


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Of one or more times."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    low, median, high = statistics.quantiles(seconds, n=4)
    return low, median, high


def attempt(
    row: Row,
    call: Variant,
    oracle: Any = None,
    tolerance: float | None = None,
    peaks: bool = True,
) -> Row:
    """Calls a variant for the first time: its row, with error and memory, or with a note."""
    if isinstance(call, Missing):
        return dataclasses.replace(row, note=call.why)
    try:
        began = time.perf_counter()
        result, peak = with_peak(call) if peaks else (call(), None)
        seconds = time.perf_counter() - began
        error = None if oracle is None else max_error(result, oracle)
    except (MemoryError, torch.OutOfMemoryError):
        return dataclasses.replace(row, note="out of memory")
    except Exception as failure:  # whatever a peer may raise is what its row says
        first = (str(failure).splitlines() or [""])[0][:100]
        note = f"failed: {type(failure).__name__}: {first}".rstrip(": ")
        return dataclasses.replace(row, note=note)
    wrong = error is not None and tolerance is not None and not error <= tolerance
    note = f"WRONG: off by {error:.2g}" if wrong else None
    # Ours are timed with care, and a compiled one's first call compiles.
    once = row.variant.split(",")[0] not in OURS and "compile" not in row.variant
    if seconds > SLOW and not wrong and once:
        row = dataclasses.replace(row, median_s=seconds, iqr_s=0.0, rounds=1)
    return dataclasses.replace(row, max_error=error, peak_bytes=peak, note=note)


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
    ceilings: Mapping[str, Callable[[], Any]] | None = None,
    rounds: int = ROUNDS,
    least: int = 1,
    pause: float = 0.0,
    peaks: bool = True,
) -> list[Row]:
    """Compares the variants' results, times them, and gives a row for each.

    Args:
        op: the op's name.
        variants: name -> call; ours, plain PyTorch, torch.compile, the peers.
        shape, dtype: of the inputs, for the table.
        oracle: the fp64 result, a tensor or a tuple of such; or a function from a variant's result
            to its error, where the whole fp64 result would be too large.
        tolerance: a variant with a larger error is not timed: it would time different things.
        bytes_moved, flops: what a call must at least move and compute.
        ceilings: name -> call, timed in the same rounds as bounds; what they give is not compared.
        rounds: how often each variant is timed, at most; 0: rows say the memory, and no time.
        least: how often at least, see `interleave`.
        pause: seconds of sleep before each timed call. OpenMP's threads, which torch uses, spin on
            for some milliseconds after a call, and would take a core from the next variant's.
        peaks: whether to measure memory; on a CPU torch's profiler does, which calls of many small
            operations are the slower for.
    """
    blank = Row(op, "", DEVICE, shape, str(dtype).removeprefix("torch."))
    rows = [
        attempt(dataclasses.replace(blank, variant=name), call, oracle, tolerance, peaks)
        for name, call in variants.items()
    ]
    rows += [
        dataclasses.replace(attempt(blank, call, peaks=peaks), variant=name, ceiling=True)
        for name, call in (ceilings or {}).items()
    ]
    if rounds == 0:
        return rows
    half = max(bytes_moved // 2, 1)
    copied = min(half, COPY_BYTES)
    source = torch.empty(copied, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    all_calls = {**variants, **(ceilings or {}), "copy": lambda: target.copy_(source)}
    untimed = {row.variant for row in rows if row.note is not None or row.rounds == 1}
    calls = {
        name: call
        for name, call in all_calls.items()
        if name not in untimed and not isinstance(call, Missing)
    }
    times = interleave(calls, rounds, pause, (*OURS, *(ceilings or ())), least)
    copy = statistics.median(times.pop("copy")) * (half / copied)
    for i, row in enumerate(rows):
        if row.note is not None:
            continue
        if row.median_s is not None:  # slow: its first call is what there is
            median, spread, n = row.median_s, 0.0, 1
        else:
            seconds = times[row.variant]
            low, median, high = quartiles(seconds)
            spread, n = high - low, len(seconds)
        rows[i] = dataclasses.replace(
            row,
            median_s=median,
            iqr_s=spread,
            rounds=n,
            gb_per_s=bytes_moved / median * 1e-9 if bytes_moved else None,
            tflop_per_s=flops / median * 1e-12 if flops else None,
            share_of_copy=copy / median if bytes_moved else None,
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text, the fastest first; losing rows are printed too."""
    head = ["variant", "median", "iqr", "GB/s", "TFLOP/s", "of copy", "peak MB", "error"]
    lines = [head]
    for row in sorted((r for r in rows if r.median_s is not None), key=lambda r: r.median_s):
        lines.append(
            [
                row.variant,
                f"{row.median_s * 1e3:.3f} ms",
                f"{row.iqr_s * 1e3:.3f} ms",
                "" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
                "" if row.tflop_per_s is None else f"{row.tflop_per_s:.3f}",
                "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
                "" if row.max_error is None else f"{row.max_error:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    title = f"{rows[0].op}  {rows[0].shape}  {rows[0].dtype}  {rows[0].device}"
    body = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    untimed = [
        f"{row.variant}: {row.note or f'{(row.peak_bytes or 0) / 1e6:.1f} MB at most'}"
        for row in rows
        if row.median_s is None
    ]
    return "\n".join([title, *body, *untimed] if len(lines) > 1 else [title, *untimed])
