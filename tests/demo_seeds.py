"""Folders of finished demonstration seeds, made in a moment: real files, numbers that we choose.

``make_seed`` writes what the stages and the examination of one seed leave. ``Effects`` says how far
the models lie apart, so that a test can turn a claim around.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf import world
from fastrlhf.demo.claims import Seed, load_seed
from fastrlhf.demo.miniature import BETAS, GAMMAS

SIZES = world.WorldSizes(
    pretrain=4,
    pretrain_heldout=4,
    probe=4,
    demonstrations=4,
    demonstrations_validation=4,
    prompts_rm=4,
    prompts_ppo=24,
    prompts_validation=4,
    prompts_test=4,
    users=12,
)
PROMPTS, DOCUMENTS, QUIZZES, EPISODES, ITERATIONS = 400, 300, 240, 6, 20
KINDS = ("careful", "fact", "list", "qa", "quiz", "story")
QUIZ_TASKS = ("friend", "likes", "lives", "reverse")
VARIANTS = [f"ppo-beta-{b:g}" for b in BETAS] + [f"ppo-gamma-{g:g}" for g in GAMMAS]


@dataclass(slots=True)
class Effects:
    """Means of what was measured, by model; a test changes some."""

    wins: dict[str, float] = field(
        default_factory=lambda: {
            "base": 0.10,
            "prompted": 0.25,
            "start": 0.48,
            "ppo": 0.66,
            "ppo-ptx": 0.64,
            "small-base": 0.07,
            "small-sft": 0.35,
            "small-ppo": 0.48,
            "small-ppo-ptx": 0.47,
            "large-base": 0.14,
            **{f"ppo-beta-{b:g}": w for b, w in zip(BETAS, (0.5, 0.6, 0.6, 0.49), strict=True)},
            **{f"ppo-gamma-{g:g}": w for g, w in zip(GAMMAS, (0.65, 0.6), strict=True)},
        }
    )
    loss: dict[str, float] = field(
        default_factory=lambda: {
            "base": -0.05,
            "sft": 0.04,
            "start": 0.0,
            "ppo": 0.12,
            "ppo-ptx": 0.02,
            **{f"ppo-beta-{b:g}": w for b, w in zip(BETAS, (0.5, 0.2, 0.08, 0.04), strict=True)},
            **{f"ppo-gamma-{g:g}": w for g, w in zip(GAMMAS, (0.05, -0.02), strict=True)},
        }
    )
    gold: dict[str, float] = field(default_factory=lambda: {"ppo": 2.3, "ppo-beta-0": 1.4})
    score: dict[str, float] = field(default_factory=lambda: {"ppo": 0.4, "ppo-beta-0": 1.1})
    kwise_gain: float = 0.08


def make_seed(out: Path, seed: int, *, full: bool = False, effects: Effects | None = None) -> Seed:
    """Write a finished seed's folder and read it back as the demonstration does."""
    effects = effects or Effects()
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True)
    world.write_world(out / "world", seed, SIZES)
    arrays = _arrays(rng, effects, full)
    np.savez_compressed(out / "arrays.npz", **arrays)
    stages = _stages(full)
    flop = {stage: 1e13 * (1 + index) for index, stage in enumerate(stages)}
    flop |= {"base": 1e15, "small-base": 2e14}
    for stage in stages:
        _write_stage(out, stage, seed, rng, flop[stage])
    results = {
        "seed": seed,
        "parameters": _parameters(full),
        "reward_models": {
            "agreement": 0.731,
            "agreement_pairs": 4000,
            "prompts": 200,
            "mean_k": 6.5,
            "mean_score": {"demonstrations": 1e-8, "demonstrations_validation": 0.01},
        },
        "flop": flop,
        "shown": [
            {
                "prompt": "U: likes felix <b> B:",
                "right": "ice",
                "answers": {
                    name: {"text": text, "score": score}
                    for name, text, score in (
                        ("base", "", -0.5),
                        ("sft", "well tea", 1.0),
                        ("ppo", "ice", 3.0),
                        ("ppo-ptx", "ice thanks", 3.0),
                    )
                },
            }
        ],
    }
    (out / "results.json").write_text(json.dumps(results))
    phases = {"world": 1.0, "pretrain": 120.0, "sft": 10.0, "ppo": 40.0, "examination": 12.5}
    if full:
        phases |= {"large base": 500.0, "ppo-beta-0": 41.0}
    (out / "phases.json").write_text(json.dumps(phases))
    return load_seed(out)


def _stages(full: bool) -> list[str]:
    stages = ["base", "sft", "start", "rm", "ppo", "ppo-ptx", "small-base", "small-sft"]
    return [*stages, "sft-16", *VARIANTS] if full else stages


def _parameters(full: bool) -> dict[str, int]:
    sizes = {"base": 380_000, "sft": 380_000, "start": 380_000, "ppo": 380_000, "ppo-ptx": 380_000}
    sizes |= {f"small-{name}": 110_000 for name in ("base", "sft", "ppo", "ppo-ptx")}
    return sizes | {"large-base": 2_000_000} if full else sizes


def _arrays(rng: np.random.Generator, effects: Effects, full: bool) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "has_answer": rng.random(PROMPTS) < 0.8,
        "constrained": rng.random(PROMPTS) < 0.5,
        "kind": rng.choice(KINDS, DOCUMENTS),
        "probe_task": rng.choice(QUIZ_TASKS, QUIZZES),
        "tokens": rng.integers(4, 40, DOCUMENTS).astype(np.float64),
    }
    names = [name for name in effects.wins if full or name in _parameters(False)] + ["prompted"]
    for name in dict.fromkeys([*names, "sft"]):
        if name != "sft":
            arrays[f"wins/{name}"] = rng.binomial(16, effects.wins[name], PROMPTS) / 16
        strength = effects.wins.get(name, 0.5)
        for measure, means, usual in (
            ("gold", effects.gold, 3.5 * strength),
            ("score", effects.score, strength - 0.5),
        ):
            noise = 0.3 * rng.standard_normal(PROMPTS)
            arrays[f"{measure}/{name}"] = means.get(name, usual) + noise
        for habit, rate in (
            ("task", min(1.0, strength + 0.2)),
            ("constraint", min(1.0, strength + 0.1)),
            ("invented", max(0.0, 0.7 - strength)),
            ("rude", max(0.0, 0.2 - strength / 4)),
        ):
            arrays[f"{habit}/{name}"] = rng.binomial(4, rate, PROMPTS) / 4
    usual_loss = 1.5 + 0.2 * rng.standard_normal(DOCUMENTS)
    usual_probe = 0.7 + 0.1 * rng.standard_normal(QUIZZES)
    for name, shift in effects.loss.items():
        if full or name not in VARIANTS:
            noise = 0.05 * rng.standard_normal(DOCUMENTS)
            arrays[f"loss/{name}"] = arrays["tokens"] * (usual_loss + shift + noise)
            arrays[f"probe/{name}"] = usual_probe - shift + 0.02 * rng.standard_normal(QUIZZES)
    for model, rate in (("rm", 0.68), ("rm-kwise", 0.6 + effects.kwise_gain), ("rm-shuffled", 0.6)):
        for judges, less in (("own", 0.0), ("others", 0.01), ("rule", -0.1)):
            pairs = rng.integers(5, 30, 200)
            arrays[f"pairs/{model}/{judges}"] = pairs.astype(np.float64)
            arrays[f"right/{model}/{judges}"] = rng.binomial(pairs, rate - less).astype(np.float64)
    for name in [name for name in arrays if "/rm-shuffled/" in name]:
        if name.startswith("pairs"):  # both saw the same pairs
            arrays[name] = arrays[name.replace("shuffled", "kwise")]
        else:
            pairs = arrays[name.replace("right", "pairs").replace("shuffled", "kwise")]
            arrays[name] = rng.binomial(pairs.astype(int), 0.6).astype(np.float64)
    if full:
        tokens = rng.integers(2, 9, 100).astype(np.float64)
        arrays["sft-16/tokens"] = tokens
        for epoch, loss, score in (("best", 0.85, 0.0), ("last", 0.95, 0.1)):
            noise = 0.02 * rng.standard_normal(100)
            arrays[f"sft-16/loss/{epoch}"] = tokens * (loss + noise)
            arrays[f"sft-16/score/{epoch}"] = score + 0.2 * rng.standard_normal(PROMPTS)
    return arrays


def _write_stage(out: Path, stage: str, seed: int, rng: np.random.Generator, flop: float) -> None:
    folder = out / stage
    folder.mkdir()
    table = "sft"
    if stage == "rm" or stage.startswith("ppo"):
        table = stage[:3]
    elif stage.endswith("base"):
        table = "pretrain"
    (folder / "config.toml").write_text(
        f"[{table}]\nout = {json.dumps(str(folder))}\ndata = {json.dumps(str(out / 'world'))}\n"
        f"model = {json.dumps(str(out / 'base' / 'model'))}\nseed = {seed}\n"
        f'reward_model = "None"\n\n[{table}.optim]\nlr = 0.001\n'
    )
    rows: list[dict[str, Any]] = []
    if stage.startswith("ppo"):
        rows = _ppo_rows(rng)
        _write_samples(out, folder)
    else:
        rows = _supervised_rows(stage, rng)
    write_metrics(
        folder, [row | {"flop": flop * (i + 1) / len(rows)} for i, row in enumerate(rows)]
    )


def _supervised_rows(stage: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    steps = 64
    for step in range(1, steps + 1):
        loss = 1.0 + 3.0 / step + 0.05 * rng.standard_normal()
        row = {"step": step, "seconds": 0.1 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0}
        if stage == "rm":
            row["pair_accuracy"] = 0.7 - 0.2 / step
        rows.append(row)
        if step % 4 == 0 and "base" not in stage and stage != "rm":
            epoch = step // 4
            value = 0.8 + 0.02 * abs(epoch - 5) + 0.01 * rng.standard_normal()
            rows.append({"step": step, "seconds": 0.1 * step, "validation_loss": value})
            if stage == "sft-16":
                rows[-1]["reward_score"] = 0.01 * epoch
    if stage == "rm":
        rows.append({"step": steps, "seconds": 6.5, "heldout_accuracy": 0.68})
    if stage.endswith("base"):
        rows.append({"step": steps, "seconds": 6.5, "heldout_loss": 1.5})
    return rows


def _ppo_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    gain = rng.uniform(0.4, 0.8)
    return [
        {
            "step": i,
            "seconds": 1.0 * i,
            "lr": 1e-4,
            "beta": 0.2,
            "score": gain * (1 - np.exp(-i / 8)) + 0.03 * rng.standard_normal(),
            "kl": 0.06 * i,
            "entropy": 0.9 - 0.01 * i,
            "explained_variance": 1 - 2 / i,
            "value_loss": 1.0 / i,
            "approx_kl": None if i == 3 else 1e-3,
        }
        for i in range(1, ITERATIONS + 1)
    ]


def _write_samples(out: Path, folder: Path) -> None:
    """Right answers from the middle on, none before: the hidden rule's mean is known."""
    made = world.read_world(out / "world")
    records = [json.loads(line) for line in (out / "world/prompts_ppo.jsonl").open()]
    lines = []
    for iteration in range(1, ITERATIONS + 1):
        for record in records[:EPISODES]:
            instruction = world.Instruction.from_dict(record["instruction"])
            words = world.right_answer(made, instruction) if iteration > ITERATIONS // 2 else []
            line = {"iteration": iteration, "prompt": record["prompt"], "score": 0.25}
            lines.append(line | {"response": " ".join(words), "ended": True})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A stage's metrics.jsonl."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
