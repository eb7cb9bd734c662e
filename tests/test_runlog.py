"""Metrics that survive a kill, progress on pipes and terminals, and output folders."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrlhf.errors import UserError
from fastrlhf.runlog import PlainProgress, RunLog, progress, writable_dir

ROOT = Path(__file__).resolve().parents[1]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_log_writes_values_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", tensorboard=False) as log:
        log.log(1, loss=0.5, tokens=3)
        first = lines(tmp_path / "run")  # on disk before close
        log.log(2, loss=torch.tensor(0.25), norm=math.inf, kl=math.nan)
    first_line, second_line = lines(tmp_path / "run")
    assert [first_line] == first
    assert {k: v for k, v in first_line.items() if k != "seconds"} == {
        "step": 1,
        "loss": 0.5,
        "tokens": 3.0,
    }
    assert second_line["loss"] == 0.25
    assert second_line["norm"] is None
    assert second_line["kl"] is None
    assert 0 <= first_line["seconds"] <= second_line["seconds"] < 60
    log.close()  # a second close is harmless


def test_seconds_is_reserved(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(ValueError, match="seconds"):
        log.log(1, seconds=1.0)


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": step, "seconds": 100.0 * step, "loss": 1 / step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    lost = '{"step": 4, "seconds": 400.0, "loss": 9}\n{"step": 5, "seco'
    path.write_text(text + lost)
    with RunLog(tmp_path, resume_step=3, tensorboard=False) as log:
        assert path.read_text() == text
        log.log(4, loss=0.125)
    assert lines(tmp_path)[:3] == kept
    last = lines(tmp_path)[3]
    assert last["step"] == 4
    assert last["loss"] == 0.125
    assert 300.0 <= last["seconds"] < 360.0  # the clock goes on from the last kept line
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_replaces_the_old_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 1}\n')
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(7, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [7]


def test_resume_before_anything_was_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, resume_step=0, tensorboard=False) as log:
        log.log(1, loss=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"step": 1}', '{"step": "x", "seconds": 1}'])
def test_a_broken_log_is_named(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "seconds": 1}}\n{bad}\n')
    with pytest.raises(UserError) as caught:
        RunLog(tmp_path, resume_step=1, tensorboard=False)
    assert str(caught.value).startswith(f"{path}:2: not a line of metrics")


def test_a_disabled_log_writes_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", enabled=False) as log:
        log.log(1, loss=1.0)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_same_scalars_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars() -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("loss")]

    with RunLog(tmp_path) as log:
        for step, loss in ((1, 0.5), (2, 0.25), (3, 9.0)):
            log.log(step, loss=loss)
    assert scalars() == [(1, 0.5), (2, 0.25), (3, 9.0)]
    time.sleep(1.1)  # the names of event files count seconds, and are read in that order
    with RunLog(tmp_path, resume_step=2) as log:
        log.log(3, loss=0.125)
    assert scalars() == [(1, 0.5), (2, 0.25), (3, 0.125)]
    with RunLog(tmp_path) as log:
        log.log(1, loss=4.0)
    assert scalars() == [(1, 4.0)]


def test_wandb_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for "not there"
    with pytest.raises(UserError, match="wandb needs the package 'wandb': pip install wandb"):
        RunLog(tmp_path, tensorboard=False, wandb=True)


def test_plain_progress_prints_place_rate_and_time_left() -> None:
    stream = io.StringIO()
    bar = PlainProgress("ppo", 100, "step", start=20, stream=stream, interval=0.0)
    bar.begin -= 10.0  # ten seconds ago
    bar.advance(40, loss=0.12345)
    bar.begin = time.monotonic() - 3700.0
    bar.advance(n=40, kl=torch.tensor(2.0))
    bar.finish()
    first, second, last = stream.getvalue().splitlines()
    assert first == "ppo: 60/100 steps, 4 step/s, 0:10 left, loss 0.1235"
    assert second == "ppo: 100/100 steps, 0.0216 step/s, 0:00 left, loss 0.1235, kl 2"
    assert last == "ppo: 100/100 steps, 0.0216 step/s, took 1:01:40, loss 0.1235, kl 2"


def test_plain_progress_waits_between_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("generate", None, unit="prompt") as bar:
        for _ in range(5):
            bar.advance(3)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("generate: 15 prompts, ")
    assert "took 0:00" in line


def test_disabled_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 3, enabled=False) as bar:
        bar.advance(loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_progress_prints_its_last_line_when_the_loop_breaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loop() -> None:
        with progress("sft", 3) as bar:
            bar.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        loop()
    assert capsys.readouterr().err.startswith("sft: 1/3 steps, ")


def test_a_terminal_gets_a_bar() -> None:
    program = (
        "from fastrlhf.runlog import progress\n"
        "with progress('reward', 8, start=2) as bar:\n"
        "    for _ in range(6): bar.advance(loss=0.5)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"},
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how a Linux terminal says that the other side has closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "reward" in text
    assert "8/8" in text
    assert "step/s" in text
    assert "loss 0.5" in text


def test_writable_dir_makes_the_folder(tmp_path: Path) -> None:
    folder = writable_dir(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    assert writable_dir(str(folder)) == folder


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_file_in_the_way(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        writable_dir(tmp_path / below)
    assert str(caught.value) == f"{tmp_path / 'file'}: a file is in the way of the output folder"


def test_an_unwritable_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/sys/run")  # where even root can make nothing
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        folder = tmp_path / "locked" / "run"
    with pytest.raises(UserError) as caught:
        writable_dir(folder)
    assert str(caught.value).startswith(f"{folder}: cannot write to the output folder: ")
