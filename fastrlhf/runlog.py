"""What a run tells: metrics on disk, progress on the terminal, and the folder they stand in.

`RunLog` appends one JSON object a step to `metrics.jsonl` and the same scalars to TensorBoard.
`progress` shows rate and time left: a bar on a terminal, a plain line about every 10 s elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from fastrlhf.errors import UserError

PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress where there is no terminal."""


def writable_dir(path: str | PathLike[str]) -> Path:
    """Make the folder if it is missing and make sure that a file can be written in it.

    Raises:
        UserError: a file is in the way, or the folder cannot be made or written to.
    """
    folder = Path(path).expanduser()
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                message = "a file is in the way of the output folder"
                raise UserError.at(part, None, None, message)
            break
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"cannot write to the output folder: {error.strerror}"
        raise UserError.at(folder, None, None, message) from None
    return folder


class RunLog:
    """The metrics of one run: `metrics.jsonl`, TensorBoard events, and wandb if asked for.

    A line is `{"step": int, "seconds": float, name: float, ...}`; `seconds` is the wall clock
    since the run began, the time between a stop and its resumption left out. A value that is not
    finite is written as null, since JSON has no word for it. Each line is flushed to the system
    before `log` returns. One process writes: the others of a run pass `enabled=False`.
    """

    def __init__(
        self,
        out_dir: str | PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: bool = False,
        enabled: bool = True,
    ) -> None:
        """Open the log.

        Args:
            out_dir: the run's folder; made if it is missing.
            resume_step: the step of the checkpoint that the run goes on from: what was logged
                after it is cut off. None begins anew and replaces an older log.
            tensorboard: write events to `out_dir/tensorboard`.
            wandb: also send the metrics to Weights & Biases.
            enabled: False writes nothing at all.

        Raises:
            UserError: the folder cannot be written, the old log is broken, or a package for
                TensorBoard or wandb is missing.
        """
        self._file: TextIO | None = None
        self._events: Any = None
        self._wandb: Any = None
        self._begin = time.monotonic()
        if not enabled:
            return
        folder = writable_dir(out_dir)
        self.path = folder / "metrics.jsonl"
        kept: list[str] = []
        seconds = 0.0
        if resume_step is not None and self.path.exists():
            kept, seconds = _lines_until(self.path, resume_step)
        _replace(self.path, "".join(kept))
        self._begin -= seconds
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = _tensorboard_writer(folder / "tensorboard", resume_step)
        if wandb:
            self._wandb = _wandb_run(folder, fresh=resume_step is None)

    def log(self, step: int, **metrics: float) -> None:
        """Append one line.

        Args:
            step: the step that the values belong to.
            metrics: numbers or 0-d tensors; `step` and `seconds` are taken.
        """
        if self._file is None:
            return
        if "seconds" in metrics:
            raise ValueError("metrics: 'seconds' is the log's own")
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        seconds = round(time.monotonic() - self._begin, 3)
        self._file.write(json.dumps({"step": step, "seconds": seconds, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Write what is held back and close all files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lines_until(path: Path, step: int) -> tuple[list[str], float]:
    """Return the lines of a log up to a step, and the seconds of the last of them."""
    kept: list[str] = []
    seconds = 0.0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # the run was killed while it wrote its last line
        try:
            record = json.loads(line)
            belongs = record["step"] <= step
            line_seconds = float(record["seconds"])
        except (ValueError, TypeError, KeyError):
            message = "not a line of metrics: 'step' and 'seconds' are wanted"
            raise UserError.at(path, number, None, message) from None
        if belongs:
            kept.append(line)
            seconds = line_seconds
    return kept, seconds


def keep_lines(path: Path, belongs: Callable[[dict[str, Any]], bool]) -> None:
    """Cut a file of JSON lines down to the records that belong; a missing file stays missing.

    For resuming: what an interrupted run wrote after its last checkpoint is written again. A last
    line without its end, which a kill can leave, goes too.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and belongs(json.loads(line))]
    _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    """Give the file a new content in one step, so that a kill leaves the old one or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _tensorboard_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        message = f"TensorBoard needs the package '{error.name}': pip install 'fastrlhf[train]'"
        raise UserError(message) from None
    if resume_step is None:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    # Events of this step and later, from before the stop, are hidden by TensorBoard.
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge_step)


def _wandb_run(folder: Path, *, fresh: bool) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        message = f"wandb needs the package '{error.name}': pip install wandb"
        raise UserError(message) from None
    # One identity from the start of a run, so that a resumed run goes on in the same plots.
    identity = folder / "wandb_id"
    if fresh or not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(
        project="fastrlhf",
        name=folder.name,
        id=identity.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
    )


# ---------------------------------------------------------------------------------------------
# Progress


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, n: int = 1, **shown: float | str) -> None:
        """Count `n` more units as done; `shown` are values to print beside the rate."""


@contextlib.contextmanager
def progress(
    description: str,
    total: int | None,
    unit: str = "step",
    *,
    start: int = 0,
    enabled: bool = True,
) -> Iterator[Progress]:
    """Show how far a loop is, on stderr, while the block runs.

    Args:
        description: what is going on, for example "ppo".
        total: the number of units at the end; None if it is not known.
        unit: what is counted.
        start: units done before (a resumed run); they count for the place, not for the rate.
        enabled: False shows nothing.
    """
    if not enabled:
        yield _NoProgress()
    elif sys.stderr.isatty():
        with _bar(description, total, unit, start) as shown:
            yield shown
    else:
        plain = PlainProgress(description, total, unit, start=start, stream=sys.stderr)
        try:
            yield plain
        finally:
            plain.finish()


class _NoProgress:
    def advance(self, n: int = 1, **shown: float | str) -> None:
        return


class PlainProgress:
    """Progress as plain lines, for logs and pipes; see `progress` for the arguments."""

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        *,
        start: int,
        stream: TextIO,
        interval: float = PLAIN_INTERVAL,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.start = self.done = start
        self.stream, self.interval = stream, interval
        self.begin = self.printed = time.monotonic()
        self.shown: dict[str, float | str] = {}

    def advance(self, n: int = 1, **shown: float | str) -> None:
        """Count `n` more units, and print a line if the last one is old enough."""
        self.done += n
        self.shown.update(shown)
        now = time.monotonic()
        if now - self.printed >= self.interval:
            self.printed = now
            self._print(now, last=False)

    def finish(self) -> None:
        """Print the last line."""
        self._print(time.monotonic(), last=True)

    def _print(self, now: float, *, last: bool) -> None:
        elapsed = now - self.begin
        rate = (self.done - self.start) / elapsed if elapsed > 0 else 0.0
        place = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        units = self.unit if self.unit == "%" else f"{self.unit}s"
        parts = [f"{place} {units}", f"{_rate(rate)} {self.unit}/s"]
        if last:
            parts.append(f"took {_clock(elapsed)}")
        elif self.total is not None and rate > 0:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        parts += [f"{name} {_number(value)}" for name, value in self.shown.items()]
        print(f"{self.description}: {', '.join(parts)}", file=self.stream, flush=True)


@contextlib.contextmanager
def _bar(description: str, total: int | None, unit: str, start: int) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]} " + unit + "/s"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[shown]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(description, total=total, completed=start, rate="", shown=""))


class _Bar:
    """A rich progress bar with the interface of `Progress`."""

    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task
        self.done, self.begin = 0, time.monotonic()
        self.shown: dict[str, float | str] = {}

    def advance(self, n: int = 1, **shown: float | str) -> None:
        self.done += n
        self.shown.update(shown)
        elapsed = time.monotonic() - self.begin
        self.bar.update(
            self.task,
            advance=n,
            rate=_rate(self.done / elapsed) if elapsed > 0 else "",
            shown=" ".join(f"{name} {_number(value)}" for name, value in self.shown.items()),
        )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{float(value):.4g}"


def _clock(seconds: float) -> str:
    """Return h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
