"""One batch of PPO experience: sample, score, shape rewards, estimate advantages.

The response's slots are the columns of (B, R) tensors: column i holds the i-th token of the
response, the value of the state before it, and its reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.batching import Example, micro_batches
from fastrlhf.generation import Engine, Generated, generate
from fastrlhf.metrics import reward_scores
from fastrlhf.models import LanguageModel, ScalarModel, runs_packed
from fastrlhf.training import Session
from fastrlhf_kernels import gae, kl_penalty, shape_rewards, whiten


@dataclass(slots=True, kw_only=True)
class RolloutSettings:
    """How experience is gathered and valued; see the fields of the same name in PPOConfig."""

    max_response: int
    temperature: float
    generate_batch: int
    kl_estimator: str
    discount: float
    gae_lambda: float
    score_clip: float | None
    whiten_rewards: bool
    no_end_score: float | None
    recompute: bool
    max_tokens: int


@dataclass(slots=True, kw_only=True)
class Actors:
    """The four models of PPO and the special tokens."""

    policy: nn.Module  # as prepared for training
    value: nn.Module  # as prepared for training
    reference: LanguageModel
    reward: ScalarModel
    eos_id: int
    pad_id: int
    engine: Engine | None = None
    """The policy's generator, where one is kept from batch to batch."""


@dataclass(slots=True, kw_only=True)
class Rollout:
    """A batch of B episodes; R is the longest response."""

    episodes: list[Example]
    """Prompt and response, the response's first token as ``start``."""
    mask: Tensor
    """(B, R) bool: slots that hold a token."""
    logprobs: Tensor
    """(B, R) under the policy that sampled."""
    values: Tensor
    """(B, R) of the value model before its update."""
    advantages: Tensor
    """(B, R), whitened."""
    scores: Tensor
    """(B,) of the reward model, before penalty and clipping."""
    returns: Tensor
    """(B, R): unwhitened advantages plus values."""
    stats: dict[str, float]
    """Means over the batch, for the log."""


def collect(
    s: Session,
    actors: Actors,
    settings: RolloutSettings,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    beta: float,
) -> Rollout:
    """Sample a response to each prompt and value it; ``beta`` weighs the KL penalty."""
    policy = s.unwrap(actors.policy)
    answers = generate(
        policy,
        prompts,
        max_new_tokens=settings.max_response,
        eos_token_id=actors.eos_id,
        pad_token_id=actors.pad_id,
        seeds=seeds,
        temperature=settings.temperature,
        batch_size=settings.generate_batch,
        engine=actors.engine,
    )
    episodes = [
        Example((*p, *t[:n]), len(p))
        for p, t, n in zip(prompts, answers.tokens.tolist(), answers.lengths.tolist(), strict=True)
    ]
    slots = answers.tokens.shape[1]
    mask = torch.arange(slots, device=s.device) < answers.lengths[:, None]
    with s.accelerator.autocast():
        ref_logprobs = token_values(actors.reference, episodes, slots, settings, actors.pad_id)
        values = token_values(s.unwrap(actors.value), episodes, slots, settings, actors.pad_id)
        logprobs = answers.logprobs
        if settings.recompute:
            logprobs = token_values(policy, episodes, slots, settings, actors.pad_id)
        scores = reward_scores(actors.reward, [e.tokens for e in episodes], actors.pad_id)
    scores = scores.to(s.device)
    ended = answers.ended(actors.eos_id)
    shaped = scores
    if settings.no_end_score is not None:
        shaped = torch.where(ended, scores, settings.no_end_score)
    kl = kl_penalty(logprobs, ref_logprobs, estimator=settings.kl_estimator)
    rewards = shape_rewards(shaped, kl, mask, beta=beta, clip=settings.score_clip)
    group = torch.distributed.group.WORLD if s.accelerator.num_processes > 1 else None
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, group=group)
    advantages, returns = gae(
        rewards, values, mask, gamma=settings.discount, lam=settings.gae_lambda
    )
    summed = {
        "score": float(scores.sum()),
        "kl": float((torch.where(mask, logprobs - ref_logprobs, 0.0)).sum()),
        "reward": float(rewards.sum()),
        "response_length": float(answers.lengths.sum()),
        "ended": float(ended.sum()),
        "return": float(returns[:, 0].sum()),
    }
    count = s.total(len(episodes))
    tokens = round(s.total(sum(len(e.tokens) for e in episodes)))
    for model in (policy, actors.reference, actors.reward, actors.value):
        s.spend(model, tokens, backward=False)
    return Rollout(
        episodes=episodes,
        mask=mask,
        logprobs=logprobs,
        values=values,
        advantages=whiten(advantages, mask, group=group),
        scores=scores,
        returns=returns,
        stats={name: s.total(value) / count for name, value in summed.items()}
        | {"entropy": _sampled_entropy(s, answers, mask)},
    )


def _sampled_entropy(s: Session, answers: Generated, mask: Tensor) -> float:
    """Entropy a token, estimated by the mean of -log p over sampled tokens, in nats."""
    return -s.total(float(answers.logprobs.sum())) / max(s.total(float(mask.sum())), 1.0)


@torch.inference_mode()
def token_values(
    model: LanguageModel | ScalarModel,
    episodes: Sequence[Example],
    slots: int,
    settings: RolloutSettings,
    pad_id: int,
) -> Tensor:
    """Log-probs, or values, (B, slots) of responses without gradients; 0 past the end."""
    model.eval()
    device = next(model.parameters()).device
    out = torch.zeros((len(episodes), slots), device=device)
    cut = micro_batches(episodes, settings.max_tokens, pad_id, device, packed=runs_packed(model))
    for indices, input_ids, labels in cut:
        part = [episodes[i] for i in indices]
        out[indices] = response_slots(model, part, input_ids, labels, slots, settings.temperature)
    return out


def response_slots(
    model: Any,  # LanguageModel or ScalarModel, or either under a distribution wrapper
    episodes: Sequence[Example],
    input_ids: Tensor,
    labels: Tensor,
    slots: int,
    temperature: float,
) -> Tensor:
    """One forward pass, moved from token positions (b, T) to response slots (b, slots).

    A log-prob stands at its token's position; the value of the state before a token stands one
    position earlier.
    """
    device = input_ids.device
    starts = torch.tensor([e.start for e in episodes], device=device)
    lengths = torch.tensor([e.targets for e in episodes], device=device)
    if _is_scalar(model):
        starts = starts - 1
        placed = model(input_ids, lengths=starts + lengths)
    else:
        placed = model(input_ids, labels, temperature=temperature)
    column = torch.arange(slots, device=device)
    index = (starts[:, None] + column).clamp(max=placed.shape[1] - 1)
    return torch.where(column < lengths[:, None], placed.gather(1, index), 0.0)


def _is_scalar(model: Any) -> bool:
    return isinstance(getattr(model, "module", model), ScalarModel)
