"""What the kernels and the generator are to reach, and whether the committed results do.

Each target asks of one or several benchmarks for a number: how many times as long another variant
takes, a share of a ceiling, a share of memory, microseconds. Of several cases the worst counts, and
is named. bench/report.py prints them all, those that are missed or not yet measured too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

HEAD = ("target", "wanted", "measured", "met")

Rows = Sequence[dict[str, Any]]
Found = Iterable[tuple[str, float]]  # the case, its number
Ask = Callable[[Sequence[dict[str, Any]]], Found]


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on what `ask` finds in the records of pytest-benchmark."""

    what: str
    bound: float
    ask: Ask
    at_least: bool = True
    unit: str = ""
    gpu: bool = False

    def cells(self, benchmarks: Sequence[dict[str, Any]]) -> list[str]:
        """A line of the table."""
        wanted = f"{'at least' if self.at_least else 'at most'} {self.bound:.3g}{self.unit}"
        found = sorted(self.ask(benchmarks), key=lambda case: case[1], reverse=not self.at_least)
        if not found:
            return [self.what, wanted, "not yet measured", ""]
        case, worst = found[0]
        met = worst >= self.bound if self.at_least else worst <= self.bound
        which = f"{worst:.3g}{self.unit} ({case})"
        return [self.what, wanted, which, "yes" if met else "**no**"]


def groups(benchmarks: Sequence[dict[str, Any]], op: str, shape: str) -> Iterable[tuple[str, Rows]]:
    """The comparisons of an op whose shape matches: (shape and dtype, rows)."""
    for benchmark in benchmarks:
        rows = benchmark.get("extra_info", {}).get("rows") or []
        if rows and rows[0]["op"] == op and re.search(shape, rows[0]["shape"]):
            yield f"{rows[0]['shape']}, {rows[0]['dtype']}", rows


def ours_of(rows: Rows) -> dict[str, Any] | None:
    """The fastest of our backends."""
    timed = [r for r in rows if r["variant"] in ("cpu", "triton", "cuda") and r["median_s"]]
    return min(timed, key=lambda row: row["median_s"], default=None)


def times(op: str, shape: str, other: str, *, slowest: bool = False) -> Ask:
    """The time of the fastest variant whose name matches, over ours."""

    def ask(benchmarks: Sequence[dict[str, Any]]) -> Found:
        pick = max if slowest else min
        for case, rows in groups(benchmarks, op, shape):
            medians = [r["median_s"] for r in rows if re.search(other, r["variant"])]
            timed = [median for median in medians if median]
            if (ours := ours_of(rows)) and timed:
                yield case, pick(timed) / ours["median_s"]

    return ask


def inverse(ask: Ask) -> Ask:
    """Our time over the other's."""
    return lambda benchmarks: ((case, 1 / ratio) for case, ratio in ask(benchmarks))


def scratch(op: str, shape: str, naive: str) -> Ask:
    """Our peak memory over another variant's, the gradients of both heads' inputs taken off."""

    def ask(benchmarks: Sequence[dict[str, Any]]) -> Found:
        for case, rows in groups(benchmarks, op, shape):
            N, H, V = (int(re.search(f"{x}=(\\d+)", case)[1]) for x in "NHV")  # type: ignore[index]
            gradients = 4 * H * (N + V)
            other = [r for r in rows if r["variant"] == naive and r["peak_bytes"]]
            if (ours := ours_of(rows)) and other:
                above = max(ours["peak_bytes"] - gradients, 0)
                yield case, above / (other[0]["peak_bytes"] - gradients)

    return ask


def growth(op: str, shape: str) -> Ask:
    """The time of the slowest over that of the fastest of variants that do the same work."""

    def ask(benchmarks: Sequence[dict[str, Any]]) -> Found:
        for _, rows in groups(benchmarks, op, shape):
            timed = [r for r in rows if r["median_s"]]
            first, last = timed[0], timed[-1]
            yield f"{last['variant']} over {first['variant']}", last["median_s"] / first["median_s"]

    return ask


def shares(op: str, shape: str) -> Ask:
    """The share of a copy's speed that the fastest of ours reaches."""

    def ask(benchmarks: Sequence[dict[str, Any]]) -> Found:
        for case, rows in groups(benchmarks, op, shape):
            if ours := ours_of(rows):
                yield case, ours["share_of_copy"]

    return ask


def memory(op: str, shape: str, other: str) -> Ask:
    """Our peak memory over the least of the variants whose name matches."""

    def ask(benchmarks: Sequence[dict[str, Any]]) -> Found:
        for case, rows in groups(benchmarks, op, shape):
            peaks = [r["peak_bytes"] for r in rows if re.search(other, r["variant"])]
            there = [peak for peak in peaks if peak]
            if (ours := ours_of(rows)) and there:
                yield case, ours["peak_bytes"] / min(there)

    return ask


def slowing(op: str) -> Ask:
    """Of cases of one backend, the time an operation over that of the first."""

    def ask(benchmarks: Sequence[dict[str, Any]]) -> Found:
        speeds = [
            (case, ours["tflop_per_s"])
            for case, rows in groups(benchmarks, op, "")
            if (ours := ours_of(rows))
        ]
        return ((case, speeds[0][1] / speed) for case, speed in speeds[1:])

    return ask


def calls(benchmarks: Sequence[dict[str, Any]]) -> Found:
    """Microseconds of a call with gradient above its C++ work."""
    for benchmark in benchmarks:
        for row in benchmark.get("extra_info", {}).get("calls") or []:
            if not row["op"].startswith("floor"):
                yield row["op"], row["over_us"]


WIDE = r"V=(50257|151936) "
ROWS = "logprobs_from_logits"
NAIVE = "product, log_softmax, gather"
HEADS, LARGE = "N=2048 H=512 V=50257", "N=8192 H=4096 V=151936"
TARGETS = [
    Target("log-probs against log_softmax().gather()", 4,
           times(ROWS, WIDE + "forward$", r"^log_softmax\(\)")),
    Target("log-probs against TRL 1.16", 2.5, times(ROWS, WIDE + "forward$", "^TRL")),
    Target("log-probs, share of the lower ceiling", 0.85,
           times(ROWS, WIDE + "forward$", "^ceiling", slowest=True)),
    Target("log-probs with backward against log_softmax().gather()", 2.5,
           times(ROWS, WIDE + r"forward\+backward", r"^log_softmax\(\)")),
    Target("log-probs with entropy over those without", 1.3,
           inverse(times(ROWS, WIDE + "forward with entropy", "alone")), at_least=False),
    Target("linear_logprobs with backward over four bare products", 1.15,
           inverse(times("linear_logprobs", HEADS + r" forward\+backward", "bare")),
           at_least=False),
    Target("linear_logprobs, scratch over that of plain PyTorch", 0.1,
           scratch("linear_logprobs", HEADS + r" forward\+backward", NAIVE), at_least=False),
    *(
        target
        for op in ("linear_cross_entropy", "linear_ppo_loss")
        for target in (
            Target(f"{op} over three bare products", 1.2,
                   inverse(times(op, HEADS, "bare")), at_least=False),
            Target(f"{op} over the recomputing mode", 0.85,
                   inverse(times(op, HEADS, "recomputing")), at_least=False),
        )
    ),
    Target("gae against verl's loop", 15, times("gae", "B=512", "verl")),
    Target("gae, the time of a step at T = 131072 over that at 1024", 1.2,
           growth("gae", "B T"), at_least=False),
    Target("rollout_advantages against torch operations, a loop over time", 5,
           times("rollout_advantages", "", "^torch, loop")),
    Target("rollout_advantages against torch operations, scans in blocks", 5,
           times("rollout_advantages", "", "^torch, blocks")),
    Target("ranking_loss, 64 prompts, against vectorised torch", 5,
           times("ranking_loss", "G=64", "padded|pair lists")),
    Target("a loss's call with gradient, over its bare work", 20, calls, at_least=False,
           unit=" us"),
    Target("generation, 8M, against the better of transformers' generate", 4,
           times("generation", "^8M", "^generate,")),
    Target("generation, 30M, against the better of transformers' generate", 2.5,
           times("generation", "^30M", "^generate,")),
    Target("generation against generate_batch", 2, times("generation", "", "^generate_batch")),
    Target("generation, share of the speed of its bare products", 0.5,
           times("generation", "", "^products alone$")),
    Target("PPO iteration against TRL 1.12, responses that end", 2,
           times("PPO iteration", "^geometric", "^TRL")),
    Target("PPO iteration against TRL 1.12, responses of full length", 1,
           times("PPO iteration", "^full", "^TRL")),
    Target("PPO iteration, memory above the weights over TRL 1.12's", 0.5,
           memory("PPO iteration", "^geometric", "^TRL"), at_least=False),
    Target("PPO iteration over its bare products, responses that end", 1.6,
           inverse(times("PPO iteration", "^geometric", "^bare")), at_least=False),
    Target("PPO iteration, time an operation at 2 and 4 times the prompts, tokens and layers", 1.25,
           slowing("PPO scaling"), at_least=False),
    Target("SFT step against the better of TRL's", 1, times("SFT step", "", "^TRL")),
    Target("SFT step, memory above the weights over that of TRL's fused head", 1,
           memory("SFT step", "", "^TRL 1.16"), at_least=False),
    Target("SFT step, memory above the weights over TRL's without it", 1 / 3,
           memory("SFT step", "", "without"), at_least=False),
    Target("log-probs, share of a copy's bandwidth", 0.9, shares(ROWS, WIDE + "forward$"),
           gpu=True),
    Target("log-probs with backward, share of a copy's bandwidth", 0.85,
           shares(ROWS, WIDE + r"forward\+backward"), gpu=True),
    Target("log-probs against TRL's kernel", 1, times(ROWS, "", "^TRL"), gpu=True),
    *(
        Target(f"{op} over its bare products", 1.2, inverse(times(op, LARGE, "bare")),
               at_least=False, gpu=True)
        for op in ("linear_logprobs", "linear_cross_entropy", "linear_ppo_loss")
    ),
    Target("linear_cross_entropy against Liger, TRL, cut-cross-entropy and torch's own", 1,
           times("linear_cross_entropy", "", "Liger|TRL|cut-cross|torch's own"), gpu=True),
    Target("gae, share of a copy's bandwidth", 0.7, shares("gae", "B=8192 T=2048"), gpu=True),
    Target("gae, the time of a step at T = 131072 over that at 1024", 1.2,
           growth("gae", "B T"), at_least=False, gpu=True),
    Target("decode_attention against flash-attn", 1,
           times("decode_attention", "", "^flash-attn"), gpu=True),
    Target("generation against the better of transformers' generate", 4,
           times("generation", "", "^generate,"), gpu=True),
    Target("a decode step of 1.2G parameters, share of a copy's bandwidth", 0.55,
           shares("decode_step", "^1.2G"), gpu=True),
    Target("a decode step of 6.7G parameters, share of a copy's bandwidth", 0.75,
           shares("decode_step", "^6.7G"), gpu=True),
]  # fmt: skip


def judge(benchmarks: Sequence[dict[str, Any]], machine_info: dict[str, Any]) -> list[list[str]]:
    """The lines for a machine: those of a GPU, or those of a processor."""
    gpu = bool(machine_info.get("gpu"))
    return [target.cells(benchmarks) for target in TARGETS if target.gpu == gpu]
