"""The stages of one config in order, each fed with what the one before it made.

    fastrlhf pipeline --config configs/qa_feedback.toml --data DIR --out runs/qa

Runs those of [pretrain] [sft] [rm] [ppo] [eval] that the file has, each in a folder of its own
under ``out``: base, sft, start (PPO's start: a short SFT with some pretraining text), rm, ppo,
eval. A stage takes its model from the stage before it unless its table names one. Interrupted, the
same command with --resume goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fastrlhf import evaluate, ppo, pretrain, reward, sft
from fastrlhf.config import load, require, sections
from fastrlhf.errors import UserError
from fastrlhf.runlog import writable_dir

C = TypeVar("C")


@dataclass(slots=True, kw_only=True)
class PipelineConfig:
    """Settings that go for all stages; each stage's own stand in its table of the config."""

    config: Path = field(default=Path("-"))
    """TOML file with the stages' tables."""
    out: Path
    """Folder that the stages' folders are made in."""
    data: Path | None = None
    """Folder that relative data files are looked up in, in all stages."""
    seed: int | None = None
    """Seed of all stages; by default that of each table."""
    resume: bool = False
    """Go on where an interrupted run was."""
    start_epochs: int = 2
    """Epochs of the SFT that PPO starts from; 0: PPO starts from the SFT model itself."""
    start_mix: float = 0.1
    """Share of pretraining text in that SFT."""

    def __post_init__(self) -> None:
        require(str(self.config) != "-", "config", "a pipeline needs --config FILE")
        require(self.start_epochs >= 0, "start_epochs", "must not be negative")
        require(0 <= self.start_mix < 1, "start_mix", "must lie in [0, 1)")


def run(config: PipelineConfig) -> Path:
    """Run the stages; returns the folder of the last one."""
    writable_dir(config.out)
    tables = set(sections(config.config))
    if not tables & {"pretrain", "sft", "rm", "ppo", "eval"}:
        raise UserError(f"{config.config}: no stage's table, such as [sft]")
    models: dict[str, Path] = {}

    def stage(cls: type[C], table: str, folder: str, **made: Path | None) -> C:
        """A stage's config: models made before it, under its table, under what goes for all."""
        shared: dict[str, Any] = {"out": config.out / folder}
        if config.data is not None:
            shared["data"] = config.data
        if config.seed is not None:
            shared["seed"] = config.seed
        if cls is not evaluate.EvalConfig:
            shared["resume"] = config.resume
        defaults = {name: path for name, path in made.items() if path is not None}
        return load(cls, table, config.config, defaults=defaults, **shared)

    last = config.out
    if "pretrain" in tables:
        models["base"] = last = pretrain.run(stage(pretrain.PretrainConfig, "pretrain", "base"))
    if "sft" in tables:
        made = stage(sft.SFTConfig, "sft", "sft", model=models.get("base"))
        models["sft"] = models["start"] = last = sft.run(made)
        if "ppo" in tables and config.start_epochs > 0:
            start = replace(
                made,
                out=config.out / "start",
                epochs=config.start_epochs,
                pretrain_mix=config.start_mix if made.pretrain_documents else 0.0,
                select="last",
                reward_model=None,
            )
            models["start"] = sft.run(start)
    if "rm" in tables:
        models["rm"] = last = reward.run(
            stage(reward.RewardConfig, "rm", "rm", model=models.get("sft"))
        )
    if "ppo" in tables:
        models["ppo"] = last = ppo.run(
            stage(
                ppo.PPOConfig,
                "ppo",
                "ppo",
                model=models.get("start"),
                reward_model=models.get("rm"),
            )
        )
    if "eval" in tables:
        last = evaluate.run(
            stage(
                evaluate.EvalConfig,
                "eval",
                "eval",
                model=models.get("ppo"),
                baseline=models.get("sft"),
                reward_model=models.get("rm"),
            )
        ).parent
    return last
