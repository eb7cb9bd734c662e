"""Bad input through the command line: exit code 2, one line that names it, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from trainer_fixtures import CONTEXT, FAST, read_lines, tiny_model, write_lines

from fastrlhf import cli

Refused = Callable[..., str]
TINY_RUN = ["--precision", "fp32", "--no-tensorboard", "--max-response", "9"]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: its time and its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must end with code 2; returns its one line of error."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


def sft_flags(base: Path, data: Path, demonstrations: Path, out: Path) -> list[str | Path]:
    return [
        "sft", "--model", base, "--data", data, "--demonstrations", demonstrations, "--out", out,
        *TINY_RUN,
    ]  # fmt: skip


def rm_flags(start: Path, data: Path, comparisons: Path, out: Path) -> list[str | Path]:
    return [
        "rm", "--model", start, "--data", data, "--comparisons", comparisons, "--out", out,
        *TINY_RUN,
    ]  # fmt: skip


GOOD = json.dumps({"prompt": "anna likes", "completion": "anna"})
DEMONSTRATIONS = {
    "broken JSON": ('{"prompt": "anna"', ":2: not valid JSON: "),
    "no object": ("[1, 2]", ":2: wanted a JSON object, got a list"),
    "missing field": ('{"prompt": "anna"}', ":2: field 'completion': missing; the record's "),
    "wrong type": ('{"prompt": 7, "completion": "anna"}', ":2: field 'prompt': wanted a string"),
    "empty prompt": ('{"prompt": " ", "completion": "anna"}', ":2: field 'prompt': the string is"),
    "long prompt": (
        json.dumps({"prompt": "anna " * 60, "completion": "anna"}),
        f":2: field 'prompt': 61 tokens, over the limit of {CONTEXT - 9}",
    ),
}


@pytest.mark.parametrize("case", DEMONSTRATIONS)
def test_bad_demonstrations(
    case: str, base: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    line, wanted = DEMONSTRATIONS[case]
    file = tmp_path / "demos.jsonl"
    file.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    message = refused(*sft_flags(base, data, file, tmp_path / "run"))
    assert message.startswith(f"{file}{wanted}")


COMPARISONS: dict[str, tuple[Mapping[str, Any], str]] = {
    "one completion": ({"completions": ["anna"], "ranks": [1]}, "field 'completions': 1 given; "),
    "too few ranks": ({"ranks": [1]}, "field 'ranks': 1 ranks for 2 completions"),
    "ranks that are no integers": ({"ranks": [1, "b"]}, "field 'ranks': item 1: wanted an integer"),
    "no ranks": ({"ranks": None}, "field 'ranks': wanted a list of integers, got null"),
    "long prompt": ({"prompt": "anna " * 60}, "field 'prompt': 61 tokens, over the limit of 39"),
}


@pytest.mark.parametrize("case", COMPARISONS)
def test_bad_comparisons(
    case: str, start: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    changes, wanted = COMPARISONS[case]
    good = {"prompt": "anna likes", "completions": ["anna", "anna anna"], "ranks": [1, 2]}
    file = write_lines(tmp_path / "ranked.jsonl", [good, good, good | dict(changes)])
    message = refused(*rm_flags(start, data, file, tmp_path / "run"))
    assert message.startswith(f"{file}:3: {wanted}")


def test_files_that_are_empty_missing_or_not_text(
    base: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    empty, latin = tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
    empty.write_text("\n\n")
    latin.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "anna"}\n')
    for file, wanted in (
        (empty, f"{empty}: the file is empty"),
        (latin, f"{latin}:2: not UTF-8: byte 0xe9 at column 16"),
        (tmp_path / "nowhere.jsonl", f"{tmp_path}/nowhere.jsonl: cannot read it: No such file"),
        (tmp_path, f"{tmp_path}: cannot read it: Is a directory"),
    ):
        assert refused(*sft_flags(base, data, file, tmp_path / "run")).startswith(wanted)


def test_long_prompts_of_ppo_generate_and_eval(
    start: Path, judge: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    file = write_lines(tmp_path / "p.jsonl", [{"prompt": "anna"}, {"prompt": "anna " * 60}])
    wanted = f"{file}:2: field 'prompt': 61 tokens, over the limit of 39"
    models: list[str | Path] = ["--model", start, "--reward-model", judge]
    shared: list[str | Path] = ["--prompts", file, "--max-response", "9"]
    run: list[str | Path] = ["--ptx-coef", "0", "--precision", "fp32", "--no-tensorboard"]
    assert refused("ppo", *models, *shared, *run, "--out", tmp_path / "run") == wanted
    assert refused("eval", *models, *shared, "--out", tmp_path / "eval") == wanted
    out = tmp_path / "answers.jsonl"
    assert refused("generate", "--model", start, *shared, "--out", out) == wanted
    assert not out.exists()


def test_checkpoints_of_the_wrong_kind(
    start: Path, judge: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    demos = data / "demonstrations.jsonl"
    message = refused(*sft_flags(judge, data, demos, tmp_path / "a"))
    found = "LlamaForTokenClassification"
    assert message == (
        f"{judge}/config.json: field 'architectures': wanted a causal language model, found {found}"
    )
    flags: list[str | Path] = ["--prompts", data / "prompts_ppo.jsonl", "--ptx-coef", "0"]
    message = refused(
        "ppo", "--model", start, "--reward-model", start, *flags, *TINY_RUN, "--out", tmp_path / "b"
    )
    assert message.startswith(f"{start}/config.json: field 'architectures': wanted a reward model")
    message = refused(*sft_flags(data, data, demos, tmp_path / "c"))
    assert message == f"{data}: no checkpoint here (config.json is missing)"


def test_a_checkpoint_that_is_cut_short(data: Path, tmp_path: Path, refused: Refused) -> None:
    model, tokenizer = tiny_model()
    model.save(tmp_path / "m", tokenizer)
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(
        *sft_flags(tmp_path / "m", data, data / "demonstrations.jsonl", tmp_path / "r")
    )
    assert message.startswith(f"{tmp_path}/m: cannot be loaded: ")


CONFIGS = {
    "unknown key": ("[sft]\nepochs = 2\nepoks = 3\n", ":3: field 'epoks': unknown key (did you"),
    "unknown table": ("[sff]\nepochs = 2\n", ":1: unknown table [sff] (did you mean 'sft'?)"),
    "wrong type": ('[sft]\nepochs = "two"\n', ":2: field 'epochs': wanted int, got str 'two'"),
    "out of range": ("[sft]\nepochs = 0\n", ":2: field 'epochs': must be positive, got 0"),
    "nested": ("[sft]\n[sft.optim]\nlr = -1.0\n", ":3: field 'lr': must be positive"),
    "no choice": ('[sft]\nselect = "best"\n', ":2: field 'select': 'best' is not a choice"),
    "broken TOML": ("[sft]\nepochs = \n", ":2: not valid TOML: "),
    "no table": ("[rm]\nepochs = 1\n", ": no table [sft]; the file has [rm]"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs(case: str, base: Path, data: Path, tmp_path: Path, refused: Refused) -> None:
    text, wanted = CONFIGS[case]
    file = tmp_path / "run.toml"
    file.write_text(text)
    flags = sft_flags(base, data, data / "demonstrations.jsonl", tmp_path / "run")
    message = refused("sft", "--config", file, *flags[1:])
    assert message.startswith(f"{file}{wanted}")
    assert not (tmp_path / "run").exists()


def test_output_folders_that_cannot_be_written(
    base: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "taken").write_text("a file")
    demos = data / "demonstrations.jsonl"
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        message = refused(*sft_flags(base, data, demos, out))
        assert message == f"{tmp_path}/taken: a file is in the way of the output folder"
    assert (tmp_path / "taken").read_text() == "a file"
    if Path("/proc").is_dir():  # not even root can make a folder there
        message = refused(*sft_flags(base, data, demos, Path("/proc/fastrlhf")))
        assert message.startswith("/proc/fastrlhf: cannot write to the output folder")


def test_an_earlier_run_loses_nothing(
    base: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "run"
    good = sft_flags(base, data, data / "demonstrations.jsonl", out)
    assert cli.main([*map(str, good), "--epochs", "1", "--batch-size", "16"]) == 0
    # As an interrupted run leaves it: checkpoints, and no model yet.
    for file in (out / "model").iterdir():
        file.unlink()
    (out / "model").rmdir()
    before = snapshot(out)
    assert "metrics.jsonl" in before
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    assert "holds a run already; add --resume" in refused(*good)
    assert "bad.jsonl:1: " in refused(*sft_flags(base, data, bad, out), "--resume")
    assert "no checkpoint here" in refused(
        *sft_flags(tmp_path / "nowhere", data, data / "demonstrations.jsonl", out), "--resume"
    )
    assert "must be positive" in refused(*good, "--resume", "--epochs", "0")
    assert snapshot(out) == before
    assert cli.main([*map(str, good), "--epochs", "1", "--batch-size", "16", "--resume"]) == 0
    assert (out / "model" / "model.safetensors").is_file()


def test_generate_keeps_an_older_file_when_it_fails(
    start: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("older answers\n")
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "anna"}])
    flags = ["--max-response", "9"]
    message = refused("generate", "--model", start, "--prompts", bad, "--out", out, *flags)
    assert message.startswith(f"{bad}:1: field 'prompt': missing")
    assert out.read_text() == "older answers\n"


def test_a_process_of_its_own_ends_with_code_2_and_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    done = subprocess.run(
        [
            sys.executable, "-m", "fastrlhf", "pretrain", "--tokenizer", str(data / "tokenizer"),
            "--documents", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "run"),
            "--precision", FAST["precision"],
        ],
        capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path}/bad.jsonl:1: field 'text': wanted a string, got an integer\n"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert read_lines(tmp_path / "bad.jsonl") == [{"text": 3}]
