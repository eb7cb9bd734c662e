"""The stages in order by one config, and the configs that ship."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from trainer_fixtures import assert_same_bits, read_lines

from fastrlhf import cli
from fastrlhf.config import load, sections
from fastrlhf.encoding import Recipe
from fastrlhf.evaluate import EvalConfig
from fastrlhf.pipeline import PipelineConfig
from fastrlhf.pipeline import run as run_pipeline
from fastrlhf.ppo import PPOConfig
from fastrlhf.pretrain import PretrainConfig
from fastrlhf.reward import RewardConfig
from fastrlhf.sft import SFTConfig

CONFIGS = Path(__file__).parent.parent / "configs"
TABLES = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "rm": RewardConfig,
    "ppo": PPOConfig,
    "eval": EvalConfig,
    "pipeline": PipelineConfig,
}
FAST = 'precision = "fp32"\ntensorboard = false\n'
TINY = f"""
[pretrain]
{FAST}
tokenizer = "tokenizer"
documents = "pretrain.jsonl"
steps = 4
batch_size = 16
model = {{ width = 16, layers = 1, heads = 2, mlp = 32, context = 48 }}
[sft]
{FAST}
pretrain_documents = "pretrain.jsonl"
epochs = 2
batch_size = 16
max_response = 9
recipe = {{ heldout = 0.3 }}
[rm]
{FAST}
batch_size = 8
max_response = 9
recipe = {{ heldout = 0.3 }}
[ppo]
{FAST}
prompts = "prompts_ppo.jsonl"
pretrain_documents = "pretrain.jsonl"
ptx_ratio = 1.0
iterations = 2
batch_size = 8
minibatch_size = 4
max_response = 9
recipe = {{ heldout = 0.3 }}
[eval]
prompts = "prompts_ppo.jsonl"
comparisons = "comparisons.jsonl"
max_response = 9
recipe = {{ heldout = 0.3 }}
"""


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole pipeline by the command line."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tiny.toml").write_text(TINY)
    arguments = ["--config", str(folder / "tiny.toml"), "--data", str(data)]
    assert cli.main(["pipeline", *arguments, "--out", str(folder / "run"), "--seed", "3"]) == 0
    return folder / "run"


def test_the_stages_are_fed_by_each_other(finished: Path, data: Path) -> None:
    def saved(folder: str, cls: type, table: str) -> Any:
        return load(cls, table, finished / folder / "config.toml")

    assert sorted(p.name for p in finished.iterdir()) == [
        "base", "eval", "ppo", "rm", "sft", "start",
    ]  # fmt: skip
    sft, start = saved("sft", SFTConfig, "sft"), saved("start", SFTConfig, "sft")
    assert sft.model == start.model == finished / "base" / "model"
    assert (sft.epochs, sft.pretrain_mix) == (2, 0.0)
    assert (start.epochs, start.pretrain_mix) == (2, 0.1)
    assert saved("rm", RewardConfig, "rm").model == finished / "sft" / "model"
    ppo = saved("ppo", PPOConfig, "ppo")
    assert ppo.model == finished / "start" / "model"
    assert ppo.reward_model == finished / "rm" / "model"
    assert {sft.seed, start.seed, ppo.seed} == {3}
    assert {sft.data, ppo.data} == {data}
    found = json.loads((finished / "eval" / "eval.json").read_text())
    assert set(found) == {
        "reward model accuracy on pairs",
        "model: reward score",
        "baseline: reward score",
        "win rate against the baseline",
    }
    logged = read_lines(finished / "rm" / "metrics.jsonl")[-1]
    assert found["reward model accuracy on pairs"]["mean"] == pytest.approx(
        logged["heldout_accuracy"]
    )


def test_an_interrupted_pipeline_goes_on_where_it_was(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    out = tmp_path / "run"
    arguments = ["pipeline", "--config", str(tmp_path / "tiny.toml"), "--data", str(data)]
    arguments += ["--out", str(out), "--seed", "3"]
    # The reward model's file is missing at first, so that the pipeline ends after two stages.
    (tmp_path / "broken.toml").write_text(
        TINY.replace("[rm]\n", '[rm]\ncomparisons = "nowhere.jsonl"\n')
    )
    broken = [a.replace("tiny.toml", "broken.toml") for a in arguments]
    assert cli.main(broken) == 2
    before = {p: p.stat().st_mtime_ns for p in (out / "sft").rglob("*")}
    assert before
    assert not (out / "rm" / "model").exists()
    assert cli.main(arguments) == 2  # without --resume it touches nothing
    assert cli.main([*arguments, "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "sft").rglob("*")} == before
    for stage in ("base", "sft", "start", "rm", "ppo"):
        assert_same_bits(out / stage / "model", finished / stage / "model")
    assert (out / "eval" / "eval.json").read_text() == (finished / "eval" / "eval.json").read_text()


def test_a_pipeline_without_stages_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.toml").write_text("[generate]\nsamples = 2\n")
    arguments = ["--config", str(tmp_path / "empty.toml"), "--out", str(tmp_path / "run")]
    assert cli.main(["pipeline", *arguments]) == 2
    assert "empty.toml: no stage's table, such as [sft]" in capsys.readouterr().err
    assert cli.main(["pipeline", "--out", str(tmp_path / "run")]) == 2
    assert "a pipeline needs --config FILE" in capsys.readouterr().err


def test_ppo_starts_from_sft_where_no_start_is_wanted(data: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.split("[eval]")[0])
    last = run_pipeline(
        PipelineConfig(
            config=tmp_path / "tiny.toml", out=tmp_path / "run", data=data, start_epochs=0
        )
    )
    assert last == tmp_path / "run" / "ppo" / "model"
    saved = load(PPOConfig, "ppo", tmp_path / "run" / "ppo" / "config.toml")
    assert saved.model == tmp_path / "run" / "sft" / "model"
    assert not (tmp_path / "run" / "start").exists()


# --- the configs that ship

NEEDED: dict[str, dict[str, Any]] = {
    "rm": {"model": Path("m")},
    "ppo": {"model": Path("m"), "reward_model": Path("r")},
    "eval": {"model": Path("m"), "reward_model": Path("r"), "baseline": Path("b")},
    "sft": {"model": Path("m")},
}


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.toml")))
def test_every_config_loads_and_holds_out_the_same_prompts(name: str) -> None:
    recipes = []
    for table in sections(CONFIGS / name):
        made: Any = load(
            TABLES[table], table, CONFIGS / name, defaults=NEEDED.get(table), out=Path("o"),
            **({"config": CONFIGS / name} if table == "pipeline" else {}),
        )  # fmt: skip
        if hasattr(made, "recipe"):
            recipes.append(made.recipe)
            assert made.recipe.heldout > 0
    assert len(recipes) == 4
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize("table", ["sft", "rm", "ppo"])
def test_the_defaults_are_the_papers(table: str) -> None:
    """Every setting of the paper's config is the stage's default, but for files and choices."""
    path = CONFIGS / "paper-1.3b.toml"
    needed = NEEDED[table] | {"out": Path("o")}
    if table == "ppo":
        needed["pretrain_documents"] = Path("pretrain.jsonl")
    paper = load(TABLES[table], table, path, defaults=needed, out=Path("o"))
    default = TABLES[table](**needed)
    # What cannot be a default: files of the user's own, and a choice that needs one of them.
    exceptions = {"sft": {"model", "pretrain_documents", "select", "reward_model"}}
    for field in dataclasses.fields(default):  # type: ignore[arg-type]
        if field.name not in exceptions.get(table, set()) | {"recipe"}:
            assert getattr(paper, field.name) == getattr(default, field.name), field.name


def test_the_papers_config_states_the_papers_numbers() -> None:
    path = CONFIGS / "paper-1.3b.toml"
    sft = load(SFTConfig, "sft", path, out=Path("o"))
    assert (sft.epochs, sft.batch_size, sft.residual_dropout, sft.select) == (16, 32, 0.2, "reward")
    assert (sft.optim.lr, sft.optim.final_fraction, sft.optim.warmup_steps) == (9.65e-6, 0.1, 0)
    rm = load(RewardConfig, "rm", path, defaults=NEEDED["rm"], out=Path("o"))
    assert (rm.epochs, rm.batch_size, rm.pairing, rm.optim.lr) == (1, 64, "kwise", 9e-6)
    ppo = load(PPOConfig, "ppo", path, defaults=NEEDED["ppo"], out=Path("o"))
    assert 256_000 <= ppo.iterations * ppo.batch_size <= 256 * 1024
    assert (ppo.batch_size, ppo.minibatch_size, ppo.inner_epochs) == (512, 64, 1)
    assert (ppo.beta, ppo.ptx_coef, ppo.ptx_ratio, ppo.ema, ppo.clip) == (
        0.02, 27.8, 8.0, 0.992, 0.2,
    )  # fmt: skip
    assert (ppo.temperature, ppo.discount, ppo.gae_lambda) == (1.0, 1.0, 0.95)
    assert 2.55e-6 <= ppo.optim.lr <= 2.55e-5
    assert (ppo.value_optim.lr, ppo.value_optim.schedule) == (9e-6, "constant")
    assert (ppo.optim.warmup_steps, ppo.optim.warmup_from) == (10, 0.1)
    for made in (sft, rm, ppo):
        assert made.max_response == 1024
        assert made.recipe == Recipe(
            prefix_tokens=256, per_user=200, drop_personal_data=True, heldout=0.1,
            max_prompt=1024, drop_long=True,
        )  # fmt: skip
        for optim in (made.optim, getattr(made, "value_optim", made.optim)):
            assert optim.betas == (0.9, 0.95)
