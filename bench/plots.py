"""Draws bench/results/<machine>/*.json: shares of a ceiling, speed against others, memory.

    python bench/plots.py [--results FOLDER]

For each machine, beside its files:

ceilings.png   how near each of our ops comes to the ceiling timed with it (bare products, a sum of
               the same buffer, a copy of as many bytes)
others.png     the time of every other implementation over ours, on a logarithmic axis; left of 1 it
               is faster than ours
memory.png     peak memory of a head, forward and backward, against the number of tokens
iteration.png  seconds of an iteration of PPO by its parts: TRL's, ours, the products alone
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from common import OURS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report import Key, Line, Wrong, lines_of, read_all

ROOT = Path(__file__).resolve().parents[1]
BLUE, GREY = "#0072B2", "#7f7f7f"
# Kind of implementation -> colour and marker, Okabe and Ito's; the first whose words match.
KINDS = {
    "a package's": (r"TRL|verl|OpenRLHF|Liger|cut-cross|flash|^generate", "#D55E00", "o"),
    "ours, another mode": (r"^(cuda|triton|cpu)\b", GREY, "s"),
    "torch.compile": (r"torch\.compile", "#009E73", "D"),
    "PyTorch": ("", BLUE, "^"),
}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
HEIGHT = 0.17  # inches a line
# Part of an iteration of PPO -> the phases, of any side, that it is made of.
PARTS = {
    "sampling": ("collect: sample", "sample"),
    "log-probs, values, scores": (
        "collect: log-probs, values", "collect: score",  # ours
        "log-probs", "scalars",  # TRL's
        "reference", "value", "reward",  # products
    ),
    "updates": ("update policy, with ptx", "update value", "update policy"),
}  # fmt: skip
COLOURS = dict(zip([*PARTS, "the rest"], ("#56B4E9", "#009E73", "#E69F00", GREY), strict=True))


def figure(lines: int) -> tuple[Figure, Axes]:
    """A figure with room for so many named lines, the first on top."""
    made = Figure(figsize=(9, 1.1 + HEIGHT * max(lines, 6)), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots()
    axes.set_ylim(max(lines, 1) - 0.5, -0.5)
    return made, axes


def name_of(key: Key) -> str:
    """op, shape, dtype and backend."""
    op, shape, dtype, backend = key
    return f"{op}  {shape}  {dtype.replace('bfloat', 'bf').replace('float', 'fp')}, {backend}"


def ceilings(lines: dict[Key, Line], path: Path) -> None:
    """Bars to the share of the ceiling that was timed beside each."""
    found = []
    for key, line in lines.items():
        if match := re.match(r"(\d+)% of (.*)", line.ceiling):
            found.append((key, int(match[1]), match[2]))
    found.sort(key=lambda item: (item[2] == "a copy", -item[1]))
    made, axes = figure(len(found))
    for y, (_, share, ceiling) in enumerate(found):
        axes.barh(y, min(share, 130), color=GREY if ceiling == "a copy" else BLUE)
        axes.text(min(share, 130) + 1, y, f"{share} % of {ceiling}", va="center", fontsize=6.5)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlim(0, 190)
    axes.set_yticks(range(len(found)), [name_of(key) for key, _, _ in found])
    axes.set_xlabel("share of the speed of a ceiling, %")
    axes.set_title("How near to a ceiling (blue: of the op itself; grey: a copy of as many bytes)")
    made.savefig(path, dpi=130)


def others(lines: dict[Key, Line], path: Path) -> None:
    """A mark for each other implementation, right of 1 where ours is faster."""
    found = [(key, line) for key, line in lines.items() if line.others]
    found.sort(key=lambda item: (item[0][0], item[0][1:]))
    made, axes = figure(len(found))
    marks: dict[str, list[tuple[float, int]]] = {kind: [] for kind in KINDS}
    for y, (_, line) in enumerate(found):
        for name, ratio in line.others.items():
            kind = next(kind for kind, (words, *_) in KINDS.items() if re.search(words, name))
            marks[kind].append((ratio, y))
    for kind, points in marks.items():
        _, colour, marker = KINDS[kind]
        x, y_of = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y_of, marker, color=colour, markersize=4.5, label=kind)
    axes.set_xscale("log")
    axes.axvspan(axes.get_xlim()[0], 1, color="#D55E00", alpha=0.07)
    axes.legend(loc="lower right")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [name_of(key) for key, _ in found])
    axes.set_xlabel("time over ours")
    axes.set_title("Others against ours (left of 1: faster than ours)")
    made.savefig(path, dpi=130)


def memory(rows: Sequence[dict], path: Path) -> bool:
    """Lines of peak memory against tokens, of bench_memory.py; False where it was not run."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    shape = ""
    for row in rows:
        if row["op"] != "memory of a head" or row["peak_bytes"] is None:
            continue
        N, shape = row["shape"].split(" ", 1)
        curves[row["variant"]].append((int(N.removeprefix("N=")), row["peak_bytes"] / 2**20))
    if not curves:
        return False
    made = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots()
    for name, points in sorted(curves.items(), key=lambda item: -max(item[1])[1]):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", label=f"ours, {name}" if name in OURS else name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [str(n) for n in x])
    axes.set_xlabel("tokens")
    axes.set_ylabel("peak memory above the inputs, MiB")
    axes.set_title(f"A head's log-probs with gradients, {shape}")
    axes.legend()
    made.savefig(path, dpi=130)
    return True


def iteration(benchmarks: Sequence[dict], path: Path) -> bool:
    """Bars of seconds by part, of bench_ppo.py; False where it was not run."""
    bars: list[tuple[str, dict[str, float]]] = []
    for benchmark in benchmarks:
        phases = benchmark["extra_info"].get("phases", {})
        for name in ("TRL 1.12", "ours", "bare products"):
            if name not in phases:
                continue
            seconds = phases[name]
            parts = {part: sum(seconds.get(n, 0.0) for n in PARTS[part]) for part in PARTS}
            # TRL's updates are not timed apart from what else it does.
            left = seconds.get("seconds", sum(parts.values())) - sum(parts.values())
            parts["updates" if not parts["updates"] else "the rest"] = left
            case = benchmark["extra_info"]["rows"][0]["shape"].split(":")[0]
            bars.append((f"{case}: {name}", parts))
    if not bars:
        return False
    made = Figure(figsize=(9, 1.2 + 0.35 * len(bars)), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots()
    begins = [0.0] * len(bars)
    for part, colour in COLOURS.items():
        widths = [parts.get(part, 0.0) for _, parts in bars]
        axes.barh(range(len(bars)), widths, left=begins, color=colour, label=part)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    for y, whole in enumerate(begins):
        axes.text(whole, y, f" {whole:.2f} s", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.set_xlabel("seconds (TRL's updates with all that is not timed apart)")
    axes.set_title("An iteration of PPO, 32 prompts, a Llama of 8.5M parameters, fp32")
    axes.legend(loc="best")
    made.savefig(path, dpi=130)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    asked = parser.parse_args(argv)
    try:
        machines = {
            folder: read_all(folder)
            for folder in sorted(asked.results.glob("*"))
            if folder.is_dir()
        }
    except Wrong as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with matplotlib.rc_context(STYLE):
        for folder, files in machines.items():
            lines = lines_of(files)
            if not lines:
                continue
            benchmarks = [benchmark for file in files for benchmark in file["benchmarks"]]
            rows = [
                row
                for benchmark in benchmarks
                for row in benchmark.get("extra_info", {}).get("rows", [])
            ]
            ceilings(lines, folder / "ceilings.png")
            others(lines, folder / "others.png")
            memory(rows, folder / "memory.png")
            iteration(benchmarks, folder / "iteration.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
