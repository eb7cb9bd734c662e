"""InstructGPT in miniature, from one command.

    fastrlhf demo                    # two seeds, claims 1, 4, 6, 7 and 8, minutes on two CPU cores
    fastrlhf demo --full             # all eight claims, under an hour
    fastrlhf demo --seeds 4 --first-seed 12 --out runs/more

Each seed goes from a blank model through pretraining, SFT, reward model, PPO and PPO-ptx, in a
process of its own: at this size one core a seed is faster than two cores for one. At the end the
seeds are pooled, the claims are judged and printed, and ``report.html`` is written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastrlhf.config import require
from fastrlhf.demo.claims import by_seed, judge_claims, load_seed
from fastrlhf.demo.miniature import FIRST_SEED, SeedRun, Settings, phases
from fastrlhf.demo.page import write_page
from fastrlhf.demo.text import print_claims
from fastrlhf.errors import UserError
from fastrlhf.runlog import progress, writable_dir

POLL_SECONDS = 0.5
# Rough shares of a seed's time, measured on two CPU cores; they only steer the progress bar.
WEIGHTS = {
    "pretrain": 130,
    "sft": 10,
    "start": 5,
    "comparisons": 35,
    "reward model": 45,
    "pairings": 30,
    "ppo": 40,
    "ppo-ptx": 45,
    "small model": 100,
    "large base": 500,
    "sft 16 epochs": 40,
}


@dataclass(slots=True, kw_only=True)
class DemoConfig:
    """Settings of the demonstration."""

    out: Path = Path("runs/demo")
    """Folder for everything: seed-10/, seed-11/, ..., claims.json, report.html."""
    full: bool = False
    """All eight claims: a large base model, a long SFT, PPO at other betas and gammas."""
    seeds: int = 2
    """How many seeds to run and pool."""
    first_seed: int = FIRST_SEED
    """The first of them; each makes a world, models and samples of its own."""
    workers: int = 0
    """Seeds at a time; 0: one a CPU core."""
    resume: bool = False
    """Go on where an interrupted run was; a finished one is only judged and reported again."""

    def __post_init__(self) -> None:
        require(self.seeds > 0, "seeds", f"must be positive, got {self.seeds}")
        require(0 <= self.first_seed < 2**20, "first_seed", "must lie in [0, 2**20)")
        require(self.workers >= 0, "workers", "must not be negative")


def run(config: DemoConfig) -> Path:
    """Run the seeds, judge the claims, write the report; returns its path."""
    started = time.monotonic()
    out = writable_dir(config.out)
    console = Console()
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    folders = {seed: out / f"seed-{seed}" for seed in seeds}
    _refuse_other_runs(config, folders)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(config.workers or cores or 1, config.seeds)
    threads = max(1, (cores or 1) // workers)
    console.print(
        f"InstructGPT in miniature: {config.seeds} seed(s), {workers} at a time with {threads} "
        f"thread(s) each, on {'the GPU' if torch.cuda.is_available() else 'the CPU'}; "
        f"logs in {config.out}/seed-*/log.txt"
    )
    _run_seeds(config, folders, workers, threads)
    found = [load_seed(folder) for folder in folders.values()]
    claims, alone = judge_claims(found), by_seed(found)
    meta = {
        "seeds": list(seeds),
        "full": config.full,
        "settings": asdict(Settings()),
        "seconds": round(time.monotonic() - started, 1),
    }
    (out / "demo.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (out / "claims.json").write_text(
        json.dumps([_claim_record(claim, alone) for claim in claims], indent=1) + "\n",
        encoding="utf-8",
    )
    print_claims(claims, alone, console)
    page = write_page(out, found, claims, alone, meta)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\n{page} shows it all. This took {minutes:.1f} minutes.")
    return page


def _claim_record(claim: Any, alone: dict[int, list[bool]]) -> dict[str, Any]:
    return {
        "number": claim.number,
        "title": claim.title,
        "shown": claim.shown,
        "seeds_that_show_it_alone": sum(alone[claim.number]),
        "checks": [asdict(check) | {"holds": check.holds} for check in claim.checks],
    }


def _refuse_other_runs(config: DemoConfig, folders: dict[int, Path]) -> None:
    """Never write over a run, and never go on with one that was made with other settings."""
    mine = json.dumps(asdict(Settings()), indent=1) + "\n"
    for folder in folders.values():
        file = folder / "settings.json"
        if file.exists() and not config.resume:
            raise UserError(f"{folder}: holds a run already; add --resume, or name another --out")
        if file.exists() and file.read_text(encoding="utf-8") != mine:
            raise UserError(f"{file}: the run was made with other settings; name another --out")
    for folder in folders.values():
        writable_dir(folder)
        (folder / "settings.json").write_text(mine, encoding="utf-8")


def _run_seeds(config: DemoConfig, folders: dict[int, Path], workers: int, threads: int) -> None:
    """Run every seed in a process of its own, ``workers`` at a time, under one progress bar."""
    waiting = list(folders)
    running: dict[int, subprocess.Popen[bytes]] = {}
    done = dict.fromkeys(folders, 0.0)
    with progress("demo", 100, "%") as bar:
        shown = 0
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    seed = waiting.pop(0)
                    running[seed] = _start(config, seed, folders[seed], threads)
                time.sleep(POLL_SECONDS)
                doing = {}
                for seed, process in list(running.items()):
                    done[seed], doing[f"seed {seed}"] = _state(config, seed, folders[seed])
                    if process.poll() is None:
                        continue
                    del running[seed]
                    if process.returncode != 0:
                        raise _failure(seed, folders[seed], process.returncode)
                    done[seed] = 1.0
                percent = int(100 * sum(done.values()) / len(done))
                bar.advance(max(0, percent - shown), **doing)
                shown = max(shown, percent)
        finally:
            for process in running.values():
                process.kill()
                process.wait()


def _start(config: DemoConfig, seed: int, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    arguments = {"out": str(folder), "seed": seed, "full": config.full, "threads": threads}
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fastrlhf.demo.worker", json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _state(config: DemoConfig, seed: int, folder: Path) -> tuple[float, str]:
    """How far a seed is, as a share of its work, and what it is doing, from the files it writes."""
    names = [name for name, _ in phases(SeedRun(folder, seed, config.full))] + ["examination"]
    clock = folder / "phases.json"
    finished = json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else {}
    left = [name for name in names if name not in finished]
    if not left:
        return 1.0, "done"
    whole = sum(WEIGHTS.get(name, 40) for name in names)
    past = sum(WEIGHTS.get(name, 40) for name in names if name in finished)
    log = folder / "log.txt"
    tail = log.read_bytes()[-2000:].decode("utf-8", "replace") if log.exists() else ""
    here = re.findall(r"(\d+)/(\d+) \w+", tail.rsplit("== ", 1)[-1])
    share = int(here[-1][0]) / max(1, int(here[-1][1])) if here else 0.0
    return (past + share * WEIGHTS.get(left[0], 40)) / whole, left[0]


def _failure(seed: int, folder: Path, code: int) -> RuntimeError:
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    tail: Sequence[str] = lines[-15:]
    return RuntimeError(
        f"seed {seed} ended with exit code {code}; its log {folder / 'log.txt'} closes with:\n"
        + "\n".join(tail)
    )
