"""Runs the benchmarks, the most important first, and keeps their results.

    python bench/run.py                         # all; `make bench`; begins none after 800 s
    python bench/run.py --rest                  # those that were not measured at this commit
    python bench/run.py gae whiten              # these
    python bench/run.py --seconds 300 --results FOLDER --no-peers

Each bench_<name>.py runs in a process of its own and replaces RESULTS/<machine>/<name>.json; what
there was no time for keeps its earlier file, if there is one, and is named at the end: --rest then
goes on with it. Exit code 1: a benchmark failed, or a result of ours was wrong; 2: wrong arguments;
3: the time was over. bench/report.py makes the README's tables from the files, bench/plots.py the
plots.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cpuinfo import get_cpu_info  # pytest-benchmark's

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
SECONDS = 800.0
# Whole iterations first; what a target of targets.py asks about comes before the rest.
ORDER = (
    "ppo",
    "sft",
    "generation",
    "logprobs_from_logits",
    "linear_logprobs",
    "linear_cross_entropy",
    "linear_ppo_loss",
    "gae",
    "rollout_advantages",
    "ranking_loss",
    "overhead",
    "ppo_scaling",
    "memory",
    "decode_attention",
    "append_kv",
    "sample",
    "policy_loss",
    "value_loss",
    "kl_divergence",
    "kl_penalty",
    "whiten",
    "shape_rewards",
    "gae_varlen",
)


def names() -> list[str]:
    """All benchmarks that there are; one that ORDER does not list comes last."""
    there = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    return [name for name in ORDER if name in there] + sorted(there - set(ORDER))


def machine() -> str:
    """The folder of this machine's results: of its GPU, or else of its processor and cores."""
    if torch.cuda.is_available():
        text = re.sub(r"NVIDIA|GeForce|\d+ ?GB", "", torch.cuda.get_device_name())
    else:
        brand = get_cpu_info().get("brand_raw", "cpu")
        brand = re.sub(r"\(R\)|\(TM\)|AMD|Intel|CPU|Processor|@.*|\d+-Core", "", brand)
        text = f"{brand} {os.cpu_count()}core"
    return "-".join(re.findall(r"[a-z0-9.]+", text.lower()))


def read(path: Path) -> dict[str, Any]:
    """A file of results, or {} where there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def measured_now(path: Path) -> bool:
    """Whether a file of results is whole, and of the commit that is checked out."""
    command = ["git", "-C", str(FOLDER), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found = read(path)
    whole = bool(commit) and not found.get("left_out")
    return whole and found.get("commit_info", {}).get("id") == commit


def keep(found: dict[str, Any], target: Path) -> None:
    """Results to their file; not in the place of more, if there was no time for all."""
    earlier = read(target)
    if not found.get("left_out") or not earlier or earlier.get("left_out"):
        target.write_text(json.dumps(found, indent=1) + "\n")


def run_one(name: str, target: Path, seconds: float, flags: Sequence[str]) -> str:
    """One benchmark: "measured", "failed", or "not finished" or "not begun" for want of time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pytest", str(FOLDER / f"bench_{name}.py"), "-q"]
        command += ["-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet"]
        command += [f"--seconds={seconds}", f"--benchmark-json={record}", *flags]
        # A test under xdist runs this too; a worker's mark would switch the benchmarks off.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        status = subprocess.run(command, cwd=FOLDER.parent, env=environment, check=False).returncode
        found = read(record)
    if found.get("benchmarks"):
        keep(found, target)
    elif status == 0:
        return "not begun"
    if status != 0:
        return "failed"
    return "not finished" if found.get("left_out") else "measured"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help="by default all there are")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin none after this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--machine", default=None, help=f"default: {machine()}")
    parser.add_argument(
        "--rest", action="store_true", help="leave out those whose results are of this commit"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave other packages out")
    asked = parser.parse_args(argv)
    for name in asked.names:
        if name not in names():
            close = difflib.get_close_matches(name, names(), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            parser.error(f"no benchmark '{name}'{hint}; there are: {', '.join(names())}")
    folder = asked.results / (asked.machine or machine())
    began = time.monotonic()
    outcomes: dict[str, str] = {}
    for name in asked.names or names():
        if asked.rest and measured_now(folder / f"{name}.json"):
            outcomes[name] = "measured before"
            continue
        left = asked.seconds - (time.monotonic() - began)
        if left <= 0:
            outcomes[name] = "not begun"
            continue
        print(f"== {name}: {left:.0f} s left", flush=True)
        flags = ["--no-peers"] if asked.no_peers else []
        outcomes[name] = run_one(name, folder / f"{name}.json", left, flags)
    print(f"\n{folder}, {time.monotonic() - began:.0f} s")
    for outcome in ("measured before", "measured", "failed", "not finished", "not begun"):
        if those := [name for name, found in outcomes.items() if found == outcome]:
            print(f"{outcome}: {', '.join(those)}")
    late = not {"not finished", "not begun"}.isdisjoint(outcomes.values())
    if late:
        print("--rest goes on with these")
    if "failed" in outcomes.values():
        return 1
    return 3 if late else 0


if __name__ == "__main__":
    sys.exit(main())
