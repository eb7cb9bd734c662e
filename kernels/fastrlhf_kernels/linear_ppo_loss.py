"""PPO's clipped loss, less an entropy bonus, from hidden states and the output head.

    logits   = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
    logp, S  = log softmax(logits)[label] and the entropy of softmax(logits), a row each
    loss     = policy_loss(logp, old_logprobs, advantages) - entropy_coef * sum of S / normalizer

Shapes: hidden (..., H), weight (V, H), bias (V); labels, old_logprobs, advantages, mask (...); loss
and stats are 0-d. Dtypes: fp32, bf16, fp16 or fp64; arithmetic and results are fp32, or fp64 if
hidden, weight, old_logprobs or advantages is. Gradients reach hidden, weight and bias. A row is
valid where `mask` is nonzero and its label is not -100; `normalizer`, of both parts, defaults to
the number of valid rows; with none loss, gradients and stats are 0, whatever it is.

Stats, over the valid rows of this call, whatever the normalizer: those of policy_loss
(clip_fraction, approx_kl, ratio_mean, ratio_max) and entropy, the mean of S, whatever
`entropy_coef`.

Promises: those of linear_logprobs and policy_loss. Rows that are not valid are cut out first: they
cost nothing, and what they hold, NaN included, reaches nothing; their labels are not checked.
Backends other than `ref` make the gradient in the forward pass, by chunks of rows: see
_linear_losses.py. So what linear_cross_entropy says of fp16 and loss scalers holds here too.

Source: Schulman et al. 2017, equations 7 and 9; the gradient made in the forward pass: Liger
kernel, Hsu et al. 2024.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._backends import choose
from ._checks import (
    as_mask,
    check_labels,
    check_like,
    check_normalizer,
    check_number,
    check_values,
    compute_dtype,
)
from ._library import register
from ._linear import gather_rows
from ._linear_losses import (
    constant_like,
    fake_gradients,
    finished_gradients,
    forward_with_gradient,
    gradients,
    inverse_normalizer,
    setup_context,
)
from ._logprob_rows import aot_configs, refuse_bad_labels
from ._losses import reference_loss, split_normalizer
from .linear_logprobs import check_linear, linear_logprobs_ref
from .policy_loss import IMPLEMENTATIONS as POLICY_LOSS
from .policy_loss import STATS as POLICY_STATS
from .policy_loss import policy_loss_ref

STATS = (*POLICY_STATS, "entropy")
IGNORE = -100  # the label that marks a row without one, as everywhere by default

# Whole rows of logits with their entropy; policy_loss ships the other kernels.
AOT_CONFIGS = [
    dataclasses.replace(
        config,
        constants={k: v or k in ("BEGIN", "END") for k, v in config.constants.items()},
    )
    for config in aot_configs("*fp32", "*bf16", head=True)
]


def linear_ppo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    entropy_coef: float = 0.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The specification; arguments as in `linear_ppo_loss`."""
    valid = labels != IGNORE if mask is None else (labels != IGNORE) & (mask != 0)
    if isinstance(temperature, Tensor):
        temperature = torch.where(valid, temperature.detach(), 1.0)
    logprobs, entropy = linear_logprobs_ref(
        hidden,
        weight,
        torch.where(valid, labels, IGNORE),
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=IGNORE,
        return_entropy=True,
    )
    loss, stats = policy_loss_ref(
        logprobs, old_logprobs, advantages, valid, clip=clip, normalizer=normalizer
    )
    n = valid.sum()
    total = entropy.sum().to(loss.dtype)
    if entropy_coef != 0.0:
        loss = loss - entropy_coef * reference_loss(total, n, n, normalizer)
    stats["entropy"] = total.detach() / n.clamp(min=1)
    return loss, stats


def _forward(
    backend: str,
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # (N,), as all that follow
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    normalizer: Tensor | None,
    normalizer_number: float | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    clip: float,
    entropy_coef: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    private: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "linear_ppo_loss"
    N, needs = labels.numel(), (need_hidden, need_weight, need_bias)
    labels = labels.to(torch.int64)
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORE)
    labels = labels.contiguous()
    refuse_bad_labels(op, labels, weight.shape[0], IGNORE)
    if temperatures is not None:
        check_values(op, "temperature", (temperatures > 0) | (labels == IGNORE), "above 0")
    rows = gather_rows(
        hidden, weight, bias, labels, temperatures, temperature, logit_scale, softcap, IGNORE
    )
    if rows.places is not None:
        old_logprobs, advantages = old_logprobs[rows.places], advantages[rows.places]
    # Under graph capture rows are not cut out.
    valid = rows.labels != IGNORE if hidden.is_cuda else None
    inverse = inverse_normalizer(normalizer, normalizer_number, labels, rows, IGNORE)

    def upstream(
        part: slice, logprobs: Tensor, entropies: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        _, _, gradient = POLICY_LOSS[backend](
            logprobs, old_logprobs[part], advantages[part], None if valid is None else valid[part],
            clip, None, 1.0, True,
        )  # fmt: skip
        gradient = (gradient * inverse).to(logprobs.dtype)
        if entropy_coef == 0.0 or entropies is None:
            return gradient, None
        return gradient, constant_like(entropies, inverse, -entropy_coef)

    logprobs, entropies, found = forward_with_gradient(
        backend, rows, weight, upstream if any(needs) else None, needs, entropy=True
    )
    assert entropies is not None
    loss, stats, _ = POLICY_LOSS[backend](
        logprobs, old_logprobs, advantages, valid, clip, normalizer, normalizer_number, False
    )
    # fp64, since a sum over the batch should not lose what its terms keep.
    total = entropies.sum(dtype=torch.float64)
    if entropy_coef != 0.0:
        loss = (loss.double() - total * inverse * entropy_coef).to(loss.dtype)
    count = max(rows.labels.numel(), 1) if valid is None else valid.sum().clamp(min=1)
    stats = torch.cat((stats[: len(POLICY_STATS)], (total / count).to(stats.dtype)[None]))
    return loss, stats, *finished_gradients(found, rows, N, (hidden, weight, bias))


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=compute_dtype(hidden, weight, old_logprobs, advantages))
    found = fake_gradients(hidden, weight, bias, rest[9:12])
    return loss, loss.new_empty(len(STATS)), *found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    setup_context(ctx, output, needs=inputs[15:18], private=inputs[18], backend=inputs[19])


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    return (*gradients(ctx, grad), *(None,) * 16)


IMPLEMENTATIONS = {name: partial(_forward, name) for name in ("cpu", "triton")}

_linear_ppo_loss = register(
    "linear_ppo_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? temperatures, "
    "Tensor? normalizer, float? normalizer_number, float temperature, float logit_scale, "
    "float softcap, float clip, float entropy_coef, bool need_hidden, bool need_weight, "
    "bool need_bias, bool private, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def linear_ppo_loss(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    old_logprobs: Tensor,  # (...)
    advantages: Tensor,  # (...)
    mask: Tensor | None = None,  # (...)
    *,
    clip: float = 0.2,
    entropy_coef: float = 0.0,
    bias: Tensor | None = None,  # (V)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,  # number or (...)
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss less an entropy bonus, without holding the logits; and its statistics.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64.
        weight: (V, H), the head's weight.
        labels: (...), int64 or int32: the tokens taken, in [0, V); -100 is not valid, as if masked.
        old_logprobs: (...), their log-probs at the time of the rollout, in nats.
        advantages: (...), the advantage of each token.
        mask: (...), bool, int or float; nonzero is valid; None: every row is.
        clip: half-width of the range of the ratio; at least 0.
        entropy_coef: what the mean entropy is multiplied by before it is subtracted.
        bias: (V), the head's bias.
        logit_scale: multiplies the logits before softcap.
        softcap: c in c * tanh(logits / c), above 0.
        temperature: above 0; a number, or one a row, (...); no gradient goes to it.
        normalizer: what the sums are divided by, a number or a 0-d tensor; default: the valid rows.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        (loss, stats): loss is 0-d, fp32, or fp64 if an argument is, and differentiable in hidden,
        weight and bias; a second derivative raises. Stats are detached 0-d tensors: clip_fraction,
        approx_kl, ratio_mean, ratio_max, entropy.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
        IndexError: a valid row's label is out of range (CPU tensors; on a GPU with
            FASTRLHF_DEBUG=1).
    """
    op = "linear_ppo_loss"
    check_linear(op, hidden, weight, labels, bias, logit_scale, softcap, temperature)
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have shape (V, H), V >= 1, got {tuple(weight.shape)}")
    check_like(op, "old_logprobs", old_logprobs, labels)
    check_like(op, "advantages", advantages, labels)
    valid = as_mask(op, "mask", mask, labels)
    check_number(op, "clip", clip, low=0.0)
    check_number(op, "entropy_coef", entropy_coef)
    check_normalizer(op, normalizer)
    backend = choose(op, (hidden, weight, old_logprobs, advantages), backend, IMPLEMENTATIONS)
    if backend == "ref":
        shown = labels if valid is None else torch.where(valid, labels, IGNORE)
        check_labels(op, shown, weight.shape[0], IGNORE)
        if isinstance(temperature, Tensor):
            check_values(op, "temperature", (temperature > 0) | (shown == IGNORE), "above 0")
        return linear_ppo_loss_ref(
            hidden,
            weight,
            labels,
            old_logprobs,
            advantages,
            valid,
            clip=clip,
            entropy_coef=entropy_coef,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            normalizer=normalizer,
        )
    if isinstance(temperature, Tensor):
        number, per_row = 1.0, temperature.detach().reshape(-1)
    else:
        number, per_row = float(temperature), None
    wanted = torch.is_grad_enabled()
    loss, stats, *_ = _linear_ppo_loss(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        old_logprobs.detach().reshape(-1),
        advantages.detach().reshape(-1),
        None if valid is None else valid.reshape(-1),
        per_row,
        *split_normalizer(normalizer),
        number,
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        float(clip),
        float(entropy_coef),
        wanted and hidden.requires_grad,
        wanted and weight.requires_grad,
        wanted and bias is not None and bias.requires_grad,
        True,
        backend,
    )
    return loss, dict(zip(STATS, stats.unbind(), strict=True))
