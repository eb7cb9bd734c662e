"""PPO and PPO-ptx against a reward model (InstructGPT, section 3.5, equation 2).

    fastrlhf ppo --config configs/paper-1.3b.toml --data DIR --out runs/ppo

    maximise  E[ r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)) ] + gamma * E_pretrain[ log pi(x) ]

Policy and KL reference start from the same SFT model, the value model from the reward model. Each
iteration samples a batch of responses, scores them, and takes one pass of minibatches; in each of
them the gradients of the PPO loss and of gamma times the pretraining loss are accumulated.
``ptx_coef = 0`` is plain PPO. Rewards are -beta * kl a token, plus the score at the last token;
advantages are GAE's, whitened; returns use unwhitened ones (lm-human-preferences).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import Example, cyclic_indices, epoch_order, micro_batches
from fastrlhf.config import require, resolve
from fastrlhf.encoding import Recipe, decode, decode_prompt, document_examples, prompt_ids
from fastrlhf.errors import UserError
from fastrlhf.generation import Engine
from fastrlhf.models import EMA, load_language_model, load_scalar_model, runs_packed
from fastrlhf.records import read_documents, read_prompts
from fastrlhf.rollout import Actors, Rollout, RolloutSettings, collect, response_slots
from fastrlhf.runlog import keep_lines, progress
from fastrlhf.tokenizers import load_tokenizer
from fastrlhf.training import (
    OptimizerConfig,
    Session,
    StageConfig,
    accumulate,
    make_optimizer,
    session,
)
from fastrlhf_kernels import policy_loss, value_loss


@dataclass(slots=True, kw_only=True)
class PPOConfig(StageConfig):
    """Settings of PPO; the defaults are the paper's where it prints them."""

    model: Path
    """SFT model that the policy starts from, which is also the KL reference."""
    reward_model: Path
    """Reward model; the value model starts from it."""
    prompts: Path = Path("prompts.jsonl")
    """JSON lines with prompt and, if known, user."""
    recipe: Recipe = field(default_factory=Recipe)
    """What is done to the prompts first."""
    pretrain_documents: Path | None = None
    """Pretraining text; needed for ptx_coef > 0."""
    ptx_coef: float = 27.8
    """Gamma, the weight of the pretraining loss; 0: plain PPO."""
    ptx_ratio: float = 8.0
    """Pretraining sequences to an episode."""
    iterations: int = 500
    """Batches of episodes (the paper: 256k episodes in batches of 512)."""
    batch_size: int = 512
    """Episodes an iteration."""
    minibatch_size: int = 64
    """Episodes an optimiser step."""
    inner_epochs: int = 1
    """Passes over each batch."""
    beta: float = 0.02
    """Weight of the per-token KL penalty."""
    kl_target: float | None = None
    """If set, beta adapts so that the KL of a response comes to this many nats."""
    kl_horizon: int = 10_000
    """Episodes over which beta adapts."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Per-token estimate of the KL."""
    clip: float = 0.2
    """Range of the probability ratio."""
    value_clip: float | None = 0.2
    """Range of the value's change; "None": unclipped."""
    discount: float = 1.0
    """Discount of rewards a token."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    score_clip: float | None = None
    """If set, scores are clamped to plus and minus this."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance, keeping their mean."""
    no_end_score: float | None = None
    """If set, the score of a response that has no end token."""
    ema: float = 0.992
    """Decay of the average of weights that is saved as the model; 0: the last weights are."""
    temperature: float = 1.0
    """Sampling temperature; logits of policy and reference are divided by it alike."""
    max_response: int = 1024
    """Longest response in tokens."""
    save_every: int = 10
    """Iterations between checkpoints; 0: only at the end."""
    samples: int = 8
    """Episodes of each iteration that are kept as text in samples.jsonl."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Log-probs of the behaviour policy: as sampled, or by the training forward pass."""
    generate_batch: int = 256
    """Sequences that are generated together."""
    optim: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=9.65e-6, eps=1e-5, schedule="constant", warmup_steps=10, warmup_from=0.1
        )
    )
    """Policy optimiser; its warm-up counts iterations."""
    value_optim: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=9e-6, eps=1e-5, schedule="constant", warmup_steps=10, warmup_from=0.1
        )
    )
    """Value optimiser; its warm-up counts iterations."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        for name in ("iterations", "batch_size", "minibatch_size", "inner_epochs", "max_response"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        for name in ("beta", "ptx_coef", "ptx_ratio"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        require(
            self.batch_size % self.minibatch_size == 0,
            "minibatch_size",
            f"must divide the batch size {self.batch_size}, got {self.minibatch_size}",
        )
        require(0 <= self.ema < 1, "ema", f"must lie in [0, 1), got {self.ema}")
        require(self.temperature > 0, "temperature", "must be positive")
        require(
            self.ptx_coef == 0 or self.pretrain_documents is not None,
            "pretrain_documents",
            "is needed for ptx_coef > 0",
        )

    @property
    def updates(self) -> int:
        """Optimiser steps an iteration."""
        return self.batch_size // self.minibatch_size * self.inner_epochs


def run(config: PPOConfig) -> Path:
    """Train and save; returns the folder of the policy."""
    with session(config, "ppo") as s:
        if s.finished:
            return s.out / "model"
        processes = s.accelerator.num_processes
        require(
            config.minibatch_size % processes == 0,
            "minibatch_size",
            f"must be a multiple of the {processes} processes, got {config.minibatch_size}",
        )
        tokenizer = load_tokenizer(config.model)
        policy = load_language_model(config.model)
        value = load_scalar_model(config.reward_model)
        prompts = _read_prompts(config, tokenizer, policy.context)
        documents = _read_documents(config, tokenizer, policy.context)
        average = EMA.of(policy.to(s.device), config.ema) if config.ema else None
        policy, value, optimizer, value_optimizer = s.prepare(
            policy,
            value,
            make_optimizer(policy, config.optim),
            make_optimizer(value, config.value_optim),
        )
        if average is not None:
            s.register(average)
        actors = Actors(
            policy=policy,
            value=value,
            reference=load_language_model(config.model).to(s.device),
            reward=load_scalar_model(config.reward_model).to(s.device),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            # Updates are in place, so that a CUDA graph captured once serves the whole run.
            engine=Engine(s.unwrap(policy), slots=config.generate_batch, keep=True),
        )
        settings = _rollout_settings(config)
        first = s.restore()
        samples = s.out / "samples.jsonl"
        if s.is_main:
            keep_lines(samples, lambda line: line["iteration"] <= first)
        beta = float(s.progress.extra.get("beta", config.beta))
        name = "PPO-ptx" if config.ptx_coef else "PPO"
        with progress(name, config.iterations, "iteration", start=first, enabled=s.is_main) as bar:
            for iteration in range(first, config.iterations):
                chosen = cyclic_indices(len(prompts), config.batch_size, iteration, config.seed)
                # One seed an episode of the run, so that no two draws are the same.
                base = (config.seed << 32) + iteration * config.batch_size
                rollout = collect(
                    s,
                    actors,
                    settings,
                    s.share([prompts[i] for i in chosen]),
                    s.share(range(base, base + config.batch_size)),
                    beta,
                )
                lr = config.optim.lr_at(iteration, config.iterations)
                value_lr = config.value_optim.lr_at(iteration, config.iterations)
                updates: list[dict[str, float]] = []
                for number, rows in enumerate(_minibatches(s, config, iteration)):
                    place = iteration * config.updates + number
                    count = round(config.minibatch_size * config.ptx_ratio)
                    mixed = cyclic_indices(len(documents), count, place, config.seed + 1)
                    texts = s.share([documents[i] for i in mixed])
                    step = (s, config, iteration + 1, actors, rollout, rows)
                    found = _update_policy(*step, optimizer, lr, texts)
                    found |= _update_value(*step, value_optimizer, value_lr)
                    if average is not None:
                        average.update(s.unwrap(policy))
                    updates.append(found)
                stats = rollout.stats | {k: _mean([u[k] for u in updates]) for k in updates[0]}
                s.record(iteration + 1, lr=lr, beta=beta, **stats)
                if s.is_main:
                    _keep_samples(samples, config, tokenizer, rollout, iteration)
                if config.kl_target is not None:
                    error = min(max(stats["kl"] / config.kl_target - 1.0, -0.2), 0.2)
                    beta *= 1.0 + error * config.batch_size / config.kl_horizon
                s.progress.extra["beta"] = beta
                bar.advance(1, score=stats["score"], kl=stats["kl"])
                if s.due(iteration + 1, config.iterations):
                    s.save(iteration + 1)
        s.save_model(value, tokenizer, "value")
        if average is not None:
            average.copy_to(s.unwrap(policy))
        return s.save_model(policy, tokenizer)


def _update_policy(
    s: Session,
    config: PPOConfig,
    number: int,
    actors: Actors,
    rollout: Rollout,
    rows: list[int],
    optimizer: Any,
    lr: float,
    texts: Sequence[Example],
) -> dict[str, float]:
    """One optimiser step on the PPO loss plus gamma times the pretraining loss."""
    episodes = [rollout.episodes[i] for i in rows]
    tokens = s.total(sum(e.targets for e in episodes))
    normalizer = s.local_normalizer(tokens)
    stats: list[tuple[int, dict[str, Tensor]]] = []
    ptx: list[Tensor] = []

    def ppo_part(indices: list[int], input_ids: Tensor, labels: Tensor) -> Tensor:
        part, at = [episodes[i] for i in indices], [rows[i] for i in indices]
        logprobs = response_slots(
            actors.policy, part, input_ids, labels, rollout.mask.shape[1], config.temperature
        )
        loss, found = policy_loss(
            logprobs,
            rollout.logprobs[at],
            rollout.advantages[at],
            rollout.mask[at],
            clip=config.clip,
            normalizer=normalizer,
        )
        stats.append((sum(e.targets for e in part), found))
        return loss

    def ptx_part(input_ids: Tensor, labels: Tensor, normalizer: float) -> Tensor:
        loss = actors.policy(input_ids, labels, loss_normalizer=normalizer)
        ptx.append(loss.detach())
        return config.ptx_coef * loss

    losses: list[Callable[[], Tensor]] = [
        partial(ppo_part, *micro)
        for micro in micro_batches(
            episodes, config.max_tokens, actors.pad_id, s.device, packed=runs_packed(actors.policy)
        )
    ]
    if config.ptx_coef:
        ptx_normalizer = s.local_normalizer(s.total(sum(e.targets for e in texts)))
        losses += [
            partial(ptx_part, input_ids, labels, ptx_normalizer)
            for _, input_ids, labels in micro_batches(
                texts,
                config.max_tokens,
                actors.pad_id,
                s.device,
                packed=runs_packed(actors.policy),
            )
        ]
    actors.policy.train()
    loss = accumulate(s, actors.policy, losses)
    trained = sum(len(e.tokens) for e in (*episodes, *texts))
    s.spend(actors.policy, round(s.total(trained)), backward=True)
    norm = s.step(number, actors.policy, optimizer, lr, config.optim.max_grad_norm, loss)
    ptx_loss = s.total(float(sum(ptx))) / s.accelerator.num_processes
    return {
        "policy_loss": loss - config.ptx_coef * ptx_loss,
        "policy_clip_fraction": _weighted(stats, "clip_fraction"),
        "approx_kl": _weighted(stats, "approx_kl"),
        "ratio": _weighted(stats, "ratio_mean"),
        "policy_grad_norm": norm,
    } | ({"ptx_loss": ptx_loss} if config.ptx_coef else {})


def _update_value(
    s: Session,
    config: PPOConfig,
    number: int,
    actors: Actors,
    rollout: Rollout,
    rows: list[int],
    optimizer: Any,
    lr: float,
) -> dict[str, float]:
    """One optimiser step on the clipped value loss."""
    episodes = [rollout.episodes[i] for i in rows]
    normalizer = s.local_normalizer(s.total(sum(e.targets for e in episodes)))
    stats: list[tuple[int, dict[str, Tensor]]] = []

    def part_loss(indices: list[int], input_ids: Tensor, labels: Tensor) -> Tensor:
        part, at = [episodes[i] for i in indices], [rows[i] for i in indices]
        values = response_slots(
            actors.value, part, input_ids, labels, rollout.mask.shape[1], config.temperature
        )
        loss, found = value_loss(
            values,
            rollout.values[at],
            rollout.returns[at],
            rollout.mask[at],
            clip=config.value_clip,
            normalizer=normalizer,
        )
        stats.append((sum(e.targets for e in part), found))
        return loss

    losses: list[Callable[[], Tensor]] = [
        partial(part_loss, *micro)
        for micro in micro_batches(
            episodes, config.max_tokens, actors.pad_id, s.device, packed=runs_packed(actors.value)
        )
    ]
    actors.value.train()
    loss = accumulate(s, actors.value, losses)
    s.spend(actors.value, round(s.total(sum(len(e.tokens) for e in episodes))), backward=True)
    norm = s.step(number, actors.value, optimizer, lr, config.value_optim.max_grad_norm, loss)
    return {
        "value_loss": loss,
        "value_clip_fraction": _weighted(stats, "clip_fraction"),
        "explained_variance": _weighted(stats, "explained_variance"),
        "value_grad_norm": norm,
    }


def _keep_samples(
    path: Path,
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    iteration: int,
) -> None:
    """Append the first episodes of an iteration as text: what the policy says, and its score."""
    with path.open("a", encoding="utf-8") as file:
        for episode, score in zip(
            rollout.episodes[: config.samples], rollout.scores.tolist(), strict=False
        ):
            line = {
                "iteration": iteration + 1,
                "prompt": decode_prompt(tokenizer, episode.tokens[: episode.start]),
                "response": decode(tokenizer, episode.tokens[episode.start :]),
                "ended": episode.tokens[-1] == tokenizer.eos_token_id,
                "score": round(score, 4),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _minibatches(s: Session, config: PPOConfig, iteration: int) -> Iterator[list[int]]:
    """Rows of this process's episodes for each optimiser step of an iteration."""
    rows = len(s.share(range(config.batch_size)))
    size = rows * config.minibatch_size // config.batch_size
    for epoch in range(config.inner_epochs):
        order = epoch_order(rows, config.seed + 2, iteration * config.inner_epochs + epoch)
        for first in range(0, rows - size + 1, size):
            yield order[first : first + size].tolist()


def _rollout_settings(config: PPOConfig) -> RolloutSettings:
    return RolloutSettings(
        recompute=config.old_logprobs == "recompute",
        **{
            f.name: getattr(config, f.name)
            for f in fields(RolloutSettings)
            if f.name != "recompute"
        },
    )


def _read_prompts(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[list[int]]:
    path = resolve(config.data, config.prompts)
    require(config.max_response < context, "max_response", f"leaves no room in {context} tokens")
    items, _ = config.recipe.apply(
        read_prompts(path), tokenizer, path, context - config.max_response
    )
    if not items:
        raise UserError.at(path, None, None, "no prompt is left to train on")
    return prompt_ids(tokenizer, items)


def _read_documents(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[Example]:
    if config.pretrain_documents is None or config.ptx_coef == 0:
        return []
    path = resolve(config.data, config.pretrain_documents)
    return document_examples(tokenizer, read_documents(path), context)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _weighted(stats: Sequence[tuple[int, dict[str, Tensor]]], name: str) -> float:
    """Mean of a statistic over micro-batches, by their tokens."""
    return sum(n * float(found[name]) for n, found in stats) / sum(n for n, _ in stats)
