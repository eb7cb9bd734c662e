"""Log-probabilities of labels, and the entropy, from hidden states and the output head.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
    logprobs, entropy = as in logprobs_from_logits

Shapes: hidden (..., H), weight (V, H), bias (V), labels (...). Dtypes: fp32, bf16, fp16 or fp64;
arithmetic and results are fp32, or fp64 if an argument is. Gradients reach hidden, weight and bias
through both results.

Promises: those of logprobs_from_logits, for the logits above, but that a row's bits may depend on
the batch as far as the bits of a matrix product do. Backends other than `ref` never hold (N, V),
but pieces of 2048 x 4096 logits, and compute them again in the backward pass: four matrix products
in all; where no gradient is asked for nothing is kept, and the bits are the same. They use torch's
own products (see _linear.py for their dtypes) and fuse what lies between.

group: `weight` and `bias` are this rank's contiguous shard of the vocabulary, in rank order, shards
may be uneven; `hidden` and `labels` are the same on every rank, labels are global. Every rank
gets the same result; the gradients of weight and bias are the shard's own, that of hidden is summed
over the ranks here.

Source: cut cross-entropy, Wijmans et al. 2024 (never holding the logits); vocabulary-parallel
cross-entropy, Shoeybi et al. 2019 (group).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ._backends import choose
from ._checks import (
    check_device,
    check_dims,
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
from ._groups import Group, copy_to_group, shard_range
from ._library import register, register_backward
from ._linear import gather_rows, linear_backward, linear_forward, scatter_rows
from ._logprob_rows import aot_configs, refuse_bad_labels
from .logprobs_from_logits import check_temperature, rows_ref

# The tiles' logits are fp32; their gradients have the operands' dtype.
AOT_CONFIGS = [
    *aot_configs("*fp32", "*bf16", head=True),
    *aot_configs("*fp32", "*fp32", head=True)[1:],
]


def linear_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification; arguments as in `linear_logprobs`."""
    dtype = compute_dtype(hidden, weight)
    H = hidden.shape[-1]
    h = copy_to_group(hidden.reshape(labels.numel(), H).to(dtype), group)
    valid = (labels != ignore_index).reshape(-1, 1)
    h = torch.where(valid, h, 0.0)  # ignored rows reach neither values nor gradients
    with torch.autocast(hidden.device.type, enabled=False):
        z = h @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if logit_scale != 1.0:
        z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().reshape(-1, 1).to(dtype)
    first, _ = shard_range(weight.shape[0], weight.device, group)
    logprobs, entropy = rows_ref(
        z, labels.reshape(-1, 1) - first, valid, temperature, group=group, first=first
    )
    logprobs = logprobs.reshape(labels.shape)
    return (logprobs, entropy.reshape(labels.shape)) if return_entropy else logprobs


def _group(name: str) -> Group | None:
    """The process group of a name: an op's arguments are tensors, numbers and strings."""
    if name == "":
        return None
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def _results(
    hidden: Tensor, weight: Tensor, return_entropy: bool, with_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for log-probs, entropy and the rows' states, empty where not asked for; the fake too."""
    dtype = compute_dtype(hidden, weight)
    N = hidden.shape[0]
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(N if return_entropy else 0, dtype=dtype),
        hidden.new_empty(3 * N if with_states else 0, dtype=dtype),
    )


def _forward(
    backend: str,
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    return_entropy: bool,
    with_states: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_logprobs"
    first, V, group = 0, weight.shape[0], _group(group_name)
    if group is not None:
        first, V = (int(x) for x in shard_range(V, weight.device, group))
    labels = labels.to(torch.int64).contiguous()
    refuse_bad_labels(op, labels, V, ignore_index)
    if temperatures is not None:
        check_values(op, "temperature", temperatures > 0, "above 0")
    rows = gather_rows(
        hidden, weight, bias, labels, temperatures, temperature, logit_scale, softcap, ignore_index
    )
    logprobs, entropy, gathered = linear_forward(
        backend, rows, weight, entropy=return_entropy, keep=with_states, first=first, group=group
    )
    N = labels.numel()
    states = gathered if with_states else gathered.new_empty(0)
    if with_states and gathered.numel() < 3 * N:
        states = gathered.new_zeros(3 * N)
        states[: gathered.numel()] = gathered
    return (
        scatter_rows(logprobs, rows.places, N),
        logprobs.new_empty(0) if entropy is None else scatter_rows(entropy, rows.places, N),
        states,
    )


def _backward(
    backend: str,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    states: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    group = _group(group_name)
    first = 0 if group is None else int(shard_range(weight.shape[0], weight.device, group)[0])
    N = labels.numel()
    if states.numel() != 3 * N:
        raise RuntimeError("linear_logprobs: called without states, so it has no gradient")
    rows = gather_rows(
        hidden, weight, bias, labels, temperatures, temperature, logit_scale, softcap, ignore_index
    )
    if grad_logprobs is None:
        grad_logprobs = states.new_zeros(N)
    if rows.places is not None:
        grad_logprobs = grad_logprobs[rows.places]
        grad_entropy = None if grad_entropy is None else grad_entropy[rows.places]
    dh, dw, db = linear_backward(
        backend, rows, weight, states, grad_logprobs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        first=first, needs=(need_hidden, need_weight, need_bias),
    )  # fmt: skip
    if dh is not None:
        if group is not None:
            dist.all_reduce(dh, group=group)
        dh = scatter_rows(dh, rows.places, N).to(hidden.dtype)
    absent = states.new_empty(0)
    return (
        absent if dh is None else dh,
        absent.clone() if dw is None else dw,
        absent.clone() if db is None or bias is None else db.to(bias.dtype),
    )


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(hidden, weight, return_entropy=rest[5], with_states=rest[6])


def _backward_fake(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    states: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[5:8]
    dense = torch.contiguous_format
    absent = states.new_empty(0)
    return (
        torch.empty_like(hidden, memory_format=dense) if need_hidden else absent,
        torch.empty_like(weight, memory_format=dense) if need_weight else absent.clone(),
        absent.clone() if not need_bias or bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, *settings, return_entropy, _, group, backend = (
        inputs
    )
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, states, temperatures)
    ctx.settings, ctx.return_entropy, ctx.last = settings, return_entropy, (group, backend)


def _gradients(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
) -> tuple[Any, ...]:
    if not ctx.return_entropy:
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 12
    # The first of Function.apply's arguments is not the op's: it is the dispatcher's key set.
    needs = ctx.needs_input_grad[1:4]
    gradients = _linear_logprobs_backward(
        grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, *needs, *ctx.last
    )
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 9)


IMPLEMENTATIONS = {name: partial(_forward, name) for name in ("cpu", "triton")}

_linear_logprobs = register(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor? temperatures, float temperature, float logit_scale, float softcap, int ignore_index, "
    "bool return_entropy, bool with_states, str group, str backend) -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)
_linear_logprobs_backward = register_backward(
    "linear_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor? bias, Tensor labels, Tensor states, Tensor? temperatures, "
    "float temperature, float logit_scale, float softcap, int ignore_index, bool need_hidden, "
    "bool need_weight, bool need_bias, str group, str backend) -> (Tensor, Tensor, Tensor)",
    {name: partial(_backward, name) for name in ("cpu", "triton")},
    _backward_fake,
)


def check_linear(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float | Tensor,
) -> None:
    """Shapes, dtypes, devices and settings that the linear ops share."""
    check_float(op, "hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{op}: hidden must have shape (..., H), got {tuple(hidden.shape)}")
    check_float(op, "weight", weight)
    check_dims(op, "weight", weight, 2, "(V, H)")
    check_shape(op, "weight", weight, (weight.shape[0], hidden.shape[-1]))
    check_device(op, "weight", weight, hidden.device)
    check_integer(op, "labels", labels)
    check_shape(op, "labels", labels, hidden.shape[:-1])
    check_device(op, "labels", labels, hidden.device)
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, weight.shape[:1])
        check_device(op, "bias", bias, hidden.device)
    check_number(op, "logit_scale", logit_scale)
    check_finite(op, "logit_scale", logit_scale)
    if softcap is not None:
        check_number(op, "softcap", softcap, low=0.0, open_low=True)
        check_finite(op, "softcap", softcap)
    check_temperature(op, temperature, labels.shape, hidden.device)


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = ...,
    logit_scale: float = ..., softcap: float | None = ..., temperature: float | Tensor = ...,
    ignore_index: int = ..., return_entropy: Literal[False] = ..., group: Group | None = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = ...,
    logit_scale: float = ..., softcap: float | None = ..., temperature: float | Tensor = ...,
    ignore_index: int = ..., return_entropy: Literal[True], group: Group | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,  # number or (...)
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: Group | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `labels` under the head's softmax, without holding the logits.

    Args:
        hidden: (..., H), fp32, bf16, fp16 or fp64.
        weight: (V, H), the head's weight; with `group` this rank's shard of it.
        labels: (...), int64 or int32, in [0, V) or equal to `ignore_index`.
        bias: (V), the head's bias.
        logit_scale: multiplies the logits before softcap.
        softcap: c in c * tanh(logits / c), above 0.
        temperature: above 0; a number, or one a row, (...); no gradient goes to it.
        ignore_index: the label that marks a row without one.
        return_entropy: also return the entropy of each row, in nats.
        group: process group over which the vocabulary is split; labels are global.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        Log-probs (...), in nats, and with `return_entropy` the entropy (...); fp32, or fp64 if an
        argument is. Differentiable in hidden, weight and bias; a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
        IndexError: a label is out of range (CPU tensors; on a GPU with FASTRLHF_DEBUG=1).
    """
    op = "linear_logprobs"
    check_linear(op, hidden, weight, labels, bias, logit_scale, softcap, temperature)
    check_int(op, "ignore_index", ignore_index)
    check_flag(op, "return_entropy", return_entropy)
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have shape (V, H), V >= 1, got {tuple(weight.shape)}")
    backend = choose(op, (hidden, weight), backend, IMPLEMENTATIONS)
    if backend == "ref":
        if isinstance(temperature, Tensor):
            check_values(op, "temperature", temperature > 0, "above 0")
        _, V = shard_range(weight.shape[0], weight.device, group)
        check_labels(op, labels, int(V), ignore_index)
        return linear_logprobs_ref(
            hidden,
            weight,
            labels,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            group=group,
        )
    if isinstance(temperature, Tensor):
        number, per_row = 1.0, temperature.detach().reshape(-1)
    else:
        number, per_row = float(temperature), None
    shape = labels.shape
    logprobs, entropy, _ = _linear_logprobs(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        per_row,
        number,
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        ignore_index,
        return_entropy,
        torch.is_grad_enabled()
        and (
            hidden.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        ),
        "" if group is None else group.group_name,
        backend,
    )
    logprobs = logprobs if len(shape) == 1 else logprobs.reshape(shape)
    if not return_entropy:
        return logprobs
    return logprobs, entropy if len(shape) == 1 else entropy.reshape(shape)
