"""Readers that name file, line and field; the dataset recipe as properties."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.errors import UserError
from fastrlhf.personal_data import find_personal_data
from fastrlhf.records import (
    Comparison,
    Demonstration,
    Document,
    PromptRecord,
    cap_per_user,
    check_prompt_length,
    drop_near_duplicates,
    filter_personal_data,
    read_comparisons,
    read_demonstrations,
    read_documents,
    read_prompts,
    split_by_user,
)

DATA = Path(
    os.environ.get("FASTRLHF_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
GOOD = '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "completion": "c", "text": "t"}'


def write(folder: Path, *lines: str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return path


def message(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Reading what is good


def test_read_comparisons(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "user": "u", '
        '"labeler": 7, "source": "x"}',
        "",
        '{"prompt": "q", "completions": ["a", "a"], "ranks": [-5, 300]}\r',
        "",
    )
    assert read_comparisons(path) == [
        Comparison("p", ("a", "b", "c"), (2, 1, 2), "u", "7", 1, {"source": "x"}),
        Comparison("q", ("a", "a"), (-5, 300), None, None, 3, {}),
    ]


def test_read_demonstrations_and_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"prompt": "a\\u2028b", "completion": " c\\n", "user": null}')
    assert read_demonstrations(path) == [Demonstration("a\u2028b", " c\n", None, 1, {})]
    # A line separator inside a string does not end a JSON line.
    path = write(tmp_path, '{"prompt": "a\u2028b", "user": "u", "completion": "c"}', "  ")
    assert read_prompts(path) == [PromptRecord("a\u2028b", "u", 1, {"completion": "c"})]


def test_read_documents(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "t", "kind": "k", "n": 1}', '{"text": "u"}')
    assert read_documents(path) == [Document("t", "k", 1, {"n": 1}), Document("u", None, 2, {})]
    path = write(tmp_path, "one", "", "two ", name="plain.txt")
    assert read_documents(path) == [Document("one\n\ntwo ", None, 1, {})]


@pytest.mark.skipif(
    not (DATA / "qa_feedback" / "comparisons.jsonl").exists(),
    reason="no qa_feedback in the data folder; FASTRLHF_TEST_DATA names it",
)
def test_real_data() -> None:
    comparisons = read_comparisons(DATA / "qa_feedback" / "comparisons.jsonl")
    demonstrations = read_demonstrations(DATA / "qa_feedback" / "demonstrations.jsonl")
    prompts = read_prompts(DATA / "qa_feedback" / "prompts.jsonl")
    assert len(comparisons) == len(demonstrations) == len(prompts) == 381
    assert {len(record.ranks) for record in comparisons} == {4}
    assert {min(record.ranks) for record in comparisons} == {1}
    assert comparisons[0].ranks == (2, 3, 4, 1)
    assert all(record.user is None for record in prompts)


# Reading what is bad

BAD_ROWS = {
    "broken JSON": (read_prompts, '{"prompt": "p"', "not valid JSON: "),
    "two objects": (read_prompts, GOOD + GOOD, "not valid JSON: Extra data, at column "),
    "deep nesting": (read_prompts, "[" * 200_000, "not usable JSON: too large a value"),
    "long integer": (read_prompts, "9" * 5000, "not usable JSON: too large a value"),
    "a list": (read_prompts, '["p"]', "wanted a JSON object, got a list"),
    "a string": (read_documents, '"p"', "wanted a JSON object, got a string"),
    "no prompt": (
        read_prompts,
        '{"text": "p", "id": 1}',
        "field 'prompt': missing; the record's fields are: text, id",
    ),
    "no text": (read_documents, "{}", "field 'text': missing; the record's fields are: none"),
    "no completion": (read_demonstrations, '{"prompt": "p"}', "field 'completion': missing; "),
    "no completions": (read_comparisons, '{"prompt": "p"}', "field 'completions': missing; "),
    "no ranks": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a", "b"]}',
        "field 'ranks': missing; ",
    ),
    "prompt a number": (
        read_prompts,
        '{"prompt": 3}',
        "field 'prompt': wanted a string, got an integer",
    ),
    "prompt null": (read_prompts, '{"prompt": null}', "field 'prompt': wanted a string, got null"),
    "prompt empty": (read_prompts, '{"prompt": " \\n"}', "field 'prompt': the string is empty"),
    "completion empty": (
        read_demonstrations,
        '{"prompt": "p", "completion": ""}',
        "field 'completion': the string is empty",
    ),
    "half a surrogate pair": (
        read_prompts,
        '{"prompt": "a\\ud800"}',
        "field 'prompt': not valid Unicode (an unpaired surrogate)",
    ),
    "user a list": (
        read_prompts,
        '{"prompt": "p", "user": []}',
        "field 'user': wanted a string, got a list",
    ),
    "user a boolean": (
        read_prompts,
        '{"prompt": "p", "user": true}',
        "field 'user': wanted a string, got a boolean",
    ),
    "kind an object": (
        read_documents,
        '{"text": "p", "kind": {}}',
        "field 'kind': wanted a string, got an object",
    ),
    "completions a string": (
        read_comparisons,
        '{"prompt": "p", "completions": "ab", "ranks": [1, 2]}',
        "field 'completions': wanted a list of strings, got a string",
    ),
    "one completion": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a"], "ranks": [1]}',
        "field 'completions': 1 given; a ranking needs at least 2",
    ),
    "completion a number": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a", 1.5], "ranks": [1, 2]}',
        "field 'completions': item 1: wanted a string, got a number",
    ),
    "three ranks": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2, 3]}',
        "field 'ranks': 3 ranks for 2 completions",
    ),
    "ranks a number": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a", "b"], "ranks": 1}',
        "field 'ranks': wanted a list of integers, got an integer",
    ),
    "rank a fraction": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1.5]}',
        "field 'ranks': item 1: wanted an integer, got a number",
    ),
    "rank a boolean": (
        read_comparisons,
        '{"prompt": "p", "completions": ["a", "b"], "ranks": [true, 2]}',
        "field 'ranks': item 0: wanted an integer, got a boolean",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(case: str, tmp_path: Path) -> None:
    read, row, wanted = BAD_ROWS[case]
    path = write(tmp_path, GOOD, "", row)
    assert message(read, path).startswith(f"{path}:3: {wanted}")


READERS = [read_documents, read_prompts, read_demonstrations, read_comparisons]


@pytest.mark.parametrize("read", READERS)
def test_a_bad_file_is_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert message(read, missing) == f"{missing}: cannot read it: No such file or directory"
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert message(read, folder) == f"{folder}: cannot read it: Is a directory"
    empty = write(tmp_path, "", " ", name="empty.jsonl")
    assert message(read, empty) == f"{empty}: the file is empty"
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9"}')
    assert message(read, latin) == f"{latin}:2: not UTF-8: byte 0xe9 at column 16"


def test_a_bad_plain_text_is_named(tmp_path: Path) -> None:
    empty = write(tmp_path, " ", "", name="empty.txt")
    assert message(read_documents, empty) == f"{empty}: the file is empty"
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"one\n\xff")
    assert message(read_documents, latin) == f"{latin}:2: not UTF-8: byte 0xff at column 1"


def test_check_prompt_length() -> None:
    record = PromptRecord("p", None, 9, {})
    check_prompt_length(record, 8, 8, "a.jsonl")
    with pytest.raises(UserError) as caught:
        check_prompt_length(record, 9, 8, "a.jsonl")
    assert str(caught.value) == "a.jsonl:9: field 'prompt': 9 tokens, over the limit of 8"


# The recipe

users = st.none() | st.sampled_from(["u", "v", "w", "a"])
prompts = st.text("ab", min_size=1, max_size=6)


@st.composite
def record_lists(draw: st.DrawFn) -> list[PromptRecord]:
    pairs = draw(st.lists(st.tuples(prompts, users), max_size=40))
    return [PromptRecord(prompt, user, i, {}) for i, (prompt, user) in enumerate(pairs)]


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


@settings(max_examples=50, deadline=None)
@given(records=record_lists(), length=st.integers(1, 7))
def test_drop_near_duplicates(records: list[PromptRecord], length: int) -> None:
    kept = drop_near_duplicates(records, length, encode)
    prefixes = [record.prompt[:length] for record in kept]
    assert len(set(prefixes)) == len(prefixes)
    assert set(prefixes) == {record.prompt[:length] for record in records}
    assert drop_near_duplicates(kept, length, encode) == kept
    for record in kept:  # the first of its kind
        first = next(r for r in records if r.prompt[:length] == record.prompt[:length])
        assert record is first


def test_a_short_prompt_is_no_duplicate_of_a_longer_one() -> None:
    records = [PromptRecord(p, None, 1, {}) for p in ("abc", "abcd", "abcdx", "abcdy", "abc")]
    kept = drop_near_duplicates(records, 4, encode)
    assert [record.prompt for record in kept] == ["abc", "abcd"]


@settings(max_examples=50, deadline=None)
@given(records=record_lists(), cap=st.integers(1, 5))
def test_cap_per_user(records: list[PromptRecord], cap: int) -> None:
    def of(user: str | None, prompt: str, among: list[PromptRecord]) -> list[PromptRecord]:
        return [r for r in among if r.user == user and (user is not None or r.prompt == prompt)]

    kept = cap_per_user(records, cap)
    for record in records:
        assert of(record.user, record.prompt, kept) == of(record.user, record.prompt, records)[:cap]
    assert [r.line for r in kept] == sorted(r.line for r in kept)
    assert cap_per_user(kept, cap) == kept


def test_the_cap_of_the_paper_is_the_default() -> None:
    records = [PromptRecord(f"p{i}", "u", i, {}) for i in range(250)]
    assert cap_per_user(records) == records[:200]


@settings(max_examples=50, deadline=None)
@given(
    records=record_lists(),
    fractions=st.sampled_from([(1.0,), (0.5, 0.5), (0.8, 0.1, 0.1), (0.0, 1.0), (0.9, 0.1, 0.0)]),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_split_by_user(
    records: list[PromptRecord], fractions: tuple[float, ...], seed: int, data: st.DataObject
) -> None:
    sides = split_by_user(records, fractions, seed)
    assert len(sides) == len(fractions)
    assert sorted(r.line for side in sides for r in side) == [r.line for r in records]
    names = [
        {("user", r.user) if r.user is not None else ("prompt", r.prompt) for r in side}
        for side in sides
    ]
    assert sum(map(len, names)) == len(set().union(*names))  # no user on two sides
    for side, fraction in zip(sides, fractions, strict=True):
        assert [r.line for r in side] == sorted(r.line for r in side)
        assert fraction > 0 or not side
    shuffled = split_by_user(data.draw(st.permutations(records)), fractions, seed)
    for side, other in zip(sides, shuffled, strict=True):
        assert {r.line for r in side} == {r.line for r in other}


def test_the_split_is_near_its_fractions_and_depends_on_the_seed() -> None:
    records = [PromptRecord(f"p{i}", f"u{i // 3}", i, {}) for i in range(3000)]
    sides = split_by_user(records, (0.8, 0.1, 0.1), seed=1)
    for side, share in zip(sides, (0.8, 0.1, 0.1), strict=True):
        users = len({r.user for r in side})  # binomial out of 1000, within five standard deviations
        assert abs(users - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5
    other = split_by_user(records, (0.8, 0.1, 0.1), seed=2)
    common = {r.line for r in sides[1]} & {r.line for r in other[1]}
    assert len(common) < 100  # 30 are expected by chance


def test_a_user_is_on_the_same_side_in_every_file() -> None:
    one = [PromptRecord(f"p{i}", f"u{i % 50}", i, {}) for i in range(500)]
    # Other records of the same users, some with many more of them, some users missing.
    two = [PromptRecord(f"q{i}", f"u{i % 20 + 15}", i, {}) for i in range(900)]
    held_out = {r.user for r in split_by_user(one, (0.7, 0.3), seed=3)[1]}
    assert 0 < len(held_out) < 50
    train, other = split_by_user(two, (0.7, 0.3), seed=3)
    assert {r.user for r in other} <= held_out
    assert not {r.user for r in train} & held_out


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.6), (1.5, -0.5), (float("nan"), 1.0)])
def test_bad_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="field 'fractions': shares that sum to 1 are wanted, got"):
        split_by_user([], fractions, 0)


def test_bad_settings_of_the_recipe() -> None:
    with pytest.raises(UserError, match="field 'prefix_tokens': at least 1 is wanted, got 0"):
        drop_near_duplicates([], 0, encode)
    with pytest.raises(UserError, match="field 'cap': at least 1 is wanted, got 0"):
        cap_per_user([], 0)


PERSONAL = {
    "write to jane.doe+news@mail.example.co.uk today": "email",
    "call +44 20 7946 0958": "phone",
    "call (555) 010-1234.": "phone",
    "555-010-1234": "phone",
    "card 4111 1111 1111 1111, thanks": "card",
    "card 378282246310005": "card",
    "from 192.168.0.254:80": "ip address",
    "at 2001:db8::8a2e:370:7334 it is": "ip address",
}
IMPERSONAL = [
    "In 1776-1783 the war; 3.14159265358979 is pi.",
    "card-like 4111 1111 1111 1112 fails the check sum",
    "version 1.2.3 and 300.300.300.300 and 1.2.3.4.5",
    "std::vector<int> a::b::c at 12:30:45",
    "@handle and a @ b, user@localhost",
    "0000 0000 0000 0000",
    "The population was 1 234 567 in 2001, 555-0123 is too short.",
]


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_is_found(text: str) -> None:
    assert find_personal_data(text) == PERSONAL[text]


@pytest.mark.parametrize("text", IMPERSONAL)
def test_what_is_not_personal_data(text: str) -> None:
    assert find_personal_data(text) is None


def test_filter_personal_data_reads_every_text_and_can_be_off() -> None:
    mail = "me@example.org"
    prompt_records = [PromptRecord("p", mail, 1, {}), PromptRecord(mail, None, 2, {})]
    assert filter_personal_data(prompt_records) == prompt_records[:1]
    assert filter_personal_data(prompt_records, enabled=False) == prompt_records
    assert filter_personal_data([Document(mail, None, 1, {})]) == []
    assert filter_personal_data([Demonstration("p", mail, None, 1, {})]) == []
    good = Comparison("p", ("a", "b"), (1, 2), None, None, 1, {})
    bad = Comparison("p", ("a", f"b {mail}"), (1, 2), None, None, 2, {})
    assert filter_personal_data([good, bad]) == [good]


def test_long_texts_take_linear_time() -> None:
    for piece in ("a.", "1 ", "+1 ", "1.", "a:", "x@", "@a-"):
        assert find_personal_data(piece * 100_000) in (None, "phone", "card")


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    rows = [{"prompt": "q\n\u2028ü🎉", "completions": ["a", "b"], "ranks": [1, 1], "user": "u"}]
    path = write(tmp_path, *(json.dumps(row, ensure_ascii=False) for row in rows))
    (record,) = read_comparisons(path)
    assert (record.prompt, record.ranks) == (rows[0]["prompt"], (1, 1))
