"""Traps of the ops over tokens and sequences: losses, divergences, rollouts."""

from __future__ import annotations

from typing import Any

import torch
from oracle import assert_same_bits
from torch import Tensor
from traps import INF, NAN, Op, close, loss_and_gradient, noise, trap

from fastrlhf_kernels.shape_rewards import shape_rewards_ref

# ---- what a mask covers


def naive_multiplied_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = (logprobs - old_logprobs).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (losses * mask).sum() / mask.sum(), {}


def _policy_case(device: str) -> list[Tensor]:
    new, old, advantages = (0.1 * noise(3, 7, seed=s).to(device) for s in range(3))
    return [new, old, advantages]


@trap("policy_loss", naive_multiplied_loss)
def nan_under_a_mask(op: Op, device: str) -> None:
    arguments = _policy_case(device)
    mask = torch.ones(3, 7, dtype=torch.bool, device=device)
    mask[1, 2:5] = False
    wanted = loss_and_gradient(op, *arguments, mask)
    for x in arguments:
        x[1, 2:5] = NAN
    for x, y in zip(loss_and_gradient(op, *arguments, mask), wanted, strict=True):
        assert bool(x.isfinite().all())
        assert_same_bits(x, y)


@trap("policy_loss", naive_multiplied_loss)
def nothing_valid(op: Op, device: str) -> None:
    mask = torch.zeros(3, 7, dtype=torch.bool, device=device)
    for x in loss_and_gradient(op, *_policy_case(device), mask):
        assert bool((x == 0).all())


@trap("policy_loss", naive_multiplied_loss)
def a_mask_of_other_numbers_is_no_weight(op: Op, device: str) -> None:
    """bool, int and float masks: nonzero is valid, whatever the number."""
    arguments = _policy_case(device)
    mask = torch.arange(21, device=device).view(3, 7) % 3
    wanted = loss_and_gradient(op, *arguments, mask > 0)
    for other in (mask, mask.int(), 0.25 * mask, -mask.float(), 256 * mask):  # 256 is 0 in a byte
        for x, y in zip(loss_and_gradient(op, *arguments, other), wanted, strict=True):
            assert_same_bits(x, y)


@trap("policy_loss", naive_multiplied_loss)
def log_ratios_of_100_and_1e4(op: Op, device: str) -> None:
    new, old, advantages = _policy_case(device)
    new[0, 0], new[2, 3] = 100.0, 1e4
    advantages[0, 0], advantages[2, 3] = -1.0, -1.0  # the unclipped branch
    mask = torch.ones(3, 7, dtype=torch.bool, device=device)
    for x in loss_and_gradient(op, new, old, advantages, mask):
        assert bool(x.isfinite().all())


def naive_shuffled_sum(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """What adds as its threads arrive: atomics, or locks."""
    terms = (-advantages * (logprobs - old_logprobs).exp())[mask]
    total = terms.new_zeros(())
    for chunk in terms[torch.randperm(terms.numel())].split(64):
        total = total + chunk.sum()
    return total / mask.sum(), {}


@trap("policy_loss", naive_shuffled_sum)
def run_after_run_the_same_bits(op: Op, device: str) -> None:
    arguments = [noise(40, 64, seed=s).to(device) for s in range(3)]
    mask = torch.ones(40, 64, dtype=torch.bool, device=device)
    torch.manual_seed(0)
    first, *others = (loss_and_gradient(op, *arguments, mask)[0] for _ in range(5))
    for x in others:
        assert_same_bits(x, first)


def naive_values(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    clipped = torch.minimum(torch.maximum(values, old_values - 0.2), old_values + 0.2)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    loss = 0.5 * (errors * mask).sum() / mask.sum()
    left = (((returns - values) * mask) ** 2).sum() / mask.sum()
    mean = (returns * mask).sum() / mask.sum()
    variance = (returns**2 * mask).sum() / mask.sum() - mean**2
    return loss, {"explained_variance": 1 - left / variance}


@trap("value_loss", naive_values)
def explained_variance_at_1e4(op: Op, device: str) -> None:
    """The squares' mean less the mean's square has nothing left of a variance of 1."""
    returns = (noise(4, 50) + 1e4).to(device)
    values = returns + 0.5 * noise(4, 50, seed=1).to(device)
    mask = torch.ones(4, 50, dtype=torch.bool, device=device)
    _, stats = op(values, values, returns, mask)
    left = (returns.double() - values.double()).var(correction=0)
    wanted = 1 - left / returns.double().var(correction=0)
    close(stats["explained_variance"], wanted, 1e-4)


@trap("value_loss", naive_values)
def values_of_nan_under_a_mask(op: Op, device: str) -> None:
    x = noise(3, 9).to(device)
    mask = torch.arange(27, device=device).view(3, 9) % 4 > 0
    wanted = loss_and_gradient(op, x, x + 0.1, x - 0.3, mask)
    spoilt = [y.masked_fill(~mask, NAN) for y in (x, x + 0.1, x - 0.3)]
    for a, b in zip(loss_and_gradient(op, *spoilt, mask), wanted, strict=True):
        assert_same_bits(a, b)


# ---- divergences


def naive_k3(logprobs: Tensor, ref_logprobs: Tensor, **_: Any) -> Tensor:
    d = logprobs - ref_logprobs
    return (-d).exp() - 1 + d


@trap("kl_penalty", naive_k3)
def k3_at_gaps_of_100_and_1e4(op: Op, device: str) -> None:
    x = torch.tensor([-100.0, -1e4, 0.0, 0.0], device=device).requires_grad_()
    y = torch.tensor([0.0, 0.0, -100.0, -1e4], device=device).requires_grad_()
    kl = op(x, y, estimator="k3")
    gradients = torch.autograd.grad(kl.sum(), (x, y))
    assert all(bool(z.isfinite().all()) for z in (kl, *gradients))
    assert bool((kl > 0).all())
    close(kl[2:], torch.tensor([99.0, 9999.0]))


@trap("kl_penalty", naive_k3)
def k3_close_to_zero(op: Op, device: str) -> None:
    d = torch.tensor([1e-4, -1e-4, 3e-3], device=device)
    wanted = torch.expm1(-d.double()) + d.double()
    close(op(d, torch.zeros_like(d), estimator="k3"), wanted, 1e-3)


def naive_divergence(p_logits: Tensor, q_logits: Tensor, **_: Any) -> Tensor:
    logp, logq = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)  # 0 * -inf


@trap("kl_divergence", naive_divergence)
def tokens_that_p_never_takes(op: Op, device: str) -> None:
    p = torch.tensor([[0.0, 0.0, -INF, -INF]], device=device)
    q = torch.tensor([[0.0, 0.0, 0.0, 0.0]], device=device)
    close(op(p, q), torch.tensor([0.6931471805599453]))


def naive_log_sigmoid(scores: Tensor, ranks: Tensor, group_sizes: Tensor, **_: Any) -> Any:
    """LogExp written out: log(1 + exp(-gap)) of the better over the worse."""
    return (1 + (scores[1] - scores[0]).exp()).log(), {}


@trap("ranking_loss", naive_log_sigmoid)
def log_exp_at_gaps_of_100_and_1e4(op: Op, device: str) -> None:
    ranks, sizes = torch.tensor([1, 2], device=device), torch.tensor([2], device=device)
    for gap in (100.0, 1e4):
        for sign, loss, slope in ((1.0, 0.0, 0.0), (-1.0, gap, -1.0)):
            scores = torch.tensor([sign * gap, 0.0], device=device)
            found, gradient = loss_and_gradient(op, scores, ranks, sizes)
            close(found, torch.tensor(loss), absolute=1e-20)
            close(gradient[0], torch.tensor(slope), absolute=1e-20)


def naive_order(scores: Tensor, ranks: Tensor, group_sizes: Tensor, **_: Any) -> Any:
    """The better of two by a difference, which wraps around."""
    margin = torch.where(ranks[0] - ranks[1] < 0, 1.0, -1.0) * (scores[0] - scores[1])
    return torch.nn.functional.softplus(-margin), {}


@trap("ranking_loss", naive_order)
def ranks_at_the_ends_of_int64(op: Op, device: str) -> None:
    sizes = torch.tensor([2], device=device)
    scores = torch.tensor([1.0, 0.0], device=device)
    for low, high in ((-(2**63), 2**63 - 1), (-2, 2**63 - 1), (2**31 - 1, 2**31), (0, 2**32)):
        ranks = torch.tensor([low, high], device=device)
        loss, gradient = loss_and_gradient(op, scores, ranks, sizes)
        close(loss, torch.tensor(0.31326168751822286))
        close(gradient, torch.tensor([-0.2689414213699951, 0.2689414213699951]))


@trap("ranking_loss", naive_log_sigmoid)
def infinite_scores(op: Op, device: str) -> None:
    ranks, sizes = torch.tensor([1, 2], device=device), torch.tensor([2], device=device)
    for first, second, loss, slope in (
        (INF, 0.0, 0.0, 0.0),
        (0.0, -INF, 0.0, 0.0),
        (-INF, 0.0, INF, -1.0),
        (0.0, INF, INF, -1.0),
    ):
        scores = torch.tensor([first, second], device=device)
        found, gradient = loss_and_gradient(op, scores, ranks, sizes)
        close(found, torch.tensor(loss))
        close(gradient, torch.tensor([slope, -slope]))


# ---- rollouts


def naive_gae(rewards: Tensor, values: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Masked steps multiplied away, not stepped over."""
    r, v = rewards * mask, values * mask
    advantages, last, following = torch.zeros_like(r), torch.zeros_like(r[:, 0]), 0.0
    for t in reversed(range(r.shape[1])):
        last = r[:, t] + following - v[:, t] + 0.95 * last
        following = v[:, t]
        advantages[:, t] = last
    return advantages * mask, (advantages + v) * mask


@trap("gae", naive_gae)
def masked_steps_are_cut_out(op: Op, device: str) -> None:
    rewards, values = (noise(2, 9, seed=s).to(device) for s in (0, 1))
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[0, 3:5] = False
    for finite in (True, False):
        if not finite:
            rewards[~mask], values[~mask] = NAN, INF
        advantages, returns = op(rewards, values, mask)
        kept = mask[0]
        r, v = rewards[:1, kept], values[:1, kept]
        alone, _ = op(r, v, mask[:1, kept])
        # An advantage is a sum of terms, which may cancel and are added in any order.
        terms = float(max(r.abs().max(), v.abs().max()))
        close(advantages[0, kept], alone[0], absolute=1e-6 * terms)
        assert bool((advantages[~mask] == 0).all())
        assert bool(returns.isfinite().all())


def naive_two_masks(
    rewards: Tensor, values: Tensor, mask: Tensor, *, value_mask: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Right for numbers: what does not count is multiplied away."""
    advantages, _ = naive_gae(rewards * mask, values * value_mask, torch.ones_like(rewards))
    return advantages * mask, (advantages + values * value_mask) * value_mask


@trap("gae", naive_two_masks)
def nan_under_one_of_two_masks(op: Op, device: str) -> None:
    """A reward is spoilt where only the value counts, and the other way round."""
    rewards, values = (noise(5, 9, seed=s).to(device) for s in (0, 1))
    mask = torch.arange(45, device=device).view(5, 9) % 3 > 0
    value_mask = mask.roll(1, -1)
    value_mask[1], value_mask[3] = False, True
    masks = {"mask": mask, "masked": "decay", "value_mask": value_mask}
    wanted = op(rewards, values, **masks)
    assert not bool(wanted[1][~value_mask].any())
    spoilt = (rewards.masked_fill(~mask, NAN), values.masked_fill(~value_mask, NAN))
    for other in (value_mask, 256 * value_mask.int(), -0.25 * value_mask.float()):
        for x, y in zip(op(*spoilt, **masks | {"value_mask": other}), wanted, strict=True):
            assert_same_bits(x, y)


def naive_whiten(x: Tensor, mask: Tensor, **_: Any) -> Tensor:
    mean = (x * mask).sum() / mask.sum()
    variance = (x**2 * mask).sum() / mask.sum() - mean**2
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


@trap("whiten", naive_whiten)
def variance_at_1e4(op: Op, device: str) -> None:
    x = noise(8, 40) + 1e4
    mask = torch.ones(8, 40, dtype=torch.bool)
    y = x.double() - x.double().mean()
    close(op(x.to(device), mask.to(device)), y / y.square().mean().sqrt(), 1e-4, 1e-4)


@trap("whiten", naive_whiten)
def none_valid_and_one(op: Op, device: str) -> None:
    x, mask = noise(3, 4).to(device), torch.zeros(3, 4, device=device)
    assert bool((op(x, mask) == 0).all())
    mask[1, 2] = 1
    assert bool((op(x, mask) == 0).all())


def naive_shaping(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float, **_: Any) -> Tensor:
    rewards = -beta * kl * mask
    last = mask.long().sum(1) - 1  # of a mask without holes
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


@trap("shape_rewards", naive_shaping)
def the_last_token_after_a_hole_and_no_token(op: Op, device: str) -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], device=device)
    kl = torch.ones(3, 4, device=device).masked_fill(mask == 0, NAN)
    rewards = op(torch.tensor([5.0, 6.0, 7.0], device=device), kl, mask, beta=0.5)
    wanted = [[-0.5, 0.0, 4.5, 0.0], [0.0] * 4, [0.0, -0.5, -0.5, 6.5]]
    close(rewards, torch.tensor(wanted))


def naive_one_hot(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float, **_: Any) -> Tensor:
    """Right for numbers: the score times 1 at its token, times 0 elsewhere."""
    zeros = torch.zeros_like(scores)
    at = shape_rewards_ref(torch.ones_like(scores), torch.zeros_like(kl), mask, beta=beta)
    return shape_rewards_ref(zeros, kl, mask, beta=beta) + at * scores[:, None]


@trap("shape_rewards", naive_one_hot)
def a_score_that_is_no_number_stays_at_its_token(op: Op, device: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], device=device)
    kl = noise(4, 4).to(device)
    wanted = op(torch.zeros(4, device=device), kl, mask, beta=0.5)
    rewards = op(torch.tensor([NAN, INF, -INF, NAN], device=device), kl, mask, beta=0.5)
    last = torch.zeros(4, 4, dtype=torch.bool, device=device)
    last[0, 2] = last[1, 3] = last[2, 1] = True
    assert_same_bits(rewards[~last], wanted[~last])
    close(rewards[last], torch.tensor([NAN, INF, -INF]), nan=True)
