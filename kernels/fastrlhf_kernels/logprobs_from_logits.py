"""Log-probabilities of labels, and the entropy, from logits.

    z        = softcap * tanh(logits / softcap)                     (softcap given)
    logprob  = z_y / T - log sum_j exp(z_j / T)  = -softplus(r),
               r = log sum_{j != y} exp((z_j - z_y) / T)
    entropy  = -sum_j p_j log p_j,  p = softmax(z / T),  0 log 0 = 0

Shapes: logits (..., V), V >= 1; labels (...) or (..., K), K labels a row; temperature T > 0 is a
number or one a row (...). Dtypes: logits fp32, bf16, fp16 or fp64; arithmetic and results are fp32,
or fp64 for fp64 logits. Gradients reach the logits through both results, and nothing else.

Promises:
- A label equal to `ignore_index` gives log-prob 0 and no gradient, whatever its row holds. The
  entropy of a row all of whose labels are ignored is 0, without gradient.
- The form -softplus(r) keeps the relative precision of log-probs close to 0; the log-prob is never
  positive.
- The maximum is subtracted before scaling by 1 / T, so large offsets cost nothing.
- A row's bits do not depend on the batch, and linear_logprobs and sample give the same bits for
  equal logits, on each backend but `ref`.
- -inf logits are tokens of probability 0. A valid row of nothing but -inf, or with a NaN or a +inf,
  is NaN in all that it gives, and harms no other row.

Source: the log-probabilities of InstructGPT's objective, Ouyang et al. 2022, section 3.5; softcap:
Gemma 2; the split of the maximum from the log-sum: Milakov and Gimelshein 2018.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._backends import choose
from ._checks import (
    check_device,
    check_finite,
    check_flag,
    check_float,
    check_int,
    check_integer,
    check_labels,
    check_number,
    check_shape,
    check_values,
    compute_dtype,
)
from ._groups import Group, copy_to_group, reduce_max, reduce_min_index, reduce_sum
from ._library import register, register_backward
from ._logprob_rows import Head, aot_configs, backward_rows, forward_rows, refuse_bad_labels
from ._native import with_unit_stride


def rows_ref(
    z: Tensor,  # (N, V), fp32 or fp64, softcap applied
    labels: Tensor,  # (N, K), relative to the first column of z
    valid: Tensor,  # (N, K) bool
    temperature: float | Tensor,  # number or (N, 1)
    *,
    group: Group | None = None,
    first: Tensor | int = 0,  # global index of z's first column
) -> tuple[Tensor, Tensor]:  # (N, K) log-probs, (N,) entropy
    """The row routine that every op with log-probs follows; z may be one rank's shard of V."""
    N, V = z.shape
    some = valid.any(-1, keepdim=True)
    z = torch.where(some, z, 0.0)  # before any arithmetic: NaN stays out of values and gradients
    top = reduce_max(z.amax(-1, keepdim=True), group)
    z = torch.where(top == torch.inf, z + torch.nan, z)
    columns = torch.arange(V, device=z.device)

    logprobs = []
    for k in range(labels.shape[1]):
        is_label = columns == torch.where(valid[:, k], labels[:, k], 0 - first)[:, None]
        rest = torch.where(is_label, -torch.inf, z)
        m = reduce_max(rest.amax(-1, keepdim=True), group)
        m = torch.where(m == -torch.inf, 0.0, m)
        total = reduce_sum(((rest - m) / temperature).exp().sum(-1, keepdim=True), group)
        empty = total == 0.0
        log_total = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log())
        z_label = reduce_sum(torch.where(is_label, z, 0.0).sum(-1, keepdim=True), group)
        gap = (m - z_label) / temperature + log_total
        # threshold 50: past it, log1p(exp(x)) is x in fp64 too
        logprob = -softplus(gap, threshold=50.0)[:, 0]
        logprobs.append(torch.where(valid[:, k], logprob, 0.0))

    # The first maximum, differentiable: exp(0) = 1 is kept out of the sum, so that log1p keeps the
    # precision of an entropy close to 0.
    at_top = torch.where(z.detach() == top, columns + first, 2**62).amin(-1, keepdim=True)
    is_top = columns + first == reduce_min_index(at_top, group)
    z_top = reduce_sum(torch.where(is_top, z, 0.0).sum(-1, keepdim=True), group)
    z_top = copy_to_group(z_top, group)  # each rank uses it for its own columns: gradients add up
    d = (z - z_top) / temperature
    weights = d.exp()
    rest_total = reduce_sum(torch.where(is_top, 0.0, weights).sum(-1), group)
    weighted = reduce_sum(
        (weights * torch.where(d == -torch.inf, 0.0, d)).sum(-1), group
    )  # 0 log 0 = 0
    entropy = rest_total.log1p() - weighted / (1.0 + rest_total)
    entropy = torch.where(top[:, 0] == -torch.inf, torch.nan, entropy)
    entropy = torch.where(top[:, 0].isnan(), torch.nan, entropy)
    entropy = torch.where(some[:, 0], entropy, 0.0)
    stacked = torch.stack(logprobs, 1) if logprobs else z.new_zeros(N, 0)
    return stacked, entropy


def logprobs_from_logits_ref(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification; arguments as in `logprobs_from_logits`."""
    V = logits.shape[-1]
    rows = logits.shape[:-1]
    N = rows.numel()
    flat_labels = labels.reshape(N, labels.shape[-1] if labels.dim() == logits.dim() else 1)
    valid = flat_labels != ignore_index
    z = logits.reshape(N, V).to(compute_dtype(logits))
    z = torch.where(valid.any(-1, keepdim=True), z, 0.0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().reshape(N, 1).to(z.dtype)
    logprobs, entropy = rows_ref(z, flat_labels, valid, temperature)
    logprobs = logprobs.reshape(labels.shape)
    return (logprobs, entropy.reshape(rows)) if return_entropy else logprobs


AOT_CONFIGS = [
    config for x in ("*fp32", "*bf16") for config in aot_configs(x, x, head=False)
]  # fmt: skip


def _results(logits: Tensor, labels: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for log-probs, entropy (empty if not asked for) and the rows' state; the fake too."""
    dtype = compute_dtype(logits)
    rows = logits.shape[:-1]
    N = rows[0] if len(rows) == 1 else rows[0] * rows[1]
    return (
        logits.new_empty(labels.shape, dtype=dtype),
        logits.new_empty(rows if return_entropy else (0,), dtype=dtype),
        logits.new_empty((3, N), dtype=dtype),
    )


def _forward(
    backend: str,
    logits: Tensor,  # (N, V) or (B, R, V)
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy, state = _results(logits, labels, return_entropy)
    x = with_unit_stride(logits)
    y = labels.to(torch.int64).contiguous()
    refuse_bad_labels("logprobs_from_logits", y, x.shape[-1], ignore_index)
    if temperatures is not None:
        check_values("logprobs_from_logits", "temperature", temperatures > 0, "above 0")
        temperatures = temperatures.to(logprobs.dtype).contiguous()
    head = Head(temperature, temperatures, 1.0, softcap, None, ignore_index)
    forward_rows(backend, x, y, head, state, logprobs, entropy if return_entropy else None)
    return logprobs, entropy, state


def _backward(
    backend: str,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    dx = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if temperatures is not None:
        temperatures = temperatures.to(state.dtype).contiguous()
    if grad_logprobs is None:
        grad_logprobs = state.new_zeros(labels.shape)
    backward_rows(
        backend,
        with_unit_stride(logits),
        labels.to(torch.int64).contiguous(),
        Head(temperature, temperatures, 1.0, softcap, None, ignore_index),
        state,
        grad_logprobs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        dx.view(-1, dx.shape[-1]),
    )
    return dx


def _forward_fake(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(logits, labels, return_entropy)


def _backward_fake(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperatures, *settings, return_entropy, backend = inputs
    state = output[2]
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, temperatures, state)
    ctx.settings, ctx.return_entropy, ctx.backend = settings, return_entropy, backend


def _gradients(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
) -> tuple[Any, ...]:
    if not ctx.return_entropy:
        grad_entropy = None
    none = (None,) * 6
    if grad_logprobs is None and grad_entropy is None:
        return (None, *none)
    logits, labels, temperatures, state = ctx.saved_tensors
    dx = _logprobs_backward(
        grad_logprobs, grad_entropy, logits, labels, state, temperatures, *ctx.settings, ctx.backend
    )
    return (dx, *none)


IMPLEMENTATIONS = {name: partial(_forward, name) for name in ("cpu", "triton")}

_logprobs = register(
    "logprobs_from_logits(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, "
    "float softcap, int ignore_index, bool return_entropy, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)
_logprobs_backward = register_backward(
    "logprobs_from_logits_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, "
    "Tensor labels, Tensor state, Tensor? temperatures, float temperature, float softcap, "
    "int ignore_index, str backend) -> Tensor",
    {name: partial(_backward, name) for name in ("cpu", "triton")},
    _backward_fake,
)


def check_temperature(
    op: str, temperature: float | Tensor, rows: torch.Size, device: torch.device
) -> None:
    """A number > 0, or a floating tensor of the rows' shape, all > 0."""
    if not isinstance(temperature, Tensor):
        check_number(op, "temperature", temperature, low=0.0, high=float("inf"), open_low=True)
        return
    check_float(op, "temperature", temperature)
    check_shape(op, "temperature", temperature, rows)
    check_device(op, "temperature", temperature, device)


@overload
def logprobs_from_logits(
    logits: Tensor, labels: Tensor, *, temperature: float | Tensor = ...,
    softcap: float | None = ..., ignore_index: int = ..., return_entropy: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def logprobs_from_logits(
    logits: Tensor, labels: Tensor, *, temperature: float | Tensor = ...,
    softcap: float | None = ..., ignore_index: int = ..., return_entropy: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def logprobs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...) or (..., K)
    *,
    temperature: float | Tensor = 1.0,  # number or (...)
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `labels` under softmax(softcap(logits) / temperature).

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64; any strides; not modified.
        labels: (...) or (..., K), int64 or int32, each in [0, V) or equal to `ignore_index`.
        temperature: above 0; a number, or one a row, (...); no gradient goes to it.
        softcap: c in c * tanh(logits / c), above 0; None leaves the logits as they are.
        ignore_index: the label that marks a slot without one.
        return_entropy: also return the entropy of each row, in nats.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the logits' device.

    Returns:
        Log-probs like `labels`, in nats, and with `return_entropy` the entropy (...); fp32, or fp64
        for fp64 logits. Differentiable in `logits` through both; a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
        IndexError: a label is out of range (CPU tensors; on a GPU with FASTRLHF_DEBUG=1).
    """
    op = "logprobs_from_logits"
    check_float(op, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits must have shape (..., V), got {tuple(logits.shape)}")
    check_integer(op, "labels", labels)
    check_device(op, "labels", labels, logits.device)
    rows = logits.shape[:-1]
    if labels.shape[: len(rows)] != rows or labels.dim() > len(rows) + 1:
        raise ValueError(
            f"{op}: labels must have shape {tuple(rows)} or {(*rows, 'K')}, "
            f"got {tuple(labels.shape)}"
        )
    check_temperature(op, temperature, rows, logits.device)
    if softcap is not None:
        check_number(op, "softcap", softcap, low=0.0, open_low=True)
        check_finite(op, "softcap", softcap)
    check_int(op, "ignore_index", ignore_index)
    check_flag(op, "return_entropy", return_entropy)
    backend = choose(op, (logits,), backend, IMPLEMENTATIONS)
    if backend == "ref":
        check_labels(op, labels, logits.shape[-1], ignore_index)
        if isinstance(temperature, Tensor):
            check_values(op, "temperature", temperature > 0, "above 0")
        return logprobs_from_logits_ref(
            logits,
            labels,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
    # Rows two dimensions deep, so that logits[:, :-1] is read where it lies.
    deep = len(rows)
    x = logits if deep in (1, 2) else logits.unsqueeze(0) if deep == 0 else logits.flatten(0, -3)
    if isinstance(temperature, Tensor):
        number, per_row = 1.0, temperature.detach()
    else:
        number, per_row = float(temperature), None
    logprobs, entropy, _ = _logprobs(
        x,
        labels,
        per_row,
        number,
        0.0 if softcap is None else float(softcap),
        ignore_index,
        return_entropy,
        backend,
    )
    if not return_entropy:
        return logprobs
    return logprobs, entropy if deep in (1, 2) else entropy.reshape(rows)
