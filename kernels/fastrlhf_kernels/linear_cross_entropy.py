"""Cross-entropy of labels from hidden states and the output head: the loss of SFT and of PPO-ptx.

    logits = softcap(logit_scale * (hidden @ weight.T + bias))
    loss   = -sum over valid rows of log softmax(logits)[label] / normalizer

Shapes: hidden (..., H), weight (V, H), bias (V), labels (...); loss is 0-d. Dtypes: fp32, bf16,
fp16 or fp64; arithmetic and the loss are fp32, or fp64 if hidden or weight is. `normalizer`
defaults to the number of valid rows; with none the loss and the gradients are 0, whatever it is.

Promises: those of linear_logprobs. Backends other than `ref` make the gradient in the forward pass,
by chunks of rows, if an argument requires one (three matrix products, not four), and hold the
logits of a chunk alone. What is held between the passes is the gradient itself, in the arguments'
dtypes; the weight's is summed in fp32. The upstream gradient of the scalar only scales it, so that
with fp16 arguments a loss scaler cannot save what the division by a large normalizer has already
made too small for fp16: scale by the normalizer instead, or use bf16.

Source: Ouyang et al. 2022, section 3.5, the ptx term; the gradient made in the forward pass: Liger
kernel, Hsu et al. 2024.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._backends import choose
from ._checks import check_int, check_labels, check_normalizer, compute_dtype
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

# Whole rows of logits, and their gradients in the operands' dtype.
AOT_CONFIGS = aot_configs("*fp32", "*bf16", head=False)


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The specification; arguments as in `linear_cross_entropy`."""
    logprobs = linear_logprobs_ref(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    assert isinstance(logprobs, Tensor)
    valid = (labels != ignore_index).sum()
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(logprobs.dtype)  # an fp64 count makes no fp64 loss
    return reference_loss(-logprobs.sum(), valid, valid, normalizer)


def _forward(
    backend: str,
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    normalizer: Tensor | None,
    normalizer_number: float | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    private: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, needs = labels.numel(), (need_hidden, need_weight, need_bias)
    labels = labels.to(torch.int64).contiguous()
    refuse_bad_labels("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    rows = gather_rows(hidden, weight, bias, labels, None, 1.0, logit_scale, softcap, ignore_index)
    factor = inverse_normalizer(normalizer, normalizer_number, labels, rows, ignore_index)

    def upstream(part: slice, logprobs: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        return constant_like(logprobs, factor, -1.0), None

    logprobs, _, found = forward_with_gradient(
        backend, rows, weight, upstream if any(needs) else None, needs, entropy=False
    )
    # fp64, since a sum over the batch should not lose what its terms keep.
    loss = (logprobs.sum(dtype=torch.float64) * -factor).to(rows.sum_dtype)
    return loss, *finished_gradients(found, rows, N, (hidden, weight, bias))


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=compute_dtype(hidden, weight))
    return loss, *fake_gradients(hidden, weight, bias, rest[5:8])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    setup_context(ctx, output, needs=inputs[9:12], private=inputs[12], backend=inputs[13])


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    return (*gradients(ctx, grad), *(None,) * 10)


IMPLEMENTATIONS = {name: partial(_forward, name) for name in ("cpu", "triton")}

_linear_cross_entropy = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? normalizer, float? normalizer_number, float logit_scale, float softcap, "
    "int ignore_index, bool need_hidden, bool need_weight, bool need_bias, bool private, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean cross-entropy of `labels` under the head's softmax, without holding the logits.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64.
        weight: (V, H), the head's weight.
        labels: (...), int64 or int32, in [0, V) or equal to `ignore_index`.
        bias: (V), the head's bias.
        logit_scale: multiplies the logits before softcap.
        softcap: c in c * tanh(logits / c), above 0.
        ignore_index: the label that marks a row without one.
        normalizer: what the sum is divided by, a number or a 0-d tensor; default: the valid rows.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        The loss, 0-d, in nats; fp32, or fp64 if an argument is. Differentiable in hidden, weight
        and bias; a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
        IndexError: a label is out of range (CPU tensors; on a GPU with FASTRLHF_DEBUG=1).
    """
    op = "linear_cross_entropy"
    check_linear(op, hidden, weight, labels, bias, logit_scale, softcap, 1.0)
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have shape (V, H), V >= 1, got {tuple(weight.shape)}")
    check_int(op, "ignore_index", ignore_index)
    check_normalizer(op, normalizer)
    backend = choose(op, (hidden, weight), backend, IMPLEMENTATIONS)
    if backend == "ref":
        check_labels(op, labels, weight.shape[0], ignore_index)
        return linear_cross_entropy_ref(
            hidden,
            weight,
            labels,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            normalizer=normalizer,
        )
    wanted = torch.is_grad_enabled()
    return _linear_cross_entropy(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        *split_normalizer(normalizer),
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        ignore_index,
        wanted and hidden.requires_grad,
        wanted and weight.requires_grad,
        wanted and bias is not None and bias.requires_grad,
        True,
        backend,
    )[0]
