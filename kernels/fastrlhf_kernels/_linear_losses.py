"""Losses on the output head whose gradient is made in the forward pass: three products, not four.

A chunk of rows after the other:

    z = h @ weight.T         and the rows' log-probs and entropies
    upstream gradients       of these, given by the loss
    dz                       in place of z, then dW += dz.T @ h and dh = dz @ weight

All logits of a chunk are held, of no more rows than that. Every chunk reads the weight twice and
reads and writes dW once, which the products of enough rows hide. What is held between the passes is
the gradient itself; the upstream gradient of the scalar only scales it, in place where nobody else
can see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._library import register_backward
from ._linear import (
    Rows,
    Scratch,
    column_cuts,
    few,
    multiply,
    scatter_rows,
    slice_head,
    without_autocast,
)
from ._logprob_rows import backward_rows, forward_rows

# Logits held at a time, but for LEAST_ROWS where they take more. On a 2-core EPYC, 2048 x 512 x
# 50257: chunks of 344 rows took 1.14 times three bare products, of 512 rows (103 MB) 1.08. On an
# H200, 8192 x 4096 x 151936 in bf16 (bench/sweep.py): 1024 rows (930 MB) 1.34, 3534 rows 1.28.
CHUNK_ELEMENTS = {"cpu": 25 * 2**20, "cuda": 2**27}
LEAST_ROWS = {"cpu": 256, "cuda": 1024}

# (chunk of rows, its log-probs, its entropies or None) -> upstream gradients of the same.
Upstream = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
Needs = tuple[bool, bool, bool]  # of hidden, weight and bias


def chunk_rows(n: int, V: int, device: str) -> int:
    """Rows of a chunk: as equal as may be, a multiple of 8."""
    most = max(CHUNK_ELEMENTS[device] // V, LEAST_ROWS[device])
    if n <= most:
        return max(n, 1)
    chunks = -(-n // most)
    return min(-(-n // (8 * chunks)) * 8, most)


def inverse_normalizer(
    normalizer: Tensor | None, number: float | None, labels: Tensor, rows: Rows, ignore_index: int
) -> float | Tensor:
    """1 / what a sum is divided by, 0 where no row is valid: a number; an fp64 tensor on a GPU.

    On a CPU reading the tensor is free. On a GPU the count is not that of the gathered rows: under
    graph capture none are cut out.
    """
    if rows.hidden.is_cuda:
        valid = (labels != ignore_index).sum().double()
        divisor = valid if normalizer is None else normalizer.to(valid)
        return torch.where(valid > 0, 1.0 / (divisor if number is None else number), 0.0)
    n = rows.labels.numel()
    if normalizer is not None:
        number = float(normalizer)
    by = float(n) if number is None else number
    return 0.0 if n == 0 else 1.0 / by if by != 0.0 else math.inf


def constant_like(x: Tensor, factor: float | Tensor, sign: float) -> Tensor:
    """sign * factor, as dense as x."""
    if isinstance(factor, Tensor):
        return (factor * sign).to(x.dtype).expand_as(x).contiguous()
    return torch.full_like(x, factor * sign)


def forward_with_gradient(
    backend: str, rows: Rows, weight: Tensor, upstream: Upstream | None, needs: Needs, entropy: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Log-probs (n,), entropies (n,) or None, and the gradients of hidden, weight, bias or None.

    Without `upstream` no gradient is made; the bits of the others are the same.
    """
    (n, H), V = rows.hidden.shape, weight.shape[0]
    logprobs = rows.hidden.new_empty(n, dtype=rows.sum_dtype)
    entropies = torch.empty_like(logprobs) if entropy else None
    dh = logprobs.new_empty((n, H)) if needs[0] else None
    dw = logprobs.new_empty((V, H)) if needs[1] else None
    db = logprobs.new_zeros(V) if needs[2] else None
    if n == 0:
        return logprobs, entropies, (dh, None if dw is None else dw.zero_(), db)
    chunk = chunk_rows(n, V, rows.hidden.device.type)
    scratch = Scratch(rows, chunk, V)
    state = logprobs.new_empty(3 * chunk)
    cuts = column_cuts(V, weight)
    with without_autocast(weight), few(chunk, V):
        w = weight.to(rows.hidden.dtype)
        for n0 in range(0, n, chunk):
            n1 = min(n, n0 + chunk)
            h, y, part = rows.hidden[n0:n1], rows.labels[n0:n1], logprobs[n0:n1]
            part2 = None if entropies is None else entropies[n0:n1]
            head = slice_head(rows.head, n0, n1, 0, V)
            z, dz = scratch.pieces(n1 - n0, V)
            for cut in cuts:
                multiply(h, w[cut].T, z[:, cut])
            forward_rows(backend, z, y, head, state, part, part2)
            if upstream is None:
                continue
            grads = upstream(slice(n0, n1), part, part2)
            backward_rows(backend, z, y, head, state, *grads, dz)
            for cut in cuts:
                if dw is not None:
                    multiply(dz[:, cut].T, h, dw[cut], add=n0 > 0)
                if dh is not None:
                    multiply(dz[:, cut], w[cut], dh[n0:n1], add=cut.start > 0)
            if db is not None:
                db += dz.sum(0, dtype=db.dtype)
    return logprobs, entropies, (dh, dw, db)


def finished_gradients(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    rows: Rows,
    N: int,
    like: tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of N rows, in the arguments' dtypes; empty where there is none."""
    dh, dw, db = gradients
    hidden, weight, bias = like
    return (
        hidden.new_empty(0) if dh is None else scatter_rows(dh, rows.places, N).to(hidden.dtype),
        weight.new_empty(0) if dw is None else dw.to(weight.dtype),
        hidden.new_empty(0) if db is None or bias is None else db.to(bias.dtype),
    )


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors like `finished_gradients`'."""
    dense = torch.contiguous_format
    return (
        torch.empty_like(hidden, memory_format=dense) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=dense) if needs[1] else weight.new_empty(0),
        hidden.new_empty(0) if not needs[2] or bias is None else bias.new_empty(bias.shape),
    )


# ---- the backward pass


def _scale(
    backend: str, grad: Tensor, dh: Tensor, dw: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return dh * grad, dw * grad, db * grad


def _scale_fake(
    grad: Tensor, dh: Tensor, dw: Tensor, db: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dh), torch.empty_like(dw), torch.empty_like(db)


_scale_gradients = register_backward(
    "linear_loss_backward(Tensor grad, Tensor dh, Tensor dw, Tensor db, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    {name: partial(_scale, name) for name in ("cpu", "triton")},
    _scale_fake,
)

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def setup_context(
    ctx: Any, output: tuple[Tensor, ...], needs: Needs, private: bool, backend: str
) -> None:
    """Keeps the gradients, an op's last three outputs; the loss, the first, is differentiable.

    `private`: the op's caller drops the gradients, as the public functions do.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-3:])
    ctx.needs, ctx.private, ctx.backend = needs, private, backend


def gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias.

    What was kept is given away itself, scaled in place, where nobody else holds it: the graph is
    not kept for a second backward pass, and nothing traces or differentiates this one. Another copy
    of the weight's gradient would take as much memory as a chunk.
    """
    if grad is None:
        return None, None, None
    kept = ctx.saved_tensors
    if (
        ctx.private
        and type(grad) is Tensor
        and type(kept[1]) is Tensor
        and not grad.requires_grad
        and not torch.is_grad_enabled()
        and not _keeps_graph()
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        scaled = kept
        if grad.is_cuda or float(grad) != 1.0:
            for x in kept:
                x.mul_(grad)
    else:
        scaled = _scale_gradients(grad, *kept, ctx.backend)
    dh, dw, db = (g if need else None for g, need in zip(scaled, ctx.needs, strict=True))
    return dh, dw, db
