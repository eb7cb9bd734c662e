"""KL divergence of two rows of logits, over the whole vocabulary.

    p = softmax(p_logits / T),  q = softmax(q_logits / T),  w_j = log p_j - log q_j
    KL(p || q) = sum_j p_j w_j = sum_j (p_j w_j - p_j + q_j),  0 log 0 = 0

    d KL / d p_logits_j = p_j (w_j - KL) / T
    d KL / d q_logits_j = (q_j - p_j) / T

Shapes: p_logits and q_logits (..., V), V >= 1; T > 0 a number; the result (...). Dtypes: both fp32,
bf16, fp16 or fp64; arithmetic and the result are fp32, or fp64 for fp64 logits.

Promises:
- Never negative, and 0, with gradients 0, for equal logits. Rows that are nearly equal keep the
  relative precision of the KL and of both gradients (of a row's, as a whole), down to differences
  of single units in the last place: every term p_j w_j - p_j + q_j = p_j (w_j + exp(-w_j) - 1) is
  >= 0, and summed as a series where w_j is small; w_j is made of the exact difference of the
  logits; and an error e of the two log-sums enters as e^2 / 2, which is taken out again, since
  sum p - sum q shows it.
- Offsets cost nothing, different ones in p_logits and q_logits included.
- p_j = 0 (a logit of -inf) adds nothing to sum p_j w_j, whatever q_j is. q_j = 0 where p_j > 0
  gives +inf, whose row has no gradient: what is returned for it is not finite, or 0 where the
  upstream gradient is 0.
- A row of nothing but -inf in either argument, or with a NaN or a +inf, gives NaN, and harms no
  other.
- On each backend but `ref` a row's bits do not depend on the batch.

Rows are read twice, for the log-sums and for the terms: the second time from cache, mostly. In one
reading sum p_j w_j would be all that can be had, which cancels.

Source: Kullback and Leibler 1951; the sum of non-negative terms is the Bregman divergence of
x log x.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import check_device, check_float, check_number, check_shape, compute_dtype
from ._library import register, register_backward
from ._logit_row import exponent, row_offset, scan_row
from ._native import pointer, with_unit_stride
from ._triton import AotConfig, exp_nonpositive, jit, launch, log1p, on_device, tl

# Not tuned: as in _logprob_rows.py, half as wide since two rows are held at once.
BLOCK_V = 2048
NUM_WARPS = 8

# w + exp(-w) - 1 = w^2 (1/2 - w/6 + ...) for |w| < NEAR; past it the three terms lose 2 bits.
NEAR = 1.0
SERIES = tuple((-1) ** k / math.factorial(k + 2) for k in range(18))


def _exact_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b in two parts (Knuth)."""
    high = a - b
    back = high - a
    return high, (a - (high - back)) - (b + back)


def kl_divergence_ref(
    p_logits: Tensor, q_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    """The specification; arguments as in `kl_divergence`."""
    dtype = compute_dtype(p_logits)
    a, b = p_logits.to(dtype), q_logits.to(dtype)
    top_p, top_q = (z.detach().amax(-1, keepdim=True) for z in (a, b))
    bad = ~(top_p.isfinite() & top_q.isfinite())
    a, b = (torch.where(bad, z + torch.nan, z) for z in (a, b))
    gone_p, gone_q = a == -torch.inf, b == -torch.inf
    a, b = torch.where(gone_p, top_p, a), torch.where(gone_q, top_q, b)  # so that no NaN arises
    p = torch.where(gone_p, 0.0, ((a - top_p) / temperature).exp())
    q = torch.where(gone_q, 0.0, ((b - top_q) / temperature).exp())
    total_p, total_q = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    p, q = p / total_p, q / total_q

    high, low = _exact_difference(a, b)
    offset, offset_low = _exact_difference(top_p, top_q)
    ratio = ((high - offset) + (low - offset_low)) / temperature - (total_p.log() - total_q.log())

    def terms(w: Tensor) -> tuple[Tensor, Tensor]:  # p w - p + q, and p - q
        w = torch.where(gone_p | gone_q, 2.0, w)
        near = w.abs() < NEAR
        y = torch.where(near, w, 0.0)
        series = torch.zeros_like(y)
        for coefficient in reversed(SERIES):
            series = series * y + coefficient
        small = y * y * series
        return (
            torch.where(near, p * small, p * (torch.where(near, 0.0, w) - 1.0) + q),
            torch.where(near, p * (y - small), p - q),
        )

    with torch.no_grad():  # by how much the log-sums are off
        off = -torch.log1p(-terms(ratio)[1].sum(-1, keepdim=True))
    kl = terms(ratio - off)[0].sum(-1)
    infinite = (gone_q & ~gone_p).any(-1)
    return (kl + infinite) * torch.where(infinite, torch.inf, torch.ones_like(kl))


_ANY_VALUE = ("N", "V", "inner", "p_outer", "p_stride", "q_outer", "q_stride")


@jit()
def _exact_part(a, b):
    high = a - b
    back = high - a
    return (a - (high - back)) - (b + back)


@jit()
def _entry(a, b, max_p, max_q, total_p, total_q, shift, t):
    """p, q, w (2 where a logit is -inf), p w - p + q, and p - q."""
    p = exp_nonpositive(exponent(a, max_p, t, False)) * tl.div_rn(1.0, total_p)
    q = exp_nonpositive(exponent(b, max_q, t, False)) * tl.div_rn(1.0, total_q)
    gone = (a == float("-inf")) | (b == float("-inf"))
    x = tl.where(gone, max_p, a)
    y = tl.where(gone, max_q, b)
    low = _exact_part(x, y)
    low = tl.where(low == low, low, 0.0)  # past the largest number
    w = ((x - y) - (max_p - max_q)) + (low - _exact_part(max_p, max_q))
    w = tl.div_rn(w, t) - shift
    w = tl.where(w > 1e38, 1e38, w)  # 0 times it is 0; a NaN stays
    w = tl.where(w < -1e38, -1e38, w)
    w = tl.where(gone, 2.0, w)
    near = tl.abs(w) < 1.0
    y = tl.where(near, w, 0.0)
    s = y * (-1.0 / 39916800.0) + 1.0 / 3628800.0
    s = s * y - 1.0 / 362880.0
    s = s * y + 1.0 / 40320.0
    s = s * y - 1.0 / 5040.0
    s = s * y + 1.0 / 720.0
    s = s * y - 1.0 / 120.0
    s = s * y + 1.0 / 24.0
    s = s * y - 1.0 / 6.0
    s = s * y + 0.5
    small = y * y * s
    term = tl.where(near, p * small, p * (w - 1.0) + q)
    return p, q, w, term, tl.where(near, p * (y - small), p - q)


@jit(any_value=_ANY_VALUE)
def _forward_kernel(
    p, q, state, kl,  # pointers
    N, V, inner,  # sizes
    p_outer, p_stride, q_outer, q_stride,  # strides
    temperature,  # constants
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p += row_offset(row, inner, p_outer, p_stride)
    q += row_offset(row, inner, q_outer, q_stride)
    max_p, rest_p, moment = float("-inf"), 0.0, 0.0
    max_p, rest_p, moment = scan_row(
        p, p, 0, V, max_p, rest_p, moment, temperature, None, 1.0,
        False, False, False, False, BLOCK_V,
    )  # fmt: skip
    max_q, rest_q, moment = float("-inf"), 0.0, 0.0
    max_q, rest_q, moment = scan_row(
        q, q, 0, V, max_q, rest_q, moment, temperature, None, 1.0,
        False, False, False, False, BLOCK_V,
    )  # fmt: skip
    shift = log1p(rest_p) - log1p(rest_q)
    total = 0.0
    difference = 0.0
    n_gone = 0
    lane = tl.arange(0, BLOCK_V)
    for i in range(tl.cdiv(V, BLOCK_V)):
        columns = i * BLOCK_V + lane
        inside = columns < V
        a = tl.load(p + columns, mask=inside, other=float("-inf")).to(tl.float32)
        b = tl.load(q + columns, mask=inside, other=float("-inf")).to(tl.float32)
        _, _, _, term, p_minus_q = _entry(
            a, b, max_p, max_q, 1.0 + rest_p, 1.0 + rest_q, shift, temperature
        )
        total += tl.sum(term, 0)
        difference += tl.sum(p_minus_q, 0)
        gone = (b == float("-inf")) & (a > float("-inf"))
        n_gone += tl.sum(tl.where(gone, 1, 0), 0)
    off = -log1p(-difference)
    value = total - 0.5 * off * off
    value = tl.where(value < 0.0, 0.0, value)
    value = tl.where(n_gone > 0, float("inf"), value)
    bad = (max_p == float("-inf")) | (max_q == float("-inf"))
    bad = bad | (rest_p != rest_p) | (rest_q != rest_q)
    tl.store(kl + row, tl.where(bad, float("nan"), value))
    tl.store(state + row, max_p)
    tl.store(state + N + row, rest_p)
    tl.store(state + 2 * N + row, max_q)
    tl.store(state + 3 * N + row, rest_q)
    tl.store(state + 4 * N + row, shift + off)


@jit(any_value=_ANY_VALUE)
def _backward_kernel(
    p, q, state, kl, grad, dp, dq,  # pointers
    N, V, inner,  # sizes
    p_outer, p_stride, q_outer, q_stride,  # strides
    temperature,  # constants
    HAS_DP: tl.constexpr, HAS_DQ: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    p += row_offset(row, inner, p_outer, p_stride)
    q += row_offset(row, inner, q_outer, q_stride)
    a = tl.load(p + columns, mask=inside, other=float("-inf")).to(tl.float32)
    b = tl.load(q + columns, mask=inside, other=float("-inf")).to(tl.float32)
    max_p = tl.load(state + row)
    total_p = 1.0 + tl.load(state + N + row)
    max_q = tl.load(state + 2 * N + row)
    total_q = 1.0 + tl.load(state + 3 * N + row)
    shift = tl.load(state + 4 * N + row)
    value = tl.load(kl + row)
    upstream = tl.load(grad + row)
    mass, _, w, _, p_minus_q = _entry(a, b, max_p, max_q, total_p, total_q, shift, temperature)
    finite = value < float("inf")
    still = (upstream == 0.0) & (value == value)
    filling = tl.where(still, 0.0, float("nan"))
    usual = finite & (upstream != 0.0)
    scale = upstream / temperature
    if HAS_DP:
        dz = tl.where(mass == 0.0, 0.0, mass * (w - value)) * scale
        dz = tl.where(usual, dz, filling)
        tl.store(dp + row * V + columns, dz.to(dp.dtype.element_ty), mask=inside)
    if HAS_DQ:
        dz = tl.where(usual, -p_minus_q * scale, filling)
        tl.store(dq + row * V + columns, dz.to(dq.dtype.element_ty), mask=inside)


_SIZES = dict.fromkeys(_ANY_VALUE, "i32") | {"temperature": "fp32"}
AOT_CONFIGS = [
    config
    for x in ("*fp32", "*bf16")
    for config in (
        AotConfig(
            f"forward, {x}",
            _forward_kernel,
            {"p": x, "q": x, "state": "*fp32", "kl": "*fp32"} | _SIZES,
            {"BLOCK_V": BLOCK_V},
            num_warps=NUM_WARPS,
        ),
        *(
            AotConfig(
                f"backward to {name}, {x}",
                _backward_kernel,
                {"p": x, "q": x, "state": "*fp32", "kl": "*fp32", "grad": "*fp32"}
                | ({"dp": x} if to_p else {}) | ({"dq": x} if to_q else {}) | _SIZES,
                ({} if to_p else {"dp": None}) | ({} if to_q else {"dq": None})
                | {"HAS_DP": to_p, "HAS_DQ": to_q, "BLOCK_V": BLOCK_V},
                num_warps=NUM_WARPS,
            )
            for name, to_p, to_q in (("p", True, False), ("both", True, True))
        ),
    )
]  # fmt: skip


def _layout(x: Tensor) -> tuple[int, int]:
    """(outer_stride, inner_stride) of (N, V) or (B, R, V)."""
    return (0, x.stride(0)) if x.dim() == 2 else (x.stride(0), x.stride(1))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, V, inner)."""
    N = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    return N, x.shape[-1], max(x.shape[-2], 1)


def _results(p: Tensor, q: Tensor, temperature: float, *_: Any) -> tuple[Tensor, Tensor]:
    """Room for the KL and the rows' state; the fake too."""
    dtype = compute_dtype(p)
    kl = p.new_empty(p.shape[:-1], dtype=dtype)
    return kl, p.new_empty((5, *p.shape[:-1]), dtype=dtype)


def _forward(backend: str, p: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    kl, state = _results(p, q, temperature)
    p, q = with_unit_stride(p), with_unit_stride(q)
    N, V, inner = _sizes(p)
    if N == 0:
        return kl, state
    if backend == "cpu":
        _native.call(
            "kl_divergence", p, p.data_ptr(), q.data_ptr(), state.data_ptr(), kl.data_ptr(),
            N, V, inner, *_layout(p), *_layout(q), temperature, _native.DTYPE_TAGS[p.dtype],
        )  # fmt: skip
        return kl, state
    with on_device(p):
        launch(_forward_kernel, (N,))(
            p, q, state, kl, N, V, inner, *_layout(p), *_layout(q), temperature,
            BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip
    return kl, state


def _gradient_room(
    grad: Tensor, p: Tensor, q: Tensor, kl: Tensor, state: Tensor, temperature: float,
    to_p: bool, to_q: bool, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dp and dq, empty where not wanted; the fake too."""
    return (
        torch.empty_like(p, memory_format=torch.contiguous_format) if to_p else p.new_empty(0),
        torch.empty_like(q, memory_format=torch.contiguous_format) if to_q else q.new_empty(0),
    )


def _backward(
    backend: str, grad: Tensor, p: Tensor, q: Tensor, kl: Tensor, state: Tensor,
    temperature: float, to_p: bool, to_q: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    room = _gradient_room(grad, p, q, kl, state, temperature, to_p, to_q)
    dp, dq = (x if wanted else None for x, wanted in zip(room, (to_p, to_q), strict=True))
    grad = grad.contiguous()
    p, q = with_unit_stride(p), with_unit_stride(q)
    N, V, inner = _sizes(p)
    if N == 0:
        return room
    if backend == "cpu":
        _native.call(
            "kl_divergence_backward", p,
            p.data_ptr(), q.data_ptr(), state.data_ptr(), kl.data_ptr(), grad.data_ptr(),
            pointer(dp), pointer(dq), N, V, inner, *_layout(p), *_layout(q),
            temperature, _native.DTYPE_TAGS[p.dtype],
        )  # fmt: skip
        return room
    with on_device(p):
        launch(_backward_kernel, (N, -(-V // BLOCK_V)))(
            p, q, state, kl, grad, dp, dq, N, V, inner, *_layout(p), *_layout(q), temperature,
            HAS_DP=to_p, HAS_DQ=to_q, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip
    return room


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p, q, ctx.temperature, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(p, q, *output)


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    p, q, kl, state = ctx.saved_tensors
    _, to_p, to_q, *_ = ctx.needs_input_grad  # the first is the dispatch keys'
    dp, dq = _kl_backward(grad, p, q, kl, state, ctx.temperature, to_p, to_q, ctx.backend)
    return dp if to_p else None, dq if to_q else None, None


IMPLEMENTATIONS = {name: partial(_forward, name) for name in ("cpu", "triton")}

_kl = register(
    "kl_divergence(Tensor p_logits, Tensor q_logits, float temperature, str backend) "
    "-> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _results,
    setup_context=_setup_context,
    backward=_gradients,
)
_kl_backward = register_backward(
    "kl_divergence_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor kl, "
    "Tensor state, float temperature, bool to_p, bool to_q, str backend) -> (Tensor, Tensor)",
    {name: partial(_backward, name) for name in ("cpu", "triton")},
    _gradient_room,
)


def kl_divergence(
    p_logits: Tensor,  # (..., V)
    q_logits: Tensor,  # (..., V)
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """KL(p || q) in nats, p = softmax(p_logits / temperature) and q likewise.

    Args:
        p_logits: (..., V), fp32, bf16, fp16 or fp64; any strides; not modified.
        q_logits: the same shape, dtype and device.
        temperature: above 0, of both.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and p_logits' device.

    Returns:
        (...), fp32, or fp64 for fp64 logits; never negative, +inf where q is 0 and p is not.
        Differentiable in both arguments; a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "kl_divergence"
    check_float(op, "p_logits", p_logits)
    check_float(op, "q_logits", q_logits)
    if p_logits.dim() < 1 or p_logits.shape[-1] < 1:
        raise ValueError(f"{op}: p_logits must have shape (..., V), got {tuple(p_logits.shape)}")
    check_shape(op, "q_logits", q_logits, p_logits.shape)
    check_device(op, "q_logits", q_logits, p_logits.device)
    if q_logits.dtype != p_logits.dtype:
        raise ValueError(
            f"{op}: q_logits must be {p_logits.dtype} like p_logits, got {q_logits.dtype}"
        )
    check_number(op, "temperature", temperature, low=0.0, high=float("inf"), open_low=True)
    backend = choose(op, (p_logits, q_logits), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return kl_divergence_ref(p_logits, q_logits, temperature=temperature)
    # Rows two dimensions deep, so that logits[:, :-1] is read where it lies.
    rows = p_logits.shape[:-1]
    deep = len(rows)
    if deep not in (1, 2):
        p_logits, q_logits = (
            x.unsqueeze(0) if deep == 0 else x.flatten(0, -3) for x in (p_logits, q_logits)
        )
    kl, _ = _kl(p_logits, q_logits, float(temperature), backend)
    result: Tensor = kl if deep in (1, 2) else kl.reshape(rows)
    return result
