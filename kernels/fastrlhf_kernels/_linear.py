"""The output head, a piece of the logits at a time: what the linear_* ops share.

    z = hidden @ weight.T, in pieces of rows and columns, each read by the row routine
    of _logprob_rows, which adds bias, scale and softcap; no piece outlives its use

The products are torch.mm into scratch, on every backend; the rows are C++ or Triton. Operands keep
their dtype where the device multiplies it with fp32 sums: on a GPU bf16 and fp16, and the product
comes out in fp32; on a CPU bf16 where there is AMX, and the product is rounded to bf16, as torch's
is. Elsewhere they are widened to fp32 tile by tile, which on a CPU without AMX is four times as
fast (31 against 147 ms for 512 x 768 x 4096 here).

Rows whose label is ignored are cut out first, so they cost nothing and their contents reach
nothing. On a GPU that waits for the count of the others, unless a CUDA graph is being captured:
then their hidden states are replaced by zeros.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._checks import compute_dtype
from ._groups import Group, gather
from ._logprob_rows import COLUMNS_MULTIPLE, Head, backward_rows, forward_rows

# A piece of logits. On two CPU cores tiles of 4096 columns ran at the speed of whole products. On
# an H200, 8192 x 4096 x 151936 in bf16 (bench/sweep.py), pieces of 2048 x 4096 took 1.23 times the
# bare product and 1.27 times the four, those taken here 1.15 and 1.20, for 805 MB.
ROWS = 2048
COLUMNS = COLUMNS_MULTIPLE
GPU_ROWS = 8192
GPU_COLUMNS = 4 * COLUMNS_MULTIPLE

# Rows' work on fewer logits than this at a time is left to one thread (see _native.alone): at
# 1000 x 163 a second one made a call three times as long, by 4 ms that it was kept waiting.
ALONE_ELEMENTS = 2**20

# Whether bf16 products on this CPU are faster than fp32 ones.
CPU_BF16 = bool(torch.cpu._is_amx_tile_supported())
# bf16 elements of a row of an AMX tile. oneDNN reads rows of the left operand up to a whole one and
# multiplies what lies past their end by zero, so that a NaN or an infinity there becomes a result.
AMX_COLUMNS = 32


def bf16_products(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a CPU multiplies these as bf16.

    Not where H is no whole number of AMX_COLUMNS: a NaN in a row would harm the row before it.
    """
    halves = hidden.dtype == weight.dtype == torch.bfloat16
    return halves and CPU_BF16 and hidden.shape[-1] % AMX_COLUMNS == 0 and not hidden.is_cuda


class Rows(NamedTuple):
    """The rows that have a label, and how their products are made."""

    hidden: Tensor  # (n, H), of the operands' dtype
    labels: Tensor  # (n,), int64
    head: Head
    places: Tensor | None  # (n,), among all rows; None: all of them, in order
    z_dtype: torch.dtype  # of the logits
    sum_dtype: torch.dtype  # of sums over pieces, and of results


def gather_rows(
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    temperatures: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
) -> Rows:
    """Cuts out the ignored rows and chooses the dtypes."""
    result = compute_dtype(hidden, weight)
    operand = z_dtype = result
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2:
        operand = hidden.dtype
    elif bf16_products(hidden, weight):
        operand = z_dtype = hidden.dtype
    labels = labels.to(torch.int64)
    valid = labels != ignore_index
    places: Tensor | None = None
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        hidden = torch.where(valid[:, None], hidden, 0.0)
    elif not bool(valid.all()):
        places = valid.nonzero()[:, 0]
        hidden, labels = hidden[places], labels[places]
        if temperatures is not None:
            temperatures = temperatures[places]
    if temperatures is not None:
        temperatures = temperatures.to(result).contiguous()
    if bias is not None:
        bias = bias.to(result).contiguous()
    head = Head(temperature, temperatures, logit_scale, softcap, bias, ignore_index)
    return Rows(hidden.to(operand), labels.contiguous(), head, places, z_dtype, result)


def scatter_rows(x: Tensor, places: Tensor | None, N: int) -> Tensor:
    """Values of the gathered rows at their places among N, zeros elsewhere."""
    if places is None:
        return x
    out = x.new_zeros((N, *x.shape[1:]))
    out[places] = x
    return out


def few(n: int, V: int) -> AbstractContextManager[None]:
    """Rows' work in the block is on (n, V) logits at a time."""
    return _native.alone(n * V < ALONE_ELEMENTS)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products compute in the dtypes that they are given."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; out may be of a wider dtype."""
    if out.dtype == a.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
        return
    if a.is_cuda:  # fp32 out of the matrix units, straight into place
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    product = torch.mm(a, b)
    if add:
        out.add_(product)
    else:
        out.copy_(product)


def padded(columns: int, itemsize: int) -> int:
    """Elements from a row of logits to the next, for `columns` of them.

    Whole 64-byte lines, since an odd distance (50257) slows the products by 5 to 20 %; and no whole
    pages, where a column's elements would share a set of the cache.
    """
    line = 64 // itemsize
    stride = -(-columns // line) * line
    return stride if columns < 1024 or stride * itemsize % 4096 else stride + line


def piece(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a piece of logits on the device of x."""
    return (GPU_ROWS, GPU_COLUMNS) if x.is_cuda else (ROWS, COLUMNS)


def column_cuts(columns: int, x: Tensor) -> list[slice]:
    """The columns of a piece of logits, for products; on a GPU cut at a multiple of 8.

    cuBLAS has slow bf16 products alone for other numbers. On an H100, 2048 x 2048 x 50257: 3.9 ms
    for the logits and 3.4 for dh; of 50256 columns 0.58 and 0.50.
    """
    whole = columns // 8 * 8
    if not x.is_cuda or whole in (0, columns):
        return [slice(0, columns)]
    return [slice(0, whole), slice(whole, columns)]


class Scratch:
    """One piece of memory for logits, and one for their gradient where its dtype differs."""

    def __init__(self, rows: Rows, n: int, V: int) -> None:
        self.stride = padded(V, rows.z_dtype.itemsize)
        self.z = rows.hidden.new_empty((n, self.stride), dtype=rows.z_dtype)
        same = rows.z_dtype == rows.hidden.dtype
        self.dz = self.z if same else rows.hidden.new_empty((n, self.stride))

    def pieces(self, n: int, V: int) -> tuple[Tensor, Tensor]:
        """Logits and their gradient, (n, V)."""
        z = self.z[:n, :V]
        if z.dtype == torch.bfloat16:
            self.z[:n, V : V + -V % AMX_COLUMNS] = 0.0
        return z, z if self.dz is self.z else self.dz[:n, :V]


def slice_head(head: Head, n0: int, n1: int, v0: int, v1: int) -> Head:
    """The head of rows n0 to n1 and columns v0 to v1."""
    if head.temperatures is None and head.bias is None:
        return head
    return head._replace(
        temperatures=None if head.temperatures is None else head.temperatures[n0:n1],
        bias=None if head.bias is None else head.bias[v0:v1],
    )


def linear_forward(
    backend: str,
    rows: Rows,
    weight: Tensor,
    *,
    entropy: bool,
    keep: bool,
    first: int,
    group: Group | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(log-probs (n,), entropy (n,) or None, states) of the gathered rows.

    With `keep` the states of rows n0 to n1 of a piece are at states[3 * n0 : 3 * n1], as
    (3, n1 - n0); without, those of the last piece are left.
    """
    n, V = rows.hidden.shape[0], weight.shape[0]
    most_rows, most_columns = piece(weight)
    logprobs = rows.hidden.new_empty(n, dtype=rows.sum_dtype)
    entropies = torch.empty_like(logprobs) if entropy else None
    states = logprobs.new_empty(3 * (n if keep else min(n, most_rows)))
    scratch = Scratch(rows, min(n, most_rows), min(V, most_columns))
    with without_autocast(weight), few(min(n, most_rows), min(V, most_columns)):
        for n0 in range(0, n, most_rows):
            n1 = min(n, n0 + most_rows)
            state = states[3 * n0 : 3 * n1] if keep else states[: 3 * (n1 - n0)]
            out = logprobs[n0:n1], None if entropies is None else entropies[n0:n1]
            for v0 in range(0, V, most_columns):
                v1 = min(V, v0 + most_columns)
                z, _ = scratch.pieces(n1 - n0, v1 - v0)
                w = weight[v0:v1].to(rows.hidden.dtype)
                for cut in column_cuts(v1 - v0, weight):
                    multiply(rows.hidden[n0:n1], w[cut].T, z[:, cut])
                forward_rows(
                    backend, z, rows.labels[n0:n1], slice_head(rows.head, n0, n1, v0, v1), state,
                    *out, first=first + v0, begin=v0 == 0, end=v1 == V and group is None,
                )  # fmt: skip
            if group is not None:
                head = slice_head(rows.head, n0, n1, 0, 0)
                _combine_ranks(state.view(3, -1), out[0], head, group)
                forward_rows(
                    backend, scratch.pieces(n1 - n0, 0)[0], rows.labels[n0:n1], head, state,
                    *out, begin=False,
                )  # fmt: skip
    return logprobs, entropies, states


def _combine_ranks(state: Tensor, label_logits: Tensor, head: Head, group: Group) -> None:
    """Combines the ranks' states in rank order, and puts the result in place, on every rank.

    Each rank's state is (1 + rest) exponentials relative to its own maximum, so they are combined
    as the tiles of a row are, in one exchange of four numbers a row.
    """
    parts = gather(torch.cat((state, label_logits[None])), group)
    t = head.temperature if head.temperatures is None else head.temperatures
    m, rest, moment, z = parts[0]
    for m2, rest2, moment2, z2 in parts[1:]:
        left = m >= m2
        top, low = torch.maximum(m, m2), torch.minimum(m, m2)
        d = torch.where(low == -torch.inf, 0.0, low - top)
        e = torch.where(low == -torch.inf, 0.0, (d / t).exp())
        moved = 1.0 + torch.where(left, rest2, rest)
        rest = torch.where(left, rest, rest2) + moved * e
        moment_moved = e * (torch.where(left, moment2, moment) + moved * d)
        moment = torch.where(left, moment, moment2) + moment_moved
        m, z = top, torch.maximum(z, z2)  # one rank has the label's logit, the others -inf
    state[0], state[1], state[2] = m, rest, moment
    label_logits.copy_(z)


def linear_backward(
    backend: str,
    rows: Rows,
    weight: Tensor,
    states: Tensor,
    grad_logprobs: Tensor,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    *,
    first: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the gathered hidden states, the weight and the bias; None where not needed.

    Columns outside, rows inside: a tile of dW is summed in place and written once.
    """
    (n, H), V = rows.hidden.shape, weight.shape[0]
    most_rows, most_columns = piece(weight)
    operand = rows.hidden.dtype
    dh = rows.hidden.new_zeros((n, H), dtype=rows.sum_dtype) if needs[0] else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    db = rows.hidden.new_zeros(V, dtype=rows.sum_dtype) if needs[2] else None
    if n == 0:
        return dh, None if dw is None else dw.zero_(), db
    scratch = Scratch(rows, min(n, most_rows), min(V, most_columns))
    with without_autocast(weight), few(min(n, most_rows), min(V, most_columns)):
        for v0 in range(0, V, most_columns):
            v1 = min(V, v0 + most_columns)
            w, cuts = weight[v0:v1].to(operand), column_cuts(v1 - v0, weight)
            dw_tile: Tensor | None = None
            if dw is not None:
                dw_tile = dw[v0:v1]
                if dw.dtype != rows.sum_dtype:
                    dw_tile = dw_tile.new_empty(dw_tile.shape, dtype=rows.sum_dtype)
            for n0 in range(0, n, most_rows):
                n1 = min(n, n0 + most_rows)
                h = rows.hidden[n0:n1]
                z, dz = scratch.pieces(n1 - n0, v1 - v0)
                for cut in cuts:
                    multiply(h, w[cut].T, z[:, cut])
                backward_rows(
                    backend, z, rows.labels[n0:n1], slice_head(rows.head, n0, n1, v0, v1),
                    states[3 * n0 : 3 * n1], grad_logprobs[n0:n1],
                    None if grad_entropy is None else grad_entropy[n0:n1], dz, first=first + v0,
                )  # fmt: skip
                for cut in cuts:
                    if dw_tile is not None:
                        multiply(dz[:, cut].T, h, dw_tile[cut], add=n0 > 0)
                    if dh is not None:
                        multiply(dz[:, cut], w[cut], dh[n0:n1], add=v0 + cut.start > 0)
                if db is not None:
                    db[v0:v1] += dz.sum(0, dtype=db.dtype)
            if dw is not None and dw_tile is not None and dw.dtype != rows.sum_dtype:
                dw[v0:v1] = dw_tile
    return dh, dw, db
