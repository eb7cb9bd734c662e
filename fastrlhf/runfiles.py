"""Read back what a run left: JSON lines of metrics and samples, the resolved config.

A run that is still going, or was killed, may end in half a line: it is left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; of a missing file, none.

    Raises:
        UserError: a line that is not the last one is no JSON object.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError.at(path, number, None, "not a JSON object")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        UserError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError.at(path, None, None, f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError.at(path, None, None, "wanted a JSON object")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a stage's folder, {table: {field: value}}; empty if there is none.

    Raises:
        UserError: the file is no TOML.
    """
    path = folder / "config.toml"
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError.at(path, None, None, f"not TOML: {error}") from None


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric in the order of the log; what was not finite is NaN."""
    there = [record for record in records if name in record]
    steps = [float(record["step"]) for record in there]
    return steps, [math.nan if record[name] is None else float(record[name]) for record in there]


def last(records: Sequence[dict[str, Any]], name: str) -> float | None:
    """The last value of a metric, or None where the log has none."""
    found = [record[name] for record in records if record.get(name) is not None]
    return float(found[-1]) if found else None
