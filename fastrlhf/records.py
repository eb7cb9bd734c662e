"""Datasets as JSON lines: typed readers that say what is wrong and where, and the paper's recipe.

    documents       {"text": str, "kind"?: str}; any suffix but .jsonl: the file is one plain text
    prompts         {"prompt": str, "user"?: str}
    demonstrations  {"prompt": str, "completion": str, "user"?: str}
    comparisons     {"prompt": str, "completions": [str] * K, "ranks": [int] * K, "user"?: str,
                     "labeler"?: str}          K >= 2; 1 is best; equal ranks are ties

Files are UTF-8, one JSON object a line; blank lines are skipped; other fields are kept in `extra`.
Every failure is a `UserError`: `path:line: field 'x': what is wrong`.

The recipe (Ouyang et al., 2022, section 3.2 and appendix A): drop near-duplicates by a long common
prefix, keep at most 200 prompts of one user, split by user, filter personal data. Every step is
deterministic and keeps the order of the records.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastrlhf.config import require
from fastrlhf.errors import UserError
from fastrlhf.personal_data import find_personal_data

AnyPath = str | PathLike[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text for language modelling."""

    text: str
    kind: str | None
    """What sort of text it is, for evaluation by kind."""
    line: int
    """The line of the file that it came from, from 1."""
    extra: dict[str, Any]
    """The record's other fields."""


@dataclasses.dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt without a label."""

    prompt: str
    user: str | None
    """Who wrote it; None: unknown, so the prompt counts as its own user."""
    line: int
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Demonstration:
    """One prompt and the completion that a labeler wrote for it."""

    prompt: str
    completion: str
    user: str | None
    line: int
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt and its K >= 2 completions, ranked by one labeler."""

    prompt: str
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    """As long as `completions`; lower is better, equal is a tie."""
    user: str | None
    labeler: str | None
    line: int
    extra: dict[str, Any]


class HasPrompt(Protocol):
    """What the recipe needs of a record."""

    @property
    def prompt(self) -> str:
        """The text."""

    @property
    def user(self) -> str | None:
        """Who wrote it, if that is known."""

    @property
    def line(self) -> int:
        """The line of the file, from 1."""


R = TypeVar("R", bound=HasPrompt)
AnyRecord = TypeVar("AnyRecord", Document, PromptRecord, Demonstration, Comparison)


# ---------------------------------------------------------------------------------------------
# Readers


def read_documents(path: AnyPath) -> list[Document]:
    """Read texts: a .jsonl file of {"text", "kind"?}, or any other file as one plain text."""
    if Path(path).suffix == ".jsonl":
        return [
            Document(row.text("text"), row.name("kind"), row.line, row.rest("text", "kind"))
            for row in _rows(path)
        ]
    text = "\n".join(line for _, line in _lines(path))
    if not text.strip():
        raise UserError.at(path, None, None, "the file is empty")
    return [Document(text, None, 1, {})]


def read_prompts(path: AnyPath) -> list[PromptRecord]:
    """Read prompts: {"prompt", "user"?} a line."""
    return [
        PromptRecord(row.text("prompt"), row.name("user"), row.line, row.rest("prompt", "user"))
        for row in _rows(path)
    ]


def read_demonstrations(path: AnyPath) -> list[Demonstration]:
    """Read demonstrations: {"prompt", "completion", "user"?} a line."""
    return [
        Demonstration(
            row.text("prompt"),
            row.text("completion"),
            row.name("user"),
            row.line,
            row.rest("prompt", "completion", "user"),
        )
        for row in _rows(path)
    ]


def read_comparisons(path: AnyPath) -> list[Comparison]:
    """Read rankings: {"prompt", "completions", "ranks", "user"?, "labeler"?} a line, K >= 2."""
    records = []
    for row in _rows(path):
        prompt, completions = row.text("prompt"), row.texts("completions")
        if len(completions) < 2:
            message = f"{len(completions)} given; a ranking needs at least 2"
            raise row.error("completions", message)
        ranks = row.integers("ranks")
        if len(ranks) != len(completions):
            message = f"{len(ranks)} ranks for {len(completions)} completions"
            raise row.error("ranks", message)
        rest = row.rest("prompt", "completions", "ranks", "user", "labeler")
        user, labeler = row.name("user"), row.name("labeler")
        records.append(Comparison(prompt, completions, ranks, user, labeler, row.line, rest))
    return records


def check_prompt_length(record: HasPrompt, n_tokens: int, limit: int, path: AnyPath) -> None:
    """Raise a UserError that names the record's line if its prompt has more than `limit` tokens."""
    if n_tokens > limit:
        message = f"{n_tokens} tokens, over the limit of {limit}"
        raise UserError.at(path, record.line, "prompt", message)


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """One parsed line and the checks of its fields."""

    path: AnyPath
    line: int
    values: dict[str, Any]

    def error(self, field: str, message: str) -> UserError:
        return UserError.at(self.path, self.line, field, message)

    def rest(self, *known: str) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if key not in known}

    def text(self, field: str) -> str:
        return self._text(field, self._get(field), "")

    def texts(self, field: str) -> tuple[str, ...]:
        items = self._list(field, "strings")
        # A model's output may be empty and is ranked like any other.
        return tuple(
            self._text(field, item, f"item {i}: ", empty_ok=True) for i, item in enumerate(items)
        )

    def integers(self, field: str) -> tuple[int, ...]:
        items = self._list(field, "integers")
        for i, item in enumerate(items):
            if not isinstance(item, int) or isinstance(item, bool):
                raise self.error(field, f"item {i}: wanted an integer, got {_kind(item)}")
        return tuple(items)

    def name(self, field: str) -> str | None:
        """An optional name or number of a person or a kind, as a string."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(field, value, "")

    def _get(self, field: str) -> Any:
        if field not in self.values:
            held = ", ".join(self.values) or "none"
            raise self.error(field, f"missing; the record's fields are: {held}")
        return self.values[field]

    def _list(self, field: str, of: str) -> list[Any]:
        value = self._get(field)
        if not isinstance(value, list):
            raise self.error(field, f"wanted a list of {of}, got {_kind(value)}")
        return value

    def _text(self, field: str, value: Any, item: str, *, empty_ok: bool = False) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"{item}wanted a string, got {_kind(value)}")
        if not empty_ok and not value.strip():
            raise self.error(field, f"{item}the string is empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can spell half of a surrogate pair, which no tokenizer can take.
            raise self.error(field, f"{item}not valid Unicode (an unpaired surrogate)") from None
        return value


def _lines(path: AnyPath) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line; only a line feed ends a line, as JSON lines want it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError.at(path, None, None, f"cannot read it: {error.strerror}") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise UserError.at(path, number, None, message) from None


def _rows(path: AnyPath) -> Iterator[_Row]:
    """Yield each JSON object of the file; a file without any is an error."""
    empty = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        empty = False
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"not valid JSON: {error.msg}, at column {error.colno}"
            raise UserError.at(path, number, None, message) from None
        except (ValueError, RecursionError):
            # An integer of thousands of digits, or brackets nested beyond the stack.
            raise UserError.at(path, number, None, "not usable JSON: too large a value") from None
        if not isinstance(values, dict):
            message = f"wanted a JSON object, got {_kind(values)}"
            raise UserError.at(path, number, None, message)
        yield _Row(path, number, values)
    if empty:
        raise UserError.at(path, None, None, "the file is empty")


def _kind(value: Any) -> str:
    """Return a JSON value's type in JSON's words."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]


# ---------------------------------------------------------------------------------------------
# The recipe


def drop_near_duplicates(
    records: Sequence[R], prefix_tokens: int, encode: Callable[[str], Sequence[int]]
) -> list[R]:
    """Keep the first of all records whose prompts begin with the same `prefix_tokens` tokens.

    A prompt shorter than that is a duplicate of an equal prompt only. Few-shot prompts that share
    their examples share their prefix: choose it longer than the examples to keep them.

    Args:
        records: anything with a `prompt`.
        prefix_tokens: the length of the common prefix, at least 1.
        encode: text to token ids.
    """
    require(prefix_tokens >= 1, "prefix_tokens", f"at least 1 is wanted, got {prefix_tokens}")
    seen: set[tuple[int, ...]] = set()
    kept = []
    for record in records:
        prefix = tuple(encode(record.prompt)[:prefix_tokens])
        if prefix not in seen:
            seen.add(prefix)
            kept.append(record)
    return kept


def cap_per_user(records: Sequence[R], cap: int = 200) -> list[R]:
    """Keep the first `cap` records of each user; without a user, of each prompt text."""
    require(cap >= 1, "cap", f"at least 1 is wanted, got {cap}")
    counts: dict[tuple[str, str], int] = {}
    kept = []
    for record in records:
        user = _user(record)
        counts[user] = counts.get(user, 0) + 1
        if counts[user] <= cap:
            kept.append(record)
    return kept


def split_by_user(records: Sequence[R], fractions: Sequence[float], seed: int) -> list[list[R]]:
    """Split the records so that no user is on two sides; without a user, no prompt text is.

    A user's side depends on seed and user alone, by a keyed hash: it is the same in every file,
    whatever else the file holds. The sides' shares are therefore near the fractions, not exact, and
    a side may be empty if users are few.

    Args:
        records: anything with `prompt` and `user`.
        fractions: the expected share of users for each side, not negative, with sum 1.
        seed: another seed gives another split.

    Returns:
        One list a fraction, each in the order of `records`.
    """
    valid = len(fractions) > 0 and all(fraction >= 0 for fraction in fractions)
    message = f"shares that sum to 1 are wanted, got {list(fractions)}"
    require(valid and math.isclose(sum(fractions), 1.0, abs_tol=1e-6), "fractions", message)
    ends = [sum(fractions[: i + 1]) for i in range(len(fractions))]
    last = max(i for i, fraction in enumerate(fractions) if fraction > 0)
    split: list[list[R]] = [[] for _ in fractions]
    for record in records:
        place = _place(seed, _user(record))
        split[next((i for i in range(last) if place < ends[i]), last)].append(record)
    return split


def filter_personal_data(records: Sequence[AnyRecord], enabled: bool = True) -> list[AnyRecord]:
    """Drop every record in whose texts `find_personal_data` finds something.

    Args:
        records: of any type in this file.
        enabled: False keeps every record; the filter is a heuristic and drops some that are safe.
    """
    if not enabled:
        return list(records)
    return [
        record for record in records if not any(find_personal_data(text) for text in _texts(record))
    ]


def _texts(record: Document | PromptRecord | Demonstration | Comparison) -> tuple[str, ...]:
    if isinstance(record, Document):
        return (record.text,)
    if isinstance(record, PromptRecord):
        return (record.prompt,)
    if isinstance(record, Demonstration):
        return record.prompt, record.completion
    return record.prompt, *record.completions


def _user(record: HasPrompt) -> tuple[str, str]:
    """Return who counts as the record's user; a prompt text cannot be taken for a user's name."""
    return ("prompt", record.prompt) if record.user is None else ("user", record.user)


def _place(seed: int, user: tuple[str, str]) -> float:
    """Return a number in [0, 1) that depends on seed and user alone."""
    digest = hashlib.blake2b(json.dumps([seed, *user]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
