"""`fastrlhf bench`: the benchmarks of the source tree's bench/ folder.

    fastrlhf bench                     # all of them, results and plots, README's tables
    fastrlhf bench --rest              # those that the last run at this commit had no time for
    fastrlhf bench gae whiten          # these
    fastrlhf bench --no-peers --out /tmp/results

The benchmarks are part of the source tree and not of the installed package; bench/run.py measures,
bench/plots.py draws, and without --out bench/report.py writes the README's tables.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastrlhf.config import require
from fastrlhf.errors import UserError
from fastrlhf.toml_source import did_you_mean

FOLDER = Path(__file__).resolve().parents[1] / "bench"


def names() -> list[str]:
    """What there is to measure, by the files bench/bench_<name>.py."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


@dataclass(slots=True)
class BenchConfig:
    """What to measure, and where to keep it."""

    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    """Benchmarks, such as `gae whiten`; by default all that there are."""

    peers: bool = True
    """Also time the functions of other packages, where they are installed; rows of those that are
    not say so."""

    seconds: float = 800.0
    """Begin no benchmark after this many seconds; the most important come first."""

    rest: bool = False
    """Leave out what has been measured at this commit: a slow machine takes a second run."""

    out: Path | None = None
    """The folder for <machine>/<name>.json and plots; by default bench/results, and then README's
    tables are made anew too."""

    def __post_init__(self) -> None:
        require(self.seconds > 0, "seconds", f"must be above 0, got {self.seconds}")
        there = names()
        for op in self.ops:
            hint = did_you_mean(op, there)
            require(not there or op in there, "ops", f"no '{op}'{hint}; valid: {', '.join(there)}")


def run(config: BenchConfig) -> None:
    """Measure, draw, and write the tables.

    Raises:
        UserError: there is no bench/ folder, or a benchmark failed; what was measured is kept.
    """
    if not (FOLDER / "run.py").is_file():
        raise UserError("fastrlhf bench: the benchmarks are in the source tree, which is not here")
    where = [] if config.out is None else ["--results", str(config.out.expanduser().absolute())]
    flags = ([] if config.peers else ["--no-peers"]) + (["--rest"] if config.rest else [])
    status = _script("run.py", *config.ops, *flags, *where, "--seconds", str(config.seconds))
    steps = [("plots.py", where)] + ([("report.py", [])] if config.out is None else [])
    for script, arguments in steps:
        if _script(script, *arguments) != 0:
            raise UserError(f"fastrlhf bench: bench/{script} failed")
    if status == 1:
        raise UserError("fastrlhf bench: a benchmark failed, or gave a wrong result; see above")


def _script(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, str(FOLDER / name), *arguments], check=False).returncode
