"""Makes the README's table of results from bench/results/<machine>/*.json.

    python bench/report.py           # writes the table between the two markers in README.md
    python bench/report.py --check   # exit code 1 if README.md is not what it would write

The files are pytest-benchmark's, `pytest bench --benchmark-only --benchmark-json=FILE`, with the
rows of bench/common.py in each benchmark's extra_info. A line of the table is an op on a shape in
a dtype: our median, its GB/s or TFLOP/s, its share of the ceiling that was timed with it (a copy
where there was no other), and for each other implementation its time over ours, taken from the
rounds that they shared. Below 1.00 it is faster than ours: bold, and so is the line's op. What
could not be timed (a peer that is not installed, a wrong result, too little memory) is said in its
place. Ahead of the lines stand the targets of bench/targets.py, met or not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import targets
from common import OURS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench/report.py: begin -->", "<!-- bench/report.py: end -->"
HEAD = ("op", "shape", "dtype", "ours", "speed", "of ceiling", "time of others over ours")
NONE = "No results are committed yet."


class Wrong(Exception):
    """A file is not what it should be; the message is one line that names it."""


@dataclasses.dataclass
class Line:
    """What the results say of a backend of ours, on a shape in a dtype."""

    medians: list[float] = dataclasses.field(default_factory=list)
    speed: str = ""
    ceiling: str = ""
    others: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # of others without a time
    note: str = ""  # of ours, where it has no time


Key = tuple[str, str, str, str]  # op, shape, dtype, backend


def add(lines: dict[Key, Line], rows: Sequence[dict[str, Any]]) -> None:
    """Puts the rows of one benchmark, which were timed in the same rounds, into the lines."""
    compared = any(row["max_error"] is not None for row in rows)
    for ours in rows:
        if ours["variant"] not in OURS or (ours["median_s"] is None and not ours.get("note")):
            continue  # of memory alone: for the plot
        key = (ours["op"], ours["shape"], ours["dtype"], ours["variant"])
        line = lines.setdefault(key, Line())
        line.notes |= {row["variant"]: row["note"] for row in rows if row.get("note")}
        line.note = line.notes.pop(ours["variant"], "")
        if ours["median_s"] is None:
            continue
        line.medians.append(ours["median_s"])
        line.speed = speed(statistics.median(line.medians), ours)
        for other in rows:
            if other["median_s"] is None:
                continue
            ratio = other["median_s"] / ours["median_s"]
            # Files of before there was a field for it: a ceiling's result is not compared.
            if other.get("ceiling", compared and other["max_error"] is None):
                line.ceiling = f"{ratio:.0%} of {other['variant']}"
            elif other is not ours:
                line.others[other["variant"]] = ratio
        if not line.ceiling and ours["share_of_copy"] is not None:
            line.ceiling = f"{ours['share_of_copy']:.0%} of a copy"


def speed(median: float, row: dict[str, Any]) -> str:
    """GB/s or TFLOP/s at this median, from the row's own count."""
    if row["tflop_per_s"] is not None:
        return f"{row['tflop_per_s'] * row['median_s'] / median:.3f} TFLOP/s"
    if row["gb_per_s"] is not None:
        return f"{row['gb_per_s'] * row['median_s'] / median:.1f} GB/s"
    return ""


def duration(seconds: float) -> str:
    """Three digits, in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def cells(key: Key, line: Line) -> list[str]:
    """A line of the table."""
    op, shape, dtype, backend = key
    others = []
    for name, ratio in sorted(line.others.items(), key=lambda item: item[1]):
        text = f"{name} {ratio:.2f}" if ratio < 10 else f"{name} {ratio:.0f}"
        others.append(f"**{text}**" if ratio < 1 else text)
    others += [f"{name}: {note}" for name, note in line.notes.items()]
    loses = bool(line.note) or any(ratio < 1 for ratio in line.others.values())
    median = duration(statistics.median(line.medians)) if line.medians else f"**{line.note}**"
    return [
        f"**{op}**" if loses else op,
        shape,
        dtype,
        f"{backend} {median}",
        line.speed,
        line.ceiling,
        "; ".join(others),
    ]


def as_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def machine(name: str, files: Sequence[dict[str, Any]]) -> str:
    """Where, with what, when: a sentence over a machine's table."""
    facts = [file["machine_info"] for file in files]

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values if value}))

    cpu = all_of(f["cpu"].get("brand_raw", "") for f in facts)
    count = all_of(f["cpu"].get("count", "") for f in facts)
    parts = [f"{cpu}, processors: {count}"]
    if gpu := all_of(f.get("gpu", "") for f in facts):
        parts = [gpu, f"CUDA {all_of(f.get('cuda', '') for f in facts)}"]
    parts.append(f"torch {all_of(f.get('torch', '') for f in facts)}")
    parts.append(f"threads: {all_of(f.get('threads', '') for f in facts)}")
    if isa := all_of(f.get("isa", "") for f in facts):
        parts.append(isa)
    commits = all_of(
        str(file["commit_info"].get("id", "unknown"))[:7]
        + (" with changes" if file["commit_info"].get("dirty") else "")
        for file in files
    )
    days = sorted({file["datetime"][:10] for file in files})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"`{name}`: {'; '.join(parts)}; commit {commits}; {when}."


def read(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        Wrong: it is no JSON, or not pytest-benchmark's.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Wrong(f"{path}: cannot be read as JSON: {error}") from error
    wanted = ("machine_info", "commit_info", "benchmarks", "datetime")
    missing = [key for key in wanted if not isinstance(found, dict) or key not in found]
    if missing:
        raise Wrong(f"{path}: no pytest-benchmark record: {', '.join(missing)} missing")
    return found


def read_all(folder: Path) -> list[dict[str, Any]]:
    """A machine's files of results, the oldest first."""
    return sorted(map(read, sorted(folder.glob("*.json"))), key=lambda file: file["datetime"])


def lines_of(files: Sequence[dict[str, Any]]) -> dict[Key, Line]:
    """What the files say, line by line."""
    lines: dict[Key, Line] = {}
    for file in files:
        for benchmark in file["benchmarks"]:
            add(lines, benchmark.get("extra_info", {}).get("rows", []))
    return lines


def report(results: Path) -> str:
    """The text between the markers."""
    parts = []
    for folder in sorted(p for p in results.glob("*") if p.is_dir()):
        files = read_all(folder)
        lines = lines_of(files)
        if not lines:
            continue
        parts.append(machine(folder.name, files))
        benchmarks = [benchmark for file in files for benchmark in file["benchmarks"]]
        parts.append(as_table(targets.HEAD, targets.judge(benchmarks, files[-1]["machine_info"])))
        ordered = sorted(lines, key=lambda key: key[0])
        parts.append(as_table(HEAD, [cells(key, lines[key]) for key in ordered]))
    return "\n\n".join(parts) or NONE


def place(readme: str, text: str) -> str:
    """README with the text between its markers.

    Raises:
        Wrong: a marker is missing, or stands twice, or they stand the wrong way round.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise Wrong(f"README: wanted once {BEGIN} and after it once {END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    asked = parser.parse_args(argv)
    try:
        old = asked.readme.read_text(encoding="utf-8")
        new = place(old, report(asked.results))
    except (Wrong, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.check:
        if new != old:
            print(
                f"{asked.readme}: the table of results is out of date; run python bench/report.py",
                file=sys.stderr,
            )
        return int(new != old)
    asked.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
