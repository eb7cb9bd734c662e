"""Cross-entropy of labels from hidden states and the output head: the loss of SFT and of PPO-ptx.

    logits = softcap(logit_scale * (hidden @ weight.T + bias))
    loss   = -sum over valid rows of log softmax(logits)[label] / normalizer

Shapes: hidden (..., H), weight (V, H), bias (V), labels (...); loss is 0-d. Dtypes: fp32, bf16,
fp16 or fp64; arithmetic and the loss are fp32, or fp64 if hidden or weight is. `normalizer`
defaults to the number of valid rows; with none the loss is 0, and so are the gradients.

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
from ._checks import check_labels, check_normalizer, compute_dtype
from ._library import register, register_backward
from ._linear import (
    Rows,
    Scratch,
    gather_rows,
    multiply,
    scatter_rows,
    without_autocast,
)
from ._logprob_rows import aot_configs, backward_rows, forward_rows, refuse_bad_labels
from .linear_logprobs import check_linear, linear_logprobs_ref

# Logits held at a time: 128 MiB in fp32, but for LEAST_ROWS where they take more. Every chunk reads
# and writes the gradient of the whole weight, which that many rows of products hide. Not tuned.
CHUNK_ELEMENTS = 2**25
LEAST_ROWS = {"cpu": 256, "cuda": 1024}

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
    if normalizer is None:
        normalizer = (labels != ignore_index).sum().clamp(min=1)
    elif isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().to(logprobs.dtype)  # an fp64 count makes no fp64 loss
    return -logprobs.sum() / normalizer


def _gradient_rows(
    backend: str, rows: Rows, weight: Tensor, factor: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Log-probs (n,) and, with `factor` (0-d), the gradients of factor * their sum."""
    (n, H), V = rows.hidden.shape, weight.shape[0]
    logprobs = rows.hidden.new_empty(n, dtype=rows.sum_dtype)
    dh = logprobs.new_empty((n, H)) if needs[0] else None
    dw = None if not needs[1] else logprobs.new_empty((V, H)) if n else logprobs.new_zeros((V, H))
    db = logprobs.new_zeros(V) if needs[2] else None
    chunk = max(1, min(n, max(CHUNK_ELEMENTS // V, LEAST_ROWS[rows.hidden.device.type])))
    scratch = Scratch(rows, chunk, V)
    state = logprobs.new_empty(3 * chunk)
    upstream = None if factor is None else factor.to(rows.sum_dtype).expand(chunk).contiguous()
    with without_autocast(weight):
        w = weight.to(rows.hidden.dtype)
        for n0 in range(0, n, chunk):
            n1 = min(n, n0 + chunk)
            h, y = rows.hidden[n0:n1], rows.labels[n0:n1]
            z, dz = (scratch.piece(x, n1 - n0, V) for x in (scratch.z, scratch.dz))
            multiply(h, w.T, z)
            forward_rows(backend, z, y, rows.head, state, logprobs[n0:n1], None)
            if upstream is None:
                continue
            backward_rows(backend, z, y, rows.head, state, upstream[: n1 - n0], None, dz)
            if dw is not None:
                multiply(dz.T, h, dw, add=n0 > 0)
            if dh is not None:
                multiply(dz, w, dh[n0:n1])
            if db is not None:
                db += dz.sum(0, dtype=db.dtype)
    return logprobs, dh, dw, db


def _forward(
    backend: str,
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    normalizer: Tensor | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = labels.to(torch.int64).contiguous()
    refuse_bad_labels("linear_cross_entropy", labels, weight.shape[0], ignore_index)
    rows = gather_rows(hidden, weight, bias, labels, None, 1.0, logit_scale, softcap, ignore_index)
    if normalizer is None:
        # Not the count of gathered rows: under graph capture none are cut out.
        normalizer = (labels != ignore_index).sum().clamp(min=1)
    needs = (need_hidden, need_weight, need_bias)
    factor = -1.0 / normalizer.to(rows.sum_dtype)
    logprobs, dh, dw, db = _gradient_rows(
        backend, rows, weight, factor if any(needs) else None, needs
    )
    # fp64, since a sum over the batch should not lose what its terms keep.
    loss = (logprobs.sum(dtype=torch.float64) * factor.double()).to(rows.sum_dtype)
    absent = logprobs.new_empty(0)
    return (
        loss,
        absent if dh is None else scatter_rows(dh, rows.places, labels.numel()).to(hidden.dtype),
        absent.clone() if dw is None else dw.to(weight.dtype),
        absent.clone() if db is None or bias is None else db.to(bias.dtype),
    )


def _backward(
    backend: str, grad: Tensor, dh: Tensor, dw: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return dh * grad, dw * grad, db * grad


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    normalizer: Tensor | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=compute_dtype(hidden, weight))
    absent = loss.new_empty(0)
    dense = torch.contiguous_format
    return (
        loss,
        torch.empty_like(hidden, memory_format=dense) if need_hidden else absent,
        torch.empty_like(weight, memory_format=dense) if need_weight else absent.clone(),
        absent.clone() if not need_bias or bias is None else bias.new_empty(bias.shape),
    )


def _backward_fake(
    grad: Tensor, dh: Tensor, dw: Tensor, db: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dh), torch.empty_like(dw), torch.empty_like(db)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.needs, ctx.backend = inputs[8:11], inputs[11]


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    scaled = _scale_gradients(grad, *ctx.saved_tensors, ctx.backend)
    dh, dw, db = (g if need else None for g, need in zip(scaled, ctx.needs, strict=True))
    return (dh, dw, db, *(None,) * 8)


IMPLEMENTATIONS = {name: partial(_forward, name) for name in ("cpu", "triton")}

_linear_cross_entropy = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? normalizer, float logit_scale, float softcap, int ignore_index, bool need_hidden, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)
_scale_gradients = register_backward(
    "linear_cross_entropy_backward(Tensor grad, Tensor dh, Tensor dw, Tensor db, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    {name: partial(_backward, name) for name in ("cpu", "triton")},
    _backward_fake,
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
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().to(hidden.device)
    elif normalizer is not None:
        normalizer = torch.full((), normalizer, dtype=torch.float64, device=hidden.device)
    wanted = torch.is_grad_enabled()
    return _linear_cross_entropy(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        normalizer,
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        ignore_index,
        wanted and hidden.requires_grad,
        wanted and weight.requires_grad,
        wanted and bias is not None and bias.requires_grad,
        backend,
    )[0]
