"""The text of a TOML config: its tables, the lines its keys stand on, and errors that name them."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from fastrlhf.commands import COMMANDS
from fastrlhf.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_PART = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_KEY = re.compile(rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*=")
_HEADER = re.compile(rf"\s*\[\[?\s*({_PART}(?:\s*\.\s*{_PART})*)\s*\]\]?\s*(?:#.*)?$")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where values came from: a name for messages and the TOML text, empty for a mapping."""

    name: str
    text: str

    def keys(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Yield each table header and key of the text as (path, line), one key a line."""
        table: tuple[str, ...] = ()
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := _HEADER.match(line):
                table = _split_key(header[1])
                yield table, number
            elif key := _KEY.match(line):
                yield (*table, *_split_key(key[1])), number

    def line(self, path: tuple[str, ...]) -> int | None:
        """Return the first line that sets `path` or something inside it, else None."""
        for key, number in self.keys():
            if key[: len(path)] == path:
                return number
        # An inline table holds its keys on its own line.
        return self.line(path[:-1]) if len(path) > 2 else None

    def line_of_leaf(self, name: str) -> int | None:
        """Return the line of the only key whose last part is `name`, else None."""
        lines = [number for key, number in self.keys() if key[-1] == name and len(key) > 1]
        return lines[0] if len(lines) == 1 else None

    def error(self, path: tuple[str, ...], message: str) -> UserError:
        """Make a UserError about the value at `path`, whose first part is the table if any."""
        fields = path[1:] if self.text else path
        return UserError.at(self.name, self.line(path), ".".join(fields) or None, message)


def _split_key(dotted: str) -> tuple[str, ...]:
    """Split `a."b.c".d` into its parts, quotes removed."""
    return tuple(part.strip("\"'") for part in re.findall(_PART, dotted))


def read_text(path: str | PathLike[str]) -> str:
    """Return the text of a config, or raise a UserError that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError.at(path, None, None, f"cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError.at(path, None, None, "the config is not UTF-8 text") from None


def document(source: Source) -> dict[str, dict[str, Any]]:
    """Parse the TOML and check that it holds known tables only."""
    try:
        tables = tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        what = str(error)[: found.start()] if found else str(error)
        line = len(source.text.splitlines()) or 1
        if found and found[1]:
            line, what = int(found[1]), f"{what}, at column {found[2]}"
        raise UserError.at(source.name, line, None, f"not valid TOML: {what}") from None
    valid = ", ".join(f"[{name}]" for name in COMMANDS)
    for name, value in tables.items():
        line_number = source.line((name,))
        if not isinstance(value, dict):
            message = f"key '{name}' stands outside the tables; valid tables: {valid}"
            raise UserError.at(source.name, line_number, None, message)
        if name not in COMMANDS:
            message = f"unknown table [{name}]{did_you_mean(name, COMMANDS)}; valid: {valid}"
            raise UserError.at(source.name, line_number, None, message)
    return tables


def table(source: Source, section: str, *, required: bool) -> dict[str, Any]:
    """Return one table; when it is missing, raise if it is required, else return no keys."""
    tables = document(source)
    if section not in tables and required:
        held = ", ".join(f"[{name}]" for name in tables) or "no table"
        raise UserError.at(source.name, None, None, f"no table [{section}]; the file has {held}")
    return tables.get(section, {})


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest valid name, or nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
