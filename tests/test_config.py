"""Configs from TOML and the command line: precedence, errors, and the round trip."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.config import (
    from_mapping,
    load,
    parse,
    require,
    resolve,
    save,
    sections,
    to_toml,
)
from fastrlhf.errors import NonFiniteLoss, UserError


class Schedule(Enum):
    COSINE = "cosine"
    CONSTANT = "constant"


@dataclass(slots=True)
class Model:
    layers: int = 2
    """Number of layers."""
    tied: bool = True

    def __post_init__(self) -> None:
        require(self.layers > 0, "layers", f"must be positive, got {self.layers}")


@dataclass(slots=True)
class Config:
    out: Path
    """The run's folder."""
    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    names: list[str] = field(default_factory=list)
    clip: float | None = 0.2
    data: Path | None = None
    precision: Literal["bf16", "fp32"] = "fp32"
    schedule: Schedule = Schedule.COSINE
    shares: dict[str, float] = field(default_factory=dict)
    steps: int = 10
    wandb: bool = False
    model: Model = field(default_factory=Model)
    """The model."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", f"must be positive, got {self.lr}")


@dataclass(slots=True)
class Pipeline:
    config: Path | None = None
    """The stages."""
    out: Path = Path("runs")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def parse_file(path: Path, *flags: str) -> Config:
    return parse(Config, "sft", ["--config", str(path), *flags], "A test.")


def test_command_line_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[sft]\nout = "file"\nlr = 2\nsteps = 7\nnames = ["a", "b"]\nclip = "None"\n'
        'schedule = "CONSTANT"\n[sft.model]\nlayers = 4\n[ppo]\nanything = 1\n',
    )
    config = parse_file(path, "--lr", "0.5", "--model.layers", "5", "--wandb")
    assert config == Config(
        out=Path("file"),
        lr=0.5,
        steps=7,
        names=["a", "b"],
        clip=None,
        schedule=Schedule.CONSTANT,
        wandb=True,
        model=Model(layers=5),
    )
    assert isinstance(parse_file(path).lr, float)
    equals = parse(Config, "sft", [f"--config={path}"], "A test.")
    assert equals == replace(config, lr=2.0, wandb=False, model=Model(layers=4))
    assert parse(Config, "sft", ["--out", "x"], "A test.") == Config(out=Path("x"))


def test_a_value_out_of_range_in_the_file_may_be_mended_by_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path, '[sft]\nout = "x"\nlr = -1\n')
    assert parse_file(path, "--lr", "1").lr == 1.0


BAD_FILES = {
    "unknown key": (
        '[sft]\nout = "x"\nlearning = 1\nlrr = 2\n',
        "{path}:3: field 'learning': unknown key; valid keys: out, lr, betas, names, clip, data, "
        "precision, schedule, shares, steps, wandb, model",
    ),
    "misspelt key": (
        '[sft]\nout = "x"\n\nstep = 2\n',
        "{path}:4: field 'step': unknown key (did you mean 'steps'?); valid keys: out, ",
    ),
    "misspelt nested key": (
        '[sft]\nout = "x"\n[sft.model]\nlayer = 2\n',
        "{path}:4: field 'model.layer': unknown key (did you mean 'layers'?); "
        "valid keys: layers, tied",
    ),
    "misspelt key, inline table": (
        "[sft]\nmodel = { layer = 2 }\n",
        "{path}:2: field 'model.layer': unknown key (did you mean 'layers'?)",
    ),
    "misspelt dotted key": (
        "[sft]\nmodel.layer = 2\n",
        "{path}:2: field 'model.layer': unknown key (did you mean 'layers'?)",
    ),
    "unknown table": (
        '[sft]\nout = "x"\n[pretrian]\n',
        "{path}:3: unknown table [pretrian] (did you mean 'pretrain'?); valid: [pretrain], [sft], ",
    ),
    "no table": ("[ppo]\n", "{path}: no table [sft]; the file has [ppo]"),
    "stray key": ('out = "x"\n[sft]\n', "{path}:1: key 'out' stands outside the tables; "),
    "string for float": ('[sft]\nlr = "x"\n', "{path}:2: field 'lr': wanted float, got str 'x'"),
    "float for int": ("[sft]\nsteps = 1.0\n", "{path}:2: field 'steps': wanted int, got float 1.0"),
    "bool for int": ("[sft]\nsteps = true\n", "{path}:2: field 'steps': wanted int, got bool True"),
    "int for bool": ("[sft]\nwandb = 1\n", "{path}:2: field 'wandb': wanted bool, got int 1"),
    "int for path": ("[sft]\ndata = 1\n", "{path}:2: field 'data': wanted Path, got int 1"),
    "wrong item": (
        '[sft]\nnames = ["a", 1]\n',
        "{path}:2: field 'names': wanted str, got int 1",
    ),
    "too few": ("[sft]\nbetas = [0.9]\n", "{path}:2: field 'betas': wanted 2 values, got 1"),
    "scalar for list": (
        '[sft]\nnames = "a"\n',
        "{path}:2: field 'names': wanted list[str], got str 'a'",
    ),
    "scalar for table": (
        "[sft]\nmodel = 3\n",
        "{path}:2: field 'model': wanted a table of Model, got int 3",
    ),
    "no choice": (
        '[sft]\nprecision = "fp16"\n',
        "{path}:2: field 'precision': 'fp16' is not a choice (did you mean 'bf16'?); "
        "valid: 'bf16', 'fp32'",
    ),
    "no member": (
        '[sft]\nschedule = "LINEAR"\n',
        "{path}:2: field 'schedule': 'LINEAR' is not a choice; valid: COSINE, CONSTANT",
    ),
    "out of range": (
        '[sft]\nout = "x"\nlr = -1.0\n',
        "{path}:3: field 'lr': must be positive, got -1.0",
    ),
    "out of range, nested": (
        '[sft]\nout = "x"\n[sft.model]\ntied = true\nlayers = 0\n',
        "{path}:5: field 'layers': must be positive, got 0",
    ),
    "broken TOML": ('[sft]\nout = "x"\nlr 3\n', "{path}:3: not valid TOML: "),
    "TOML broken at the end": ("[sft]\nout = [1,\n", "{path}:2: not valid TOML: "),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    text, wanted = BAD_FILES[case]
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        parse_file(path)
    assert str(caught.value).startswith(wanted.format(path=path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_long_line_takes_no_time_to_search(tmp_path: Path) -> None:
    path = write(tmp_path, f'[sft]\nout = """\n{"a" * 100_000}\n"""\nlr = -1\n')
    with pytest.raises(UserError, match=r":5: field 'lr': must be positive, got -1\.0"):
        parse_file(path)


def test_unreadable_config(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(UserError, match=f"^{missing}: cannot read the config: No such file"):
        parse_file(missing)
    (tmp_path / "latin.toml").write_bytes(b'[sft]\nout = "\xe9"\n')
    with pytest.raises(UserError, match=r"latin\.toml: the config is not UTF-8 text"):
        parse_file(tmp_path / "latin.toml")
    with pytest.raises(UserError, match="--config: a TOML file is wanted after it"):
        parse(Config, "sft", ["--out", "x", "--config"], "A test.")
    with pytest.raises(UserError, match="--config: given twice"):
        parse(Config, "sft", ["--config", "a", "--config=b"], "A test.")


def test_a_flag_out_of_range_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[sft]\nout = "x"\nlr = 1.0\n')
    with pytest.raises(UserError) as caught:
        parse_file(path, "--lr", "-2")
    assert str(caught.value) == "field 'lr': must be positive, got -2.0"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "x", "--lrr", "1"], "--lrr"),
        (["--out", "x", "--lr", "x"], "--lr"),
        (["--out", "x", "--precision", "fp16"], "--precision"),
        ([], "--out"),
    ],
)
def test_a_bad_flag_or_a_missing_one_exits_with_2(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Config, "sft", flags, "A test.")
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_help_shows_documented_fields_and_the_defaults_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "[sft]\nlr = 0.125\n")
    with pytest.raises(SystemExit) as caught:
        parse_file(path, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Learning rate. (default: 0.125)" in text
    assert "--config FILE takes defaults" in text


def test_a_config_with_a_config_field_takes_the_path(tmp_path: Path) -> None:
    path = write(tmp_path, '[pretrain]\nsteps = 1\n[sft]\nout = "x"\n')
    config = parse(Pipeline, "pipeline", ["--config", str(path), "--out", "y"], "A test.")
    assert config == Pipeline(config=path, out=Path("y"))
    assert sections(path) == ["pretrain", "sft"]
    assert load(Config, "sft", path, out=Path("z"), steps=3) == Config(out=Path("z"), steps=3)


def test_from_mapping() -> None:
    config = from_mapping(Config, {"out": "x", "model": {"layers": 3}}, "demo")
    assert config == Config(out=Path("x"), model=Model(layers=3))
    assert from_mapping(Config, {"out": Path("x"), "model": Model(3)}, "demo") == config
    for mapping, message in (
        ({}, "demo: field 'out': missing; it has no default"),
        ({"out": "x", "lr": 0}, "demo: field 'lr': must be positive, got 0.0"),
        ({"out": "x", "model": {"layers": 0}}, "demo: field 'model.layers': must be positive, "),
        ({"out": "x", "shares": {"a": "b"}}, "demo: field 'shares.a': wanted float, got str 'b'"),
    ):
        with pytest.raises(UserError) as caught:
            from_mapping(Config, mapping, "demo")
        assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match="cls: a dataclass is wanted"):
        from_mapping(int, {}, "demo")


texts = st.text(st.characters(codec="utf-8"), max_size=12)
paths = st.builds(Path, texts.filter(lambda text: text not in ("None",)))
configs = st.builds(
    Config,
    out=paths,
    lr=st.floats(min_value=0, exclude_min=True, allow_nan=False),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    names=st.lists(texts, max_size=3),
    clip=st.none() | st.floats(allow_nan=False),
    data=st.none() | paths,
    precision=st.sampled_from(["bf16", "fp32"]),
    schedule=st.sampled_from(Schedule),
    shares=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    steps=st.integers(-(2**63), 2**63 - 1),
    wandb=st.booleans(),
    model=st.builds(Model, layers=st.integers(1, 2**40), tied=st.booleans()),
)


@settings(max_examples=50, deadline=None)
@given(config=configs)
def test_a_saved_config_loads_to_an_equal_one(
    config: Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    save(config, path, "sft")
    assert load(Config, "sft", path) == config


def test_a_saved_config_parses_and_keeps_nan(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config = Config(out=tmp_path, clip=math.nan, lr=1e-5, model=Model(tied=False))
    save(config, path, "sft")
    parsed = parse_file(path)
    assert parsed.clip is not None
    assert math.isnan(parsed.clip)
    assert replace(parsed, clip=None) == replace(config, clip=None)


def test_to_toml_finds_the_table_by_the_class_or_says_so() -> None:
    @dataclass(slots=True)
    class SFTConfig:
        steps: int = 3

    assert to_toml(SFTConfig()) == "[sft]\nsteps = 3\n"
    with pytest.raises(ValueError, match="section: Config belongs to no command"):
        to_toml(Config(out=Path("x")))


@pytest.mark.parametrize(
    ("data", "relative", "wanted"),
    [
        (Path("d"), "a/b.jsonl", Path("d/a/b.jsonl")),
        (Path("d"), Path("/a.jsonl"), Path("/a.jsonl")),
        (None, "a.jsonl", Path("a.jsonl")),
        (Path("~/d"), "a", Path(os.path.expanduser("~/d/a"))),
    ],
)
def test_resolve(data: Path | None, relative: Any, wanted: Path) -> None:
    assert resolve(data, relative) == wanted


def test_error_messages() -> None:
    assert str(UserError.at("a", 3, "x", "bad")) == "a:3: field 'x': bad"
    assert str(UserError.at("a", None, None, "bad")) == "a: bad"
    assert str(NonFiniteLoss.at("ppo", 7, "runs/ppo/checkpoint-5")) == (
        "ppo: the loss is not finite at step 7; the last good checkpoint is runs/ppo/checkpoint-5"
    )
    assert str(NonFiniteLoss.at("sft", 1, None, "gradient norm")) == (
        "sft: the gradient norm is not finite at step 1; no checkpoint was written before it"
    )
