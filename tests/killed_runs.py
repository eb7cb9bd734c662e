"""A stage in a process of its own that kills itself (SIGKILL) at a chosen point of the run.

Beside tests/test_resume.py rather than in it, since a spawned process imports what it is to run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrlhf import ppo, pretrain, reward, runlog, sft, training

RUN: dict[str, Callable[[Any], Path]] = {
    "pretrain": pretrain.run,
    "sft": sft.run,
    "rm": reward.run,
    "ppo": ppo.run,
}
# A fork starts at once, but what is forked from a process that has used a GPU cannot use it.
START = "spawn" if torch.cuda.is_available() else "fork"


def assert_killed(stage: str, config: Any, where: str, step: int) -> None:
    """Run a stage until it dies: "after a step", "in a checkpoint" or at the end."""
    process = multiprocessing.get_context(START).Process(
        target=_run_and_die, args=(stage, config, where, step)
    )
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"{stage} went on for four minutes")
    assert process.exitcode == -signal.SIGKILL


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(stage: str, config: Any, where: str, step: int) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if where == "after a step":
        plain_log = runlog.RunLog.log

        def log(self: runlog.RunLog, at: int, **values: float) -> None:
            plain_log(self, at, **values)
            if at >= step:
                _die()

        runlog.RunLog.log = log  # type: ignore[method-assign]
    elif where == "in a checkpoint":
        plain_save = training.Session.save

        def save(self: training.Session, at: int) -> None:
            if at >= step:
                training.os.replace = _die  # type: ignore[assignment]
            plain_save(self, at)

        training.Session.save = save  # type: ignore[method-assign]
    else:  # before the model is written, all else being done
        training.Session.save_model = _die  # type: ignore[assignment]
    RUN[stage](config)
