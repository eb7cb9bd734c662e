"""Supervised fine-tuning on demonstrations (InstructGPT, section 3.5 and appendix C.1).

    fastrlhf sft --config configs/paper-1.3b.toml --data DIR --out runs/sft

Cross-entropy on the demonstration alone, 16 epochs, cosine to a tenth without warm-up, residual
dropout 0.2. The checkpoint is chosen by the reward model's score on validation prompts, not by
validation loss, which overfits after one epoch while score and human ratings still rise. The same
stage makes PPO's start: 2 epochs, with a tenth of the sequences taken from the pretraining text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import Example, batch_indices, cyclic_indices, micro_batches
from fastrlhf.config import require, resolve
from fastrlhf.encoding import Recipe, demonstration_examples, document_examples
from fastrlhf.errors import UserError
from fastrlhf.generation import generate
from fastrlhf.metrics import mean_loss, reward_scores
from fastrlhf.models import (
    LanguageModel,
    ScalarModel,
    load_language_model,
    load_scalar_model,
    runs_packed,
)
from fastrlhf.records import read_demonstrations, read_documents
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


@dataclass(slots=True, kw_only=True)
class SFTConfig(StageConfig):
    """Settings of supervised fine-tuning; the defaults are the paper's."""

    model: Path
    """Pretrained language model (a Hugging Face folder)."""
    demonstrations: Path = Path("demonstrations.jsonl")
    """JSON lines with prompt, completion and, if known, user."""
    validation: Path | None = None
    """More of the same, for validation; else what ``recipe.heldout`` keeps out is used."""
    recipe: Recipe = field(default_factory=Recipe)
    """What is done to the prompts first."""
    epochs: int = 16
    """Passes over the demonstrations."""
    batch_size: int = 32
    """Demonstrations a step."""
    residual_dropout: float = 0.2
    """Dropout on what attention and feed-forward add to the residual stream."""
    max_response: int = 1024
    """Longest completion in tokens; longer ones are cut."""
    pretrain_mix: float = 0.0
    """Share of the sequences of a step that come from the pretraining text (PPO's start: 0.1)."""
    pretrain_documents: Path | None = None
    """The pretraining text, where a share of it is mixed in."""
    select: Literal["last", "loss", "reward"] = "last"
    """Which epoch becomes the model: the last, or the best by validation loss or reward score."""
    reward_model: Path | None = None
    """Reward model whose score on samples is logged each epoch; needed for select = reward."""
    reward_prompts: int = 256
    """Validation prompts that are sampled for that score."""
    keep_epochs: bool = False
    """Keep a model folder of each epoch, epochs/epoch-01 and on."""
    optim: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9.65e-6))
    """Optimiser."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        for name in ("epochs", "batch_size", "max_response", "reward_prompts"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        require(0 <= self.pretrain_mix < 1, "pretrain_mix", "must lie in [0, 1)")
        require(
            self.pretrain_mix == 0 or self.pretrain_documents is not None,
            "pretrain_documents",
            "is needed for pretrain_mix > 0",
        )
        require(
            self.select != "reward" or self.reward_model is not None,
            "reward_model",
            "is needed for select = reward",
        )


def run(config: SFTConfig) -> Path:
    """Train and save; returns the folder of the chosen model."""
    with session(config, "sft") as s:
        if s.finished:
            return s.out / "model"
        model = load_language_model(config.model, config.residual_dropout)
        tokenizer = load_tokenizer(config.model)
        train, validation = _read(config, tokenizer, model.context)
        mixed = _mixed_documents(config, tokenizer, model.context)
        judge = load_scalar_model(config.reward_model) if config.reward_model else None
        if judge is not None:
            judge.to(s.device)
        model, optimizer = s.prepare(model, make_optimizer(model, config.optim))
        per_epoch = len(batch_indices([1] * len(train), config.batch_size, 0, 0))
        total = per_epoch * config.epochs
        extra = round(config.batch_size * config.pretrain_mix / (1.0 - config.pretrain_mix))
        pad_id, packed = tokenizer.pad_token_id, runs_packed(model)
        first = s.restore()
        with progress("sft", total, start=first, enabled=s.is_main) as bar:
            for step in range(first, total):
                epoch, index = divmod(step, per_epoch)
                if index == 0 or step == first:
                    batches = batch_indices(
                        [len(e.tokens) for e in train], config.batch_size, config.seed, epoch
                    )
                batch = [train[i] for i in batches[index]]
                batch += [
                    mixed[i] for i in cyclic_indices(len(mixed), extra, step, config.seed + 1)
                ]
                normalizer = s.local_normalizer(sum(e.targets for e in batch))
                losses = [
                    partial(model, input_ids, labels, loss_normalizer=normalizer)
                    for _, input_ids, labels in micro_batches(
                        s.share(batch), config.max_tokens, pad_id, s.device, packed=packed
                    )
                ]
                model.train()
                loss = accumulate(s, model, losses)
                s.spend(model, sum(len(e.tokens) for e in batch), backward=True)
                lr = config.optim.lr_at(step, total)
                norm = s.step(step + 1, model, optimizer, lr, config.optim.max_grad_norm, loss)
                done = step + 1
                s.record(done, loss=loss, lr=lr, grad_norm=norm, epoch=done / per_epoch)
                if done % per_epoch == 0:
                    _close_epoch(s, config, model, tokenizer, validation, judge, epoch + 1, done)
                bar.advance(1, loss=loss, epoch=epoch + 1)
                if s.due(done, total):
                    s.save(done)
        chosen = s.out / "best"
        if config.select != "last" and chosen.is_dir():
            best = load_language_model(chosen)
            return s.save_model(best, tokenizer)
        return s.save_model(model, tokenizer)


def _read(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[Example], list[Example]]:
    """Training and validation sequences."""
    room = min(config.max_response, context - 2)
    limit = context - room
    path = resolve(config.data, config.demonstrations)
    items, heldout = config.recipe.apply(read_demonstrations(path), tokenizer, path, limit)
    if config.validation is not None:
        other = resolve(config.data, config.validation)
        heldout, _ = Recipe(per_user=0).apply(read_demonstrations(other), tokenizer, other, limit)
    if not items:
        raise UserError.at(path, None, None, "no demonstration is left to train on")
    if config.select != "last" and not heldout:
        raise UserError(f"field 'select': {config.select} needs validation demonstrations")
    return (
        demonstration_examples(tokenizer, items, room),
        demonstration_examples(tokenizer, heldout, room),
    )


def _mixed_documents(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[Example]:
    if config.pretrain_documents is None or config.pretrain_mix == 0:
        return []
    documents = read_documents(resolve(config.data, config.pretrain_documents))
    return document_examples(tokenizer, documents, context)


def _close_epoch(
    s: Session,
    config: SFTConfig,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    validation: Sequence[Example],
    judge: ScalarModel | None,
    epoch: int,
    step: int,
) -> None:
    """Validation loss and reward score after an epoch; remember the best model by either."""
    bare, pad_id = s.unwrap(model), tokenizer.pad_token_id
    measured: dict[str, float] = {}
    if validation:
        measured["validation_loss"] = mean_loss(bare, validation, pad_id)
    if validation and judge is not None:
        prompts = [list(e.tokens[: e.start]) for e in validation[: config.reward_prompts]]
        longest = max(map(len, prompts))
        answers = generate(
            bare,
            prompts,
            max_new_tokens=min(config.max_response, bare.context - longest),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id,
            seeds=[config.seed * 1_000_003 + i for i in range(len(prompts))],
        )
        whole = [
            p + t[:n].tolist()
            for p, t, n in zip(prompts, answers.tokens, answers.lengths.tolist(), strict=True)
        ]
        measured["reward_score"] = float(reward_scores(judge, whole, pad_id).mean())
    s.record(step, **measured)
    if config.keep_epochs:
        s.save_model(model, tokenizer, f"epochs/epoch-{epoch:02d}")
    if config.select == "last":
        return
    # The lower the better: a loss, or a score with its sign turned.
    value = measured["validation_loss"] if config.select == "loss" else -measured["reward_score"]
    if value < s.progress.extra.get("best", math.inf):
        s.progress.extra.update(best=value, best_epoch=epoch)
        s.save_model(model, tokenizer, "best")
