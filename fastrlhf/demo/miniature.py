"""One seed of InstructGPT in miniature: from a blank model to PPO-ptx and its examination.

The world of ``fastrlhf.world`` gives the data, the stages of this package do the training, exactly
as they would on real data: each reads files and writes a run folder. ``run_seed`` goes through the
phases in order and leaves ``results.json`` and ``arrays.npz`` in the seed's folder. A killed one
goes on where it was: phases that are done are skipped, the one that was cut resumes.

The settings below were chosen on development seeds 1000 to 1005, and frozen before a seed from
``FIRST_SEED`` on was run. Seeds below it are spent: seeds 0 and 1 were examined under earlier
settings, seeds 0 to 4 served the choice of the labelers' noise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastrlhf import ppo, pretrain, reward, sft, world
from fastrlhf.demo.writers import MAX_RESPONSE, collect_comparisons
from fastrlhf.models import ModelShape
from fastrlhf.ppo import PPOConfig
from fastrlhf.training import OptimizerConfig

FIRST_SEED = 10  # the first that nothing was chosen on
CONTEXT = 48  # tokens: the longest quiz document of the world is shorter
BASE = ModelShape(width=64, layers=3, heads=4, mlp=176, context=CONTEXT, rope_theta=100.0)
SMALL = ModelShape(width=32, layers=3, heads=4, mlp=88, context=CONTEXT, rope_theta=100.0)
LARGE = ModelShape(width=128, layers=4, heads=8, mlp=344, context=CONTEXT, rope_theta=100.0)


@dataclass(slots=True, kw_only=True)
class Settings:
    """What the miniature fixes; the rest is the stages' defaults."""

    sizes: world.WorldSizes = field(default_factory=world.WorldSizes)
    shape: ModelShape = field(default_factory=lambda: BASE)
    pretrain_steps: int = 2500
    pretrain_lr: float = 3e-3
    sft_epochs: int = 6
    sft_lr: float = 5e-4
    start_epochs: int = 2
    rm_prompts: int = 12_000
    rm_batch: int = 32
    rm_lr: float = 1e-3
    pairing_prompts: int = 600
    ppo_iterations: int = 70
    ppo_lr: float = 3e-4
    value_lr: float = 5e-4
    beta: float = 0.1
    ptx_coef: float = 2.0
    ptx_ratio: float = 1.0
    ema: float = 0.98


# The two ablations of the long demonstration: PPO at other betas, PPO-ptx at other gammas.
BETAS = (0.0, 0.025, 0.4, 10.0)
GAMMAS = (0.5, 8.0)


@dataclass(slots=True)
class SeedRun:
    """A seed's folder, its settings, and how long each phase took."""

    out: Path
    seed: int
    full: bool
    settings: Settings = field(default_factory=Settings)

    @property
    def data(self) -> Path:
        """The world's files."""
        return self.out / "world"

    def model(self, stage: str) -> Path:
        """The checkpoint that a stage leaves."""
        return self.out / stage / "model"

    def policies(self) -> dict[str, Path]:
        """Checkpoints of the policies that are examined, by name."""
        names = ["base", "sft", "start", "ppo", "ppo-ptx"]
        names += [f"small-{name}" for name in ("base", "sft", "ppo", "ppo-ptx")]
        if self.full:
            names += ["large-base", *(name for name, _ in variants(self.settings))]
        return {name: self.model(name) for name in names}


def variants(s: Settings) -> list[tuple[str, dict[str, Any]]]:
    """The PPO runs that only the long demonstration makes: (name, changes to the config)."""
    betas: list[tuple[str, dict[str, Any]]] = [
        (f"ppo-beta-{beta:g}", {"beta": beta}) for beta in BETAS
    ]
    ptx = {"pretrain_documents": Path("pretrain.jsonl"), "ptx_ratio": s.ptx_ratio}
    gammas: list[tuple[str, dict[str, Any]]] = [
        (f"ppo-gamma-{gamma:g}", {"ptx_coef": gamma} | ptx) for gamma in GAMMAS
    ]
    return betas + gammas


def phases(run: SeedRun) -> list[tuple[str, Callable[[], Any]]]:
    """The phases of a seed, in order."""
    s = run.settings
    todo: list[tuple[str, Callable[[], Any]]] = [
        ("world", lambda: write_world(run)),
        ("pretrain", lambda: pretrain.run(pretrain_config(run, "base", s.shape))),
        ("sft", lambda: sft.run(sft_config(run, "sft", "base"))),
        ("start", lambda: sft.run(start_config(run, "start", "base"))),
        ("comparisons", lambda: comparisons(run)),
        ("reward model", lambda: reward.run(rm_config(run))),
        ("pairings", lambda: pairings(run)),
        ("ppo", lambda: ppo.run(ppo_config(run, "ppo", "start"))),
        ("ppo-ptx", lambda: ppo.run(ptx_config(run, "ppo-ptx", "start"))),
        ("small model", lambda: small_model(run)),
    ]
    if run.full:
        todo += [
            ("large base", lambda: pretrain.run(pretrain_config(run, "large-base", LARGE))),
            ("sft 16 epochs", lambda: sft.run(long_sft_config(run))),
        ]
        todo += [
            (name, lambda name=name, changes=changes: ppo.run(  # type: ignore[misc]
                ppo_config(run, name, "start", **changes)))
            for name, changes in variants(s)
        ]  # fmt: skip
    return todo


def run_seed(run: SeedRun) -> Path:
    """Go through the phases that are not done yet; returns the seed's folder."""
    from fastrlhf.demo.examine import examine  # here: it imports this module

    clock = run.out / "phases.json"
    run.out.mkdir(parents=True, exist_ok=True)
    seconds = json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else {}
    for name, work in [*phases(run), ("examination", lambda: examine(run))]:
        if name in seconds:
            continue
        # What was examined before a phase was added is to be examined again.
        seconds.pop("examination", None)
        print(f"== {name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        work()
        seconds[name] = round(time.monotonic() - started, 2)
        staging = clock.with_suffix(".partial")
        staging.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
        staging.replace(clock)
    return run.out


# --- phases -------------------------------------------------------------------------------------


def write_world(run: SeedRun) -> world.World:
    """The world's files, written once."""
    try:
        return world.read_world(run.data)
    except FileNotFoundError:
        return world.write_world(run.data, run.seed, run.settings.sizes)


def comparisons(run: SeedRun) -> None:
    """Rankings of the models' outputs by the simulated labelers."""
    collect_comparisons(
        world.read_world(run.data),
        run.seed,
        run.data,
        {name: run.model(name) for name in ("base", "sft", "start")},
        run.settings.rm_prompts,
    )


def pairings(run: SeedRun) -> None:
    """Two reward models from the same few prompts: K-wise, and with pairs shuffled (claim 4)."""
    lines = (run.data / "comparisons.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few = run.data / "comparisons_few.jsonl"
    few.write_text("".join(lines[: run.settings.pairing_prompts]), encoding="utf-8")
    for name in ("kwise", "shuffled"):
        some = {"pairing": name, "comparisons": few.relative_to(run.data), "batch_size": 16}
        reward.run(rm_config(run, f"rm-{name}", **some))


def small_model(run: SeedRun) -> None:
    """A second, smaller size through all stages, against the same reward model."""
    pretrain.run(pretrain_config(run, "small-base", SMALL))
    sft.run(sft_config(run, "small-sft", "small-base"))
    sft.run(start_config(run, "small-start", "small-base"))
    ppo.run(ppo_config(run, "small-ppo", "small-start"))
    ppo.run(ptx_config(run, "small-ppo-ptx", "small-start"))


# --- configs ------------------------------------------------------------------------------------


def common(run: SeedRun, stage: str) -> dict[str, Any]:
    """Fields that all stages of a seed share."""
    return {
        "out": run.out / stage,
        "data": run.data,
        "seed": run.seed,
        # fp32 on a CPU whatever it can do: the same seed then gives near the same everywhere.
        "precision": "fp32",
        "resume": True,
    }


def pretrain_config(run: SeedRun, name: str, shape: ModelShape) -> pretrain.PretrainConfig:
    """A base model of some size."""
    s = run.settings
    return pretrain.PretrainConfig(
        **common(run, name),
        tokenizer=Path("tokenizer"),
        documents=Path("pretrain.jsonl"),
        heldout=Path("pretrain_heldout.jsonl"),
        model=shape,
        steps=s.pretrain_steps,
        save_every=s.pretrain_steps // 4,
        optim=OptimizerConfig(lr=s.pretrain_lr, weight_decay=0.1, warmup_steps=100),
    )


def sft_config(run: SeedRun, name: str, base: str) -> sft.SFTConfig:
    """SFT, the baseline of all win rates."""
    return sft.SFTConfig(
        **common(run, name),
        model=run.model(base),
        validation=Path("demonstrations_validation.jsonl"),
        epochs=run.settings.sft_epochs,
        max_response=MAX_RESPONSE,
        residual_dropout=0.0,
        optim=OptimizerConfig(lr=run.settings.sft_lr),
    )


def start_config(run: SeedRun, name: str, base: str) -> sft.SFTConfig:
    """PPO's start: fewer epochs, a tenth of pretraining text."""
    return replace(
        sft_config(run, name, base),
        epochs=run.settings.start_epochs,
        pretrain_mix=0.1,
        pretrain_documents=Path("pretrain.jsonl"),
    )


def long_sft_config(run: SeedRun) -> sft.SFTConfig:
    """The paper's 16 epochs with residual dropout 0.2, scored by the reward model (claim 3)."""
    return replace(
        sft_config(run, "sft-16", "base"),
        epochs=16,
        residual_dropout=0.2,
        select="reward",
        reward_model=run.model("rm"),
        reward_prompts=400,
        keep_epochs=True,
    )


def rm_config(run: SeedRun, name: str = "rm", **changes: Any) -> reward.RewardConfig:
    """The reward model, from the SFT model."""
    fields: dict[str, Any] = {
        "model": run.model("sft"),
        "validation": Path("comparisons_validation.jsonl"),
        "max_response": MAX_RESPONSE,
        "batch_size": run.settings.rm_batch,
        "optim": OptimizerConfig(lr=run.settings.rm_lr),
    }
    return reward.RewardConfig(**common(run, name), **(fields | changes))


def ppo_config(run: SeedRun, name: str, start: str, **changes: Any) -> PPOConfig:
    """Plain PPO, unless ``changes`` say otherwise."""
    s = run.settings
    shared: dict[str, Any] = {
        "eps": 1e-5,
        "schedule": "constant",
        "warmup_steps": 10,
        "warmup_from": 0.1,
    }
    fields: dict[str, Any] = {
        "model": run.model(start),
        "reward_model": run.model("rm"),
        "prompts": Path("prompts_ppo.jsonl"),
        "ptx_coef": 0.0,
        "iterations": s.ppo_iterations,
        "batch_size": 256,
        "minibatch_size": 64,
        "beta": s.beta,
        "no_end_score": -3.0,
        "ema": s.ema,
        "max_response": MAX_RESPONSE,
        "samples": 256,
        "save_every": 20,
        "optim": OptimizerConfig(lr=s.ppo_lr, **shared),
        "value_optim": OptimizerConfig(lr=s.value_lr, **shared),
    }
    return PPOConfig(**common(run, name), **(fields | changes))


def ptx_config(run: SeedRun, name: str, start: str) -> PPOConfig:
    """PPO-ptx, which is what the paper calls InstructGPT."""
    s = run.settings
    return ppo_config(
        run,
        name,
        start,
        ptx_coef=s.ptx_coef,
        ptx_ratio=s.ptx_ratio,
        pretrain_documents=Path("pretrain.jsonl"),
    )
