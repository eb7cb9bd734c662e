"""Reward model from K-wise rankings (InstructGPT, section 3.5, equation 1).

    fastrlhf rm --config configs/paper-1.3b.toml --data DIR --out runs/rm

The model is the SFT model without its unembedding, under a scalar read at the last token. The loss
of a prompt is -1/C(K,2) times the sum over decided pairs of log sigmoid(r_w - r_l). All pairs of a
prompt are one element of the batch: K forward passes, not C(K,2), and one update an output.
Shuffling pairs over the data set instead (``pairing = "shuffled"``, for comparison) overfits within
a pass. One epoch; at the end a bias is set so that demonstrations score 0 on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import batch_indices, pad
from fastrlhf.config import require, resolve
from fastrlhf.encoding import Recipe, demonstration_examples
from fastrlhf.errors import UserError
from fastrlhf.metrics import reward_scores
from fastrlhf.models import ScalarModel, scalar_from_language_model
from fastrlhf.ranked import RankedGroup, accuracy_on, pairs_of, ranked_groups
from fastrlhf.records import read_comparisons, read_demonstrations
from fastrlhf.runlog import progress
from fastrlhf.tokenizers import load_tokenizer
from fastrlhf.training import (
    OptimizerConfig,
    Session,
    StageConfig,
    accumulate,
    make_optimizer,
    session,
)
from fastrlhf_kernels import ranking_loss


@dataclass(slots=True, kw_only=True)
class RewardConfig(StageConfig):
    """Settings of reward modelling; the defaults are the paper's."""

    model: Path
    """SFT model to start from (a Hugging Face folder)."""
    comparisons: Path = Path("comparisons.jsonl")
    """JSON lines with prompt, completions, ranks (1 is best, equal is a tie), user."""
    validation: Path | None = None
    """More of the same, for accuracy; else what ``recipe.heldout`` keeps out is used."""
    demonstrations: Path | None = Path("demonstrations.jsonl")
    """Demonstrations whose mean score becomes 0; "None": no bias is set."""
    recipe: Recipe = field(default_factory=Recipe)
    """What is done to the prompts first."""
    epochs: int = 1
    """Passes over the comparisons; more than one overfits."""
    batch_size: int = 64
    """Prompts a step, each with all its outputs."""
    pairing: Literal["kwise", "shuffled"] = "kwise"
    """All pairs of a prompt as one element, or pairs shuffled over the data set."""
    max_response: int = 1024
    """Longest completion in tokens; longer ones are cut."""
    optim: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    """Optimiser."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        for name in ("epochs", "batch_size", "max_response"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")


def run(config: RewardConfig) -> Path:
    """Train and save; returns the folder of the model."""
    with session(config, "rm") as s:
        if s.finished:
            return s.out / "model"
        model = scalar_from_language_model(config.model)
        tokenizer = load_tokenizer(config.model)
        train, heldout = _read(config, tokenizer, model.context)
        batch_size = config.batch_size
        if config.pairing == "shuffled":
            groups = len(train)
            train = [pair for group in train for pair in pairs_of(group)]
            batch_size = max(1, round(batch_size * len(train) / max(1, groups)))
        model, optimizer = s.prepare(model, make_optimizer(model, config.optim))
        lengths = [max(map(len, group.sequences)) for group in train]
        per_epoch = len(batch_indices([1] * len(train), batch_size, 0, 0))
        total = per_epoch * config.epochs
        pad_id = tokenizer.pad_token_id
        first = s.restore()
        with progress("reward model", total, start=first, enabled=s.is_main) as bar:
            for step in range(first, total):
                epoch, index = divmod(step, per_epoch)
                if index == 0 or step == first:
                    batches = batch_indices(lengths, batch_size, config.seed, epoch)
                batch = [train[i] for i in batches[index]]
                normalizer = s.local_normalizer(len(batch))
                stats: list[dict[str, Tensor]] = []
                losses = [
                    partial(_group_loss, s, model, part, normalizer, pad_id, stats)
                    for part in _cut(s.share(batch), config.max_tokens)
                ]
                model.train()
                loss = accumulate(s, model, losses)
                tokens = sum(len(q) for group in batch for q in group.sequences)
                s.spend(model, tokens, backward=True)
                lr = config.optim.lr_at(step, total)
                norm = s.step(step + 1, model, optimizer, lr, config.optim.max_grad_norm, loss)
                pairs = sum(float(x["pairs"]) for x in stats)
                right = sum(float(x["pair_accuracy"] * x["pairs"]) for x in stats if x["pairs"])
                accuracy = right / max(pairs, 1.0)
                s.record(step + 1, loss=loss, lr=lr, grad_norm=norm, pair_accuracy=accuracy)
                bar.advance(1, loss=loss, accuracy=accuracy)
                if step + 1 == total:  # before the last checkpoint, so that it is done once
                    _close(s, config, s.unwrap(model), tokenizer, heldout, total)
                if s.due(step + 1, total):
                    s.save(step + 1)
        return s.save_model(model, tokenizer)


def _read(
    config: RewardConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[RankedGroup], list[RankedGroup]]:
    room = min(config.max_response, context - 2)
    path = resolve(config.data, config.comparisons)
    items, heldout = config.recipe.apply(read_comparisons(path), tokenizer, path, context - room)
    if config.validation is not None:
        other = resolve(config.data, config.validation)
        heldout, _ = Recipe(per_user=0).apply(
            read_comparisons(other), tokenizer, other, context - room
        )
    if not items:
        raise UserError.at(path, None, None, "no comparison is left to train on")
    return ranked_groups(tokenizer, items, room), ranked_groups(tokenizer, heldout, room)


def _cut(groups: Sequence[RankedGroup], max_tokens: int) -> list[list[RankedGroup]]:
    """Groups in micro-batches of like length that fit max_tokens; a group is never split."""
    parts: list[list[RankedGroup]] = []
    rows = longest = 0
    for group in sorted(groups, key=lambda g: -max(map(len, g.sequences))):
        if parts and (rows + len(group.sequences)) * longest <= max_tokens:
            parts[-1].append(group)
            rows += len(group.sequences)
        else:
            parts.append([group])
            rows, longest = len(group.sequences), max(map(len, group.sequences))
    return parts


def _group_loss(
    s: Session,
    model: nn.Module,
    groups: Sequence[RankedGroup],
    normalizer: float,
    pad_id: int,
    stats: list[dict[str, Tensor]],
) -> Tensor:
    input_ids, lengths = pad([q for group in groups for q in group.sequences], pad_id)
    scores = model(input_ids.to(s.device), (lengths - 1).to(s.device))
    loss, found = ranking_loss(
        scores,
        torch.tensor([rank for group in groups for rank in group.ranks], device=s.device),
        torch.tensor([len(group.ranks) for group in groups], device=s.device),
        normalizer=normalizer,
    )
    stats.append(found)
    return loss


def _close(
    s: Session,
    config: RewardConfig,
    model: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[RankedGroup],
    step: int,
) -> None:
    """Set the bias, and log the accuracy on held-out prompts with its interval."""
    _zero_mean(config, model, tokenizer)
    if heldout:
        found = accuracy_on(model, heldout, tokenizer.pad_token_id)
        s.record(
            step,
            heldout_accuracy=found.mean,
            heldout_accuracy_low=found.low,
            heldout_accuracy_high=found.high,
        )


def _zero_mean(
    config: RewardConfig, model: ScalarModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Set the head's bias so that the demonstrations score 0 on average."""
    if config.demonstrations is None:
        return
    path = resolve(config.data, config.demonstrations)
    room = min(config.max_response, model.context - 2)
    items, _ = config.recipe.apply(read_demonstrations(path), tokenizer, path, model.context - room)
    examples = demonstration_examples(tokenizer, items, room)
    scores = reward_scores(model, [e.tokens for e in examples], tokenizer.pad_token_id)
    with torch.no_grad():
        model.head.bias.sub_(scores.double().mean().to(model.head.bias))
