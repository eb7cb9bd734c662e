"""Evaluation on held-out data: reward, win rate, reward-model accuracy, text loss.

    fastrlhf eval --model runs/ppo/model --baseline runs/sft/model --reward-model runs/rm/model \
        --prompts prompts.jsonl --documents pretrain_heldout.jsonl --out runs/eval

Measures what it is given files for and writes eval.json, each figure with its 95 % interval. The
judge of the win rate is the reward model: what it was trained on, a policy may have learned to
please. ``fastrlhf demo`` judges by a rule that no model has seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from fastrlhf.config import require, resolve
from fastrlhf.encoding import Recipe, document_examples, prompt_ids
from fastrlhf.errors import UserError
from fastrlhf.generation import generate
from fastrlhf.metrics import Interval, example_losses, mean_interval, ratio_interval, reward_scores
from fastrlhf.models import LanguageModel, load_language_model, load_scalar_model
from fastrlhf.ranked import accuracy_on, ranked_groups
from fastrlhf.records import read_comparisons, read_documents, read_prompts
from fastrlhf.runlog import writable_dir
from fastrlhf.tokenizers import load_tokenizer


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """Settings of evaluation."""

    out: Path
    """Folder for eval.json."""
    model: Path | None = None
    """Language model to evaluate."""
    baseline: Path | None = None
    """Language model that the win rate is against."""
    reward_model: Path | None = None
    """Reward model that scores responses."""
    data: Path | None = None
    """Folder that relative data files are looked up in."""
    prompts: Path | None = None
    """Prompts to answer; of these, what ``recipe.heldout`` keeps out, or all."""
    comparisons: Path | None = None
    """Rankings for the reward model's accuracy; of these, likewise the held-out ones, or all."""
    documents: Path | None = None
    """Held-out text for the loss."""
    recipe: Recipe = field(default_factory=lambda: Recipe(per_user=0))
    """What is done to the prompts first; use the training stages' own."""
    max_response: int = 128
    """Longest response in tokens."""
    max_completion: int = 0
    """Longest ranked completion in tokens, as for the reward model's training; 0: max_response."""
    temperature: float = 1.0
    """Sampling temperature."""
    samples: int = 1
    """Responses to each prompt."""
    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        require(self.samples > 0, "samples", f"must be positive, got {self.samples}")
        require(self.max_response > 0, "max_response", "must be positive")
        require(self.max_completion >= 0, "max_completion", "must not be negative")
        if self.prompts is not None:
            require(self.model is not None, "model", "is needed to answer prompts")
            require(self.reward_model is not None, "reward_model", "is needed to score responses")
        if self.comparisons is not None:
            require(self.reward_model is not None, "reward_model", "is needed for comparisons")
        if self.documents is not None:
            require(self.model is not None, "model", "is needed for the loss of documents")
        require(
            any(p is not None for p in (self.prompts, self.comparisons, self.documents)),
            "prompts",
            "nothing to evaluate: give prompts, comparisons or documents",
        )


def run(config: EvalConfig) -> Path:
    """Measure and write; returns the file."""
    out = writable_dir(config.out)
    found: dict[str, Interval] = {}
    if config.comparisons is not None:
        found["reward model accuracy on pairs"] = _accuracy(config)
    if config.documents is not None and config.model is not None:
        for name, path in (("model", config.model), ("baseline", config.baseline)):
            if path is not None:
                found[f"{name}: loss a token of text (nats)"] = _text_loss(config, path)
    if config.prompts is not None:
        found |= _scores(config)
    table = Table("measure", "mean", "95 % interval", "n")
    for name, value in found.items():
        table.add_row(
            name, f"{value.mean:.4f}", f"{value.low:.4f} to {value.high:.4f}", str(value.n)
        )
    Console().print(table)
    path = out / "eval.json"
    path.write_text(
        json.dumps({name: value._asdict() for name, value in found.items()}, indent=1) + "\n",
        encoding="utf-8",
    )
    return path


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _heldout(config: EvalConfig, items: list[Any], tokenizer: Any, path: Path, limit: int) -> Any:
    train, heldout = config.recipe.apply(items, tokenizer, path, limit)
    if not (kept := heldout if config.recipe.heldout else train):
        raise UserError.at(path, None, None, "no record is left to evaluate on")
    return kept


def _accuracy(config: EvalConfig) -> Interval:
    assert config.reward_model is not None
    assert config.comparisons is not None
    model = load_scalar_model(config.reward_model).to(_device())
    tokenizer = load_tokenizer(config.reward_model)
    path = resolve(config.data, config.comparisons)
    room = min(config.max_completion or config.max_response, model.context - 2)
    items = _heldout(config, read_comparisons(path), tokenizer, path, model.context - room)
    return accuracy_on(model, ranked_groups(tokenizer, items, room), tokenizer.pad_token_id)


def _text_loss(config: EvalConfig, path: Path) -> Interval:
    assert config.documents is not None
    model, tokenizer = load_language_model(path).to(_device()), load_tokenizer(path)
    documents = read_documents(resolve(config.data, config.documents))
    examples = document_examples(tokenizer, documents, model.context)
    return ratio_interval(*example_losses(model, examples, tokenizer.pad_token_id))


def _scores(config: EvalConfig) -> dict[str, Interval]:
    """Mean reward of the model (and the baseline), and the win rate between them, by prompt."""
    assert config.model is not None
    assert config.prompts is not None
    assert config.reward_model is not None
    tokenizer = load_tokenizer(config.model)
    path = resolve(config.data, config.prompts)
    model = load_language_model(config.model).to(_device())
    room = min(config.max_response, model.context - 2)
    items = _heldout(config, read_prompts(path), tokenizer, path, model.context - room)
    prompts = prompt_ids(tokenizer, items)
    mine = _rewards(config, model, tokenizer, prompts, room)
    found = {"model: reward score": mean_interval(mine.mean(1))}
    if config.baseline is not None:
        other = load_language_model(config.baseline).to(_device())
        theirs = _rewards(config, other, tokenizer, prompts, room)
        wins = (np.sign(mine[:, :, None] - theirs[:, None, :]) + 1.0) / 2.0
        found["baseline: reward score"] = mean_interval(theirs.mean(1))
        found["win rate against the baseline"] = mean_interval(wins.mean((1, 2)))
    return found


def _rewards(
    config: EvalConfig,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    room: int,
) -> np.ndarray:
    """(prompts, samples) reward scores of sampled responses."""
    assert config.reward_model is not None
    reward = load_scalar_model(config.reward_model).to(_device())
    repeated = [p for p in prompts for _ in range(config.samples)]
    drawn = generate(
        model,
        repeated,
        max_new_tokens=room,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seeds=range(config.seed << 32, (config.seed << 32) + len(repeated)),
        temperature=config.temperature,
        batch_size=64,
    )
    whole = [
        p + t[:n]
        for p, t, n in zip(repeated, drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
    ]
    scores = reward_scores(reward, whole, tokenizer.pad_token_id)
    return scores.double().numpy().reshape(len(prompts), config.samples)
