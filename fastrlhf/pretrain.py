"""Pretraining: a small language model from scratch on plain text.

    fastrlhf pretrain --config configs/qa_feedback.toml --data DIR --out runs/base

InstructGPT starts from GPT-3. Here a model is made at the size that the machine allows, for the
miniature and for tests; on real work, start ``fastrlhf sft`` from a published checkpoint instead.
Next-token cross-entropy, Adam (0.9, 0.95), cosine to a tenth, the loss averaged over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastrlhf.batching import batch_indices, micro_batches
from fastrlhf.config import require, resolve
from fastrlhf.encoding import document_examples
from fastrlhf.metrics import mean_loss
from fastrlhf.models import ModelShape, new_language_model, parameter_count, runs_packed
from fastrlhf.records import read_documents
from fastrlhf.runlog import progress
from fastrlhf.tokenizers import load_tokenizer
from fastrlhf.training import OptimizerConfig, StageConfig, accumulate, make_optimizer, session


@dataclass(slots=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Settings of pretraining."""

    tokenizer: Path
    """Folder of a tokenizer: a Hugging Face one, or GPT-2's encoder.json and vocab.bpe."""
    documents: Path
    """Training text: .jsonl with a field "text", or any other file as plain text."""
    heldout: Path | None = None
    """Held-out text in the same form, for the loss that is reported."""
    model: ModelShape = field(default_factory=ModelShape)
    """Architecture."""
    steps: int = 2500
    """Optimiser steps."""
    batch_size: int = 64
    """Sequences a step."""
    length_window: int = 16
    """So many batches are sorted by length together, to pad little; 1: not at all."""
    eval_every: int = 500
    """Steps between held-out losses; 0: only at the end."""
    optim: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=3e-3, weight_decay=0.1, warmup_steps=50)
    )
    """Optimiser."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        for name in ("steps", "batch_size", "length_window"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")


def run(config: PretrainConfig) -> Path:
    """Train and save; returns the folder of the model."""
    with session(config, "pretrain") as s:
        if s.finished:
            return s.out / "model"
        tokenizer = load_tokenizer(resolve(config.data, config.tokenizer))
        context = config.model.context
        read = partial(document_examples, tokenizer, context=context)
        examples = read(read_documents(resolve(config.data, config.documents)))
        heldout = []
        if config.heldout is not None:
            heldout = read(read_documents(resolve(config.data, config.heldout)))
        model = new_language_model(config.model, tokenizer)
        model, optimizer = s.prepare(model, make_optimizer(model, config.optim))
        lengths = [len(e.tokens) for e in examples]
        pad_id, packed = tokenizer.pad_token_id, runs_packed(model)
        first = s.restore()
        per_epoch = max(1, len(examples) // config.batch_size)
        title = f"pretrain {parameter_count(model) / 1e6:.2f}M"
        with progress(title, config.steps, start=first, enabled=s.is_main) as bar:
            for step in range(first, config.steps):
                epoch, index = divmod(step, per_epoch)
                if index == 0 or step == first:
                    batches = batch_indices(
                        lengths, config.batch_size, config.seed, epoch, config.length_window
                    )
                batch = [examples[i] for i in batches[index]]
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
                lr = config.optim.lr_at(step, config.steps)
                norm = s.step(step + 1, model, optimizer, lr, config.optim.max_grad_norm, loss)
                done = step + 1
                s.record(done, loss=loss, lr=lr, grad_norm=norm)
                if heldout and (
                    done == config.steps or (config.eval_every and done % config.eval_every == 0)
                ):
                    s.record(done, heldout_loss=mean_loss(s.unwrap(model), heldout, pad_id))
                bar.advance(1, loss=loss)
                if s.due(done, config.steps):
                    s.save(done)
        return s.save_model(model, tokenizer)
