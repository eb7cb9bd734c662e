"""Killed at any moment and resumed, a run ends with the same bits as one that nothing stopped.

The fast tests start a process that kills itself (SIGKILL) at a chosen point of a stage. The slow
ones start the command line in a process of its own and kill that from outside.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import RUN, assert_killed
from trainer_fixtures import (
    assert_same_bits,
    ppo_config,
    pretrain_config,
    read_lines,
    rm_config,
    sft_config,
)

from fastrlhf import config as config_file
from fastrlhf import sft

STAGES = ("pretrain", "sft", "rm", "ppo")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are taken in another order on other numbers of threads, and forks dislike threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stage_config(
    stage: str, out: Path, data: Path, base: Path, start: Path, judge: Path, scale: int = 1
) -> Any:
    """A run of 8 to 12 steps times ``scale``, with all that a checkpoint has to carry."""
    if stage == "pretrain":
        return pretrain_config(data, out, steps=12 * scale, save_every=3)
    if stage == "sft":  # dropout, the best epoch so far
        return sft_config(
            data, base, out, epochs=3 * scale, select="loss", residual_dropout=0.2, save_every=2
        )
    if stage == "rm":
        return rm_config(data, start, out, epochs=2 * scale, save_every=3)
    return ppo_config(  # two optimisers, the average of weights, an adaptive beta, samples
        data, start, judge, out, iterations=8 * scale, save_every=3, ptx_coef=0.5, ema=0.9,
        kl_target=0.1, minibatch_size=4,
    )  # fmt: skip


def metrics(out: Path) -> list[dict[str, Any]]:
    """All that was logged, less the clock."""
    lines = read_lines(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_equal_runs(stage: str, found: Path, wanted: Path) -> None:
    assert_same_bits(found / "model", wanted / "model")
    assert metrics(found) == metrics(wanted)
    if stage == "ppo":
        assert_same_bits(found / "value", wanted / "value")
        assert (found / "samples.jsonl").read_bytes() == (wanted / "samples.jsonl").read_bytes()
    left = {p.name for p in found.rglob("*") if p.name.endswith((".partial", ".tmp"))}
    assert not left


@pytest.mark.parametrize(
    ("where", "step"),
    [("after a step", 2), ("after a step", 7), ("in a checkpoint", 6), ("at the end", 0)],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_the_same_bits(
    stage: str,
    where: str,
    step: int,
    data: Path,
    base: Path,
    start: Path,
    judge: Path,
    whole_runs: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "killed"
    config = stage_config(stage, out, data, base, start, judge)
    assert_killed(stage, config, where, step)
    reached = metrics(out)[-1]["step"]
    assert reached == step or where != "after a step"
    assert not (out / "model").exists() or stage == "sft"
    RUN[stage](replace(config, resume=True))
    assert_equal_runs(stage, out, whole_runs(stage))


@pytest.fixture(scope="module")
def whole_runs(
    data: Path, base: Path, start: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The uninterrupted run of a stage, made once."""
    made: dict[str, Path] = {}

    def get(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"whole-{stage}")
            RUN[stage](stage_config(stage, made[stage], data, base, start, judge))
        return made[stage]

    return get


def test_a_run_killed_twice_resumes_too(
    data: Path, base: Path, start: Path, judge: Path, whole_runs: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "killed"
    config = stage_config("sft", out, data, base, start, judge)
    for number, step in enumerate((4, 7)):
        assert_killed("sft", replace(config, resume=number > 0), "after a step", step)
    sft.run(replace(config, resume=True))
    assert_equal_runs("sft", out, whole_runs("sft"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_command_line_killed_from_outside(
    stage: str, data: Path, base: Path, start: Path, judge: Path, tmp_path: Path
) -> None:
    def command(out: Path, *flags: str) -> list[str]:
        config = stage_config(stage, out, data, base, start, judge, scale=8)
        file = tmp_path / f"{out.name}.toml"
        config_file.save(config, file)
        return [sys.executable, "-m", "fastrlhf", stage, "--config", str(file), *flags]

    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), env=env, check=True, capture_output=True, timeout=300)
    total = metrics(whole)[-1]["step"]
    process = subprocess.Popen(
        command(killed), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = killed / "metrics.jsonl"
    limit = time.monotonic() + 200
    while time.monotonic() < limit:
        if log.exists() and log.read_bytes().count(b"\n") > total // 3:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "model").exists()
    subprocess.run(
        command(killed, "--resume"), env=env, check=True, capture_output=True, timeout=300
    )
    assert_equal_runs(stage, killed, whole)
