"""The row routine of logprobs_from_logits, the linear_* ops and sample, in Triton and in C++.

A row of logits z is read in tiles aligned at absolute columns, which are combined from left to
right; so equal logits give equal bits, whichever op reads them, in whatever batch. With
d_j = z_j - max z and temperature T:

    rest    = sum exp(d_j / T) over all j but one instance of the maximum
    moment  = sum exp(d_j / T) d_j
    logprob = d_y / T - log1p(rest)                    keeps its relative precision as p -> 1
    entropy = log1p(rest) - moment / T / (1 + rest)

    dz_j = (grad_j (1 - p_j) - others_j p_j - grad_entropy p_j (d_j - mean) / T) / T

grad_j is the upstream gradient of the labels equal to j, others_j that of the others, mean =
moment / (1 + rest); 1 - p is rest / (1 + rest) at the maximum. (max, rest, moment) is a row's
state, which the backward pass reads instead of summing again. max is -inf and rest 0 before the
first tile; rest is NaN for a row of nothing but -inf, or with a NaN or a +inf.

z = softcap * tanh(scale * (x + bias) / softcap) is made on load. csrc/logprob_row.h is the same in
C++, with its own tile width.

Source: Milakov and Gimelshein 2018 (the maximum and the sum in one reading).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import _native
from ._checks import check_labels
from ._logit_row import gradient_terms, load_z, row_offset, scan_row
from ._native import pointer
from ._triton import AotConfig, jit, launch, log1p, on_device, tl

# Swept on an H200 by bench/sweep.py, 4096 x 151936. Forward, of a copy's 4.29 TB/s: 4.14 in fp32
# and 2.5 in bf16 with 2048 or 4096 columns on four warps, 3.6 and 1.9 on eight. Backward, before it
# had wide loads and settled labels by themselves: 3.73 and 2.37 with these, 3.46 and 2.42 on four
# warps. The forward's width fixes the order of the sums.
BLOCK_V = 2048
NUM_WARPS = 4
BACKWARD_BLOCK_V = 2048
BACKWARD_TILES = 4  # of a program, one after the other
BACKWARD_NUM_WARPS = 8
BACKWARD_REGISTERS = 64  # four programs on a multiprocessor

_ANY_VALUE = (
    *("N", "V", "K", "inner", "outer_stride", "inner_stride", "dx_stride", "first", "bias_start"),
    "ignore_index",
)

# A multiple of both backends' tiles, so that columns handed over in pieces of it are cut the same.
COLUMNS_MULTIPLE = 4096


@jit(any_value=_ANY_VALUE)
def _forward_kernel(
    x, bias, labels, temperatures, state, logprobs, entropy,  # pointers
    N, V, K, inner,  # sizes
    outer_stride, inner_stride, first, bias_start,  # strides; x's first column; 0, see make_z
    temperature, scale, cap, ignore_index,  # constants
    BEGIN: tl.constexpr, END: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr, HAS_ENTROPY: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row_offset(row, inner, outer_stride, inner_stride)
    labels += row * K
    logprobs += row * K
    if HAS_TEMPERATURES:
        temperature = tl.load(temperatures + row)
    n_valid = 0
    for k in range(K):
        n_valid += tl.where(tl.load(labels + k) != ignore_index, 1, 0)
    some = n_valid > 0
    if BEGIN:
        m, rest, moment = float("-inf"), 0.0, 0.0
    else:
        m = tl.load(state + row)
        rest = tl.load(state + N + row)
        moment = tl.load(state + 2 * N + row)
    m, rest, moment = scan_row(
        x, bias, bias_start, tl.where(some, V, 0), m, rest, moment, temperature, scale, cap,
        HAS_BIAS, HAS_CAP, HAS_ENTROPY, UNIT, BLOCK_V,
    )  # fmt: skip
    if END:
        rest = tl.where(some & (m == float("-inf")), float("nan"), rest)
    for k in range(K):
        label = tl.load(labels + k)
        column = label - first
        here = (label != ignore_index) & (column >= 0) & (column < V)
        z = load_z(
            x, bias, bias_start, tl.where(here, column, 0), V, scale, cap, here, HAS_BIAS, HAS_CAP
        )  # fmt: skip
        if not BEGIN:
            z = tl.where(here, z, tl.load(logprobs + k))
        if END:
            z = tl.div_rn(z - m, temperature) - log1p(rest)
            z = tl.where(label == ignore_index, 0.0, z)
        tl.store(logprobs + k, z)
    if END and HAS_ENTROPY:
        value = log1p(rest) - moment / temperature / (1.0 + rest)
        tl.store(entropy + row, tl.where(some, value, 0.0))
    tl.store(state + row, m)
    tl.store(state + N + row, rest)
    tl.store(state + 2 * N + row, moment)


@jit(any_value=_ANY_VALUE)
def _backward_kernel(
    x, bias, labels, temperatures, state, grad_logprobs, grad_entropy, dx,  # pointers
    N, V, K, inner,  # sizes
    outer_stride, inner_stride, dx_stride, first, bias_start,  # as above
    temperature, scale, cap, ignore_index,  # constants
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * (TILES * BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    offset, dx_offset = row_offset(row, inner, outer_stride, inner_stride), row * dx_stride
    if WIDE:
        # Multiples of 8, which this tells the compiler: 16 bytes a load and a store. No sum over a
        # tile is made here, so that its layout does not matter.
        offset, dx_offset, V = offset // 8 * 8, dx_offset // 8 * 8, V // 8 * 8
    x += offset
    labels += row * K
    grad_logprobs += row * K
    dx += dx_offset
    if HAS_TEMPERATURES:
        temperature = tl.load(temperatures + row)
    m = tl.load(state + row)
    rest = tl.load(state + N + row)
    inverse = tl.div_rn(1.0, temperature)
    total = 0.0
    n_valid = 0
    for k in range(K):
        valid = tl.load(labels + k) != ignore_index
        total += tl.load(grad_logprobs + k, mask=valid, other=0.0)
        n_valid += tl.where(valid, 1, 0)
    # A row without a label reads as zeros, and its gradient comes out as 0.
    some = n_valid > 0
    m = tl.where(some, m, 0.0)
    rest = tl.where(some, rest, 0.0)
    share = tl.div_rn(1.0, 1.0 + rest)
    if HAS_ENTROPY:
        upstream = tl.where(some, tl.load(grad_entropy + row), 0.0)
        mean = tl.load(state + 2 * N + row) * share * inverse
        mean = tl.where(some, mean, 0.0)
    # A tile is on its way while the one before is worked on.
    ahead = tl.load(x + begin + lane, mask=(begin + lane < V) & some, other=0.0)
    for i in tl.static_range(TILES):
        columns = begin + i * BLOCK_V + lane
        inside = columns < V
        z = ahead
        if i + 1 < TILES:
            ahead = tl.load(x + columns + BLOCK_V, mask=(columns + BLOCK_V < V) & some, other=0.0)
        z, slope, u, e = gradient_terms(
            z, bias, bias_start, columns, inside & some, inverse, m, temperature, scale, cap,
            HAS_BIAS, HAS_CAP, UNIT,
        )  # fmt: skip
        dz = tl.fma(e, -(total * share), 0.0)
        if HAS_ENTROPY:
            dz -= upstream * (e * share) * (u - mean)
        if HAS_CAP or not UNIT or scale is not None:
            dz *= slope
        dz = dz.to(dx.dtype.element_ty)
        start = first + begin + i * BLOCK_V
        n_here = 0
        for k in range(K):
            label = tl.load(labels + k)
            n_here += tl.where((label >= start) & (label < start + BLOCK_V), 1, 0)
        if n_here == 0:
            tl.store(dx + columns, dz, mask=inside)
        else:  # not the labels' own columns: where dx is x, what follows still reads them
            for k in range(K):
                label = tl.load(labels + k)
                inside &= (lane != (label - start).to(tl.int32)) | (label == ignore_index)
            tl.store(dx + columns, dz, mask=inside)
    # The labels' own columns, one at a time.
    end = tl.minimum(begin + TILES * BLOCK_V, V)
    for k in range(K):
        label = tl.load(labels + k)
        column = label - first
        if (label != ignore_index) & (column >= begin) & (column < end):
            own = 0.0  # the gradients of all labels equal to this one
            before = 0
            for j in range(K):
                same = tl.load(labels + j) == label
                own += tl.load(grad_logprobs + j, mask=same, other=0.0)
                before += tl.where(same & (j < k), 1, 0)
            if before == 0:
                one_z, one_slope, one_u, one_e = gradient_terms(
                    tl.load(x + column), bias, bias_start, column, True, inverse, m, temperature,
                    scale, cap, HAS_BIAS, HAS_CAP, UNIT,
                )  # fmt: skip
                p = one_e * share
                not_p = tl.where(one_z == m, rest * share, 1.0 - p)
                one = own * not_p - (total - own) * p
                if HAS_ENTROPY:
                    one -= upstream * p * (one_u - mean)
                if HAS_CAP or not UNIT or scale is not None:
                    one *= one_slope
                tl.store(dx + column, one.to(dx.dtype.element_ty))


_SIZES = dict.fromkeys([n for n in _ANY_VALUE if n not in ("dx_stride", "ignore_index")], "i32")
_SETTINGS = dict.fromkeys(("temperature", "cap"), "fp32") | {"ignore_index": "i32"}
_FORWARD = {"x": "*fp32", "labels": "*i64", "state": "*fp32", "logprobs": "*fp32"}
_BACKWARD = {"x": "*fp32", "labels": "*i64", "state": "*fp32", "grad_logprobs": "*fp32"}


def aot_configs(x_type: str, dx_type: str, *, head: bool) -> list[AotConfig]:
    """How the two kernels ship: for whole rows of logits, or with `head` for tiles of a head."""
    flags = {"HAS_BIAS": head, "HAS_CAP": head, "HAS_ENTROPY": head, "HAS_TEMPERATURES": head}
    flags["UNIT"] = not head
    pointers = {"bias": "*fp32", "temperatures": "*fp32", "scale": "fp32"} if head else {}
    absent = {} if head else {"bias": None, "temperatures": None, "scale": None}
    forward = _FORWARD | {"x": x_type} | pointers | _SIZES | _SETTINGS
    backward = _BACKWARD | {"x": x_type, "dx": dx_type} | pointers | _SIZES | _SETTINGS
    return [
        AotConfig(
            f"forward, {x_type}",
            _forward_kernel,
            forward | ({"entropy": "*fp32"} if head else {}),
            flags | absent | ({} if head else {"entropy": None})
            | {"BEGIN": not head, "END": not head, "BLOCK_V": BLOCK_V},
            num_warps=NUM_WARPS,
        ),
        *(
            AotConfig(
                f"backward, {x_type} to {dx_type}" + (", wide" if wide else ""),
                _backward_kernel,
                backward | {"dx_stride": "i32"} | ({"grad_entropy": "*fp32"} if head else {}),
                flags | absent | ({} if head else {"grad_entropy": None})
                | {"WIDE": wide, "TILES": BACKWARD_TILES, "BLOCK_V": BACKWARD_BLOCK_V},
                num_warps=BACKWARD_NUM_WARPS,
                max_registers=BACKWARD_REGISTERS,
            )
            for wide in (False, True)
        ),
    ]  # fmt: skip


class Head(NamedTuple):
    """What makes z of x, and the settings; tensors are dense and of the results' dtype."""

    temperature: float
    temperatures: Tensor | None  # (N,), in place of `temperature`
    scale: float
    softcap: float  # 0: none
    bias: Tensor | None  # (V,)
    ignore_index: int


def _layout(x: Tensor) -> tuple[int, int, int, int]:
    """(N, inner, outer_stride, inner_stride) of (N, V) or (B, R, V)."""
    if x.dim() == 2:
        return x.shape[0], max(x.shape[0], 1), 0, x.stride(0)
    return x.shape[0] * x.shape[1], max(x.shape[1], 1), x.stride(0), x.stride(1)


def forward_rows(
    backend: str,
    x: Tensor,  # (N, V) or (B, R, V), dense along V
    labels: Tensor,  # N K of them, int64, contiguous
    head: Head,
    state: Tensor,  # (3, N)
    logprobs: Tensor,  # N K of them, contiguous
    entropy: Tensor | None,  # N of them; also asks for the moment
    *,
    first: int = 0,
    begin: bool = True,
    end: bool = True,
) -> None:
    """Adds the columns of x, of which the first is global column `first`, to the rows' state.

    With `begin` the rows start anew; with `end` log-probs and entropy are made. In between,
    `logprobs` holds the labels' logits.
    """
    N, inner, outer_stride, inner_stride = _layout(x)
    if N == 0:
        return
    V, K = x.shape[-1], labels.numel() // N
    if backend == "cpu":
        _native.call(
            "logprobs_from_logits", x,
            x.data_ptr(), pointer(head.bias), labels.data_ptr(), pointer(head.temperatures),
            state.data_ptr(), logprobs.data_ptr(), pointer(entropy),
            N, V, K, inner, outer_stride, inner_stride, first,
            head.temperature, head.scale, head.softcap, head.ignore_index, begin, end,
            _native.DTYPE_TAGS[x.dtype],
        )  # fmt: skip
        return
    scale = None if head.scale == 1.0 else head.scale
    with on_device(x):
        launch(_forward_kernel, (N,))(
            x, head.bias, labels, head.temperatures, state, logprobs, entropy,
            N, V, K, inner,
            outer_stride, inner_stride, first, 0,
            head.temperature, scale, head.softcap, head.ignore_index,
            BEGIN=begin, END=end, HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap != 0.0,
            HAS_TEMPERATURES=head.temperatures is not None, HAS_ENTROPY=entropy is not None,
            UNIT=head.temperatures is None and head.temperature == 1.0,
            BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip


def backward_rows(
    backend: str,
    x: Tensor,  # as for forward_rows
    labels: Tensor,
    head: Head,
    state: Tensor,
    grad_logprobs: Tensor,  # like logprobs
    grad_entropy: Tensor | None,
    dx: Tensor,  # (N, V), dense along V; may be x, for at most 8 labels a row
    *,
    first: int = 0,
) -> None:
    """Writes the gradient of the columns of x."""
    N, inner, outer_stride, inner_stride = _layout(x)
    V = x.shape[-1]
    if N == 0:
        return
    K = labels.numel() // N
    if backend == "cpu":
        _native.call(
            "logprobs_from_logits_backward", x,
            x.data_ptr(), pointer(head.bias), labels.data_ptr(), pointer(head.temperatures),
            state.data_ptr(), grad_logprobs.data_ptr(), pointer(grad_entropy), dx.data_ptr(),
            N, V, K, inner, outer_stride, inner_stride, dx.stride(0), first,
            head.temperature, head.scale, head.softcap, head.ignore_index,
            _native.DTYPE_TAGS[x.dtype],
        )  # fmt: skip
        return
    scale = None if head.scale == 1.0 else head.scale
    with on_device(x):
        grid = (N, -(-V // (BACKWARD_TILES * BACKWARD_BLOCK_V)))
        launch(_backward_kernel, grid, max_registers=BACKWARD_REGISTERS)(
            x, head.bias, labels, head.temperatures, state, grad_logprobs, grad_entropy, dx,
            N, V, K, inner,
            outer_stride, inner_stride, dx.stride(0), first, 0,
            head.temperature, scale, head.softcap, head.ignore_index,
            HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap != 0.0,
            HAS_TEMPERATURES=head.temperatures is not None, HAS_ENTROPY=grad_entropy is not None,
            UNIT=head.temperatures is None and head.temperature == 1.0,
            WIDE=_rows_are_wide(x, dx), TILES=BACKWARD_TILES, BLOCK_V=BACKWARD_BLOCK_V,
            num_warps=BACKWARD_NUM_WARPS,
        )  # fmt: skip


def _rows_are_wide(x: Tensor, dx: Tensor) -> bool:
    """Whether all rows start at a multiple of 16 bytes and hold a multiple of 8 numbers."""
    starts = x.data_ptr() % 16 == dx.data_ptr() % 16 == 0
    return starts and not any(n % 8 for n in (x.shape[-1], *x.stride()[:-1], dx.stride(0)))


def refuse_bad_labels(op: str, labels: Tensor, V: int, ignore_index: int) -> None:
    """check_labels; for CPU tensors without the temporaries, which cost more than a short row."""
    if labels.is_cuda or _native.cpu is None:
        check_labels(op, labels, V, ignore_index)
        return
    try:
        _native.cpu.check_labels(labels.data_ptr(), labels.numel(), V, ignore_index)
        return
    except ValueError:
        pass  # and now slowly, to say which
    check_labels(op, labels, V, ignore_index)
