"""Per-token estimates of KL(policy || reference) from log-probs of the tokens taken.

    d = logprobs - ref_logprobs
    k1: d      k2: d^2 / 2      k3: expm1(min(-d, 20)) + d      abs: |d|

Shapes: logprobs and ref_logprobs the same, any; the result like them. Dtypes: fp32, bf16, fp16 or
fp64; arithmetic and the result are fp32, or fp64 if an argument is. Gradients reach both arguments.

Promises: in k3 the exponent is clamped at 20, the exponential's gradient is 0 beyond, so the result
and both gradients are finite for finite input. |d| has gradient 0 at d = 0. An entry's result does
not depend on the others.

Near d = 0 k3 is d^2 / 2 - d^3 / 6 + ..., far smaller than its two terms: the kernels sum that
series, where the reference loses digits.

Source: J. Schulman, "Approximating KL divergence", 2020 (k1 to k3); Ouyang et al. 2022, section 3.5
uses k1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import check_choice, check_float, check_like, compute_dtype
from ._library import register, register_backward
from ._native import dense
from ._triton import AotConfig, exp, jit, launch, on_device, tl

BLOCK_N = 1024  # not tuned; bench/bench_kl_penalty.py on a GPU would
ESTIMATORS = ("k1", "k2", "k3", "abs")
K3_MAX_EXPONENT = 20.0  # expm1(20) is 4.9e8: far past any sane KL, far from fp32's overflow at 88


def kl_penalty_ref(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """The specification; arguments as in `kl_penalty`."""
    dtype = compute_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        return torch.expm1((-d).clamp(max=K3_MAX_EXPONENT)) + d
    return d.abs()


@jit()
def _exponent(d, MAX_EXPONENT: tl.constexpr):
    # k3's exponent x, and near 0, where `near` is set, x again and exp(x) - 1 - x as a series
    x = tl.where(-d > MAX_EXPONENT, MAX_EXPONENT, -d)  # a NaN stays
    near = tl.abs(x) < 0.69
    y = tl.where(near, x, 0.0)
    s = y * (1.0 / 10.0) + 1.0
    s = s * y * (1.0 / 9.0) + 1.0
    s = s * y * (1.0 / 8.0) + 1.0
    s = s * y * (1.0 / 7.0) + 1.0
    s = s * y * (1.0 / 6.0) + 1.0
    s = s * y * (1.0 / 5.0) + 1.0
    s = s * y * (1.0 / 4.0) + 1.0
    s = s * y * (1.0 / 3.0) + 1.0
    return x, near, y, 0.5 * y * y * s


@jit()
def _estimate(d, ESTIMATOR: tl.constexpr, MAX_EXPONENT: tl.constexpr):
    if ESTIMATOR == "k2":
        d = 0.5 * d * d
    if ESTIMATOR == "k3":
        x, near, _, series = _exponent(d, MAX_EXPONENT)
        d = tl.where(near, series, (exp(x) - 1.0) + d)
    if ESTIMATOR == "abs":
        d = tl.abs(d)
    return d


@jit()
def _slope(d, ESTIMATOR: tl.constexpr, MAX_EXPONENT: tl.constexpr):
    slope = d  # k2
    if ESTIMATOR == "k1":
        slope = tl.full(d.shape, 1.0, tl.float32)
    if ESTIMATOR == "k3":
        x, near, y, series = _exponent(d, MAX_EXPONENT)
        slope = tl.where(near, -y - series, 1.0 - exp(x))
        slope = tl.where(-d > MAX_EXPONENT, 1.0, slope)
    if ESTIMATOR == "abs":
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    return slope


@jit(any_value=("N",))
def _kl_penalty_kernel(
    grad, logprobs, ref_logprobs, out,  # pointers
    N,  # size
    ESTIMATOR: tl.constexpr, MAX_EXPONENT: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(logprobs + i, mask=i < N, other=0.0).to(tl.float32)
    y = tl.load(ref_logprobs + i, mask=i < N, other=0.0).to(tl.float32)
    if BACKWARD:
        g = tl.load(grad + i, mask=i < N, other=0.0)
        result = g * _slope(x - y, ESTIMATOR, MAX_EXPONENT)
    else:
        result = _estimate(x - y, ESTIMATOR, MAX_EXPONENT)
    tl.store(out + i, result, mask=i < N)


AOT_CONFIGS = [
    AotConfig(
        f"{estimator}, {'backward' if backward else 'forward'}, {dtype}",
        _kl_penalty_kernel,
        dict.fromkeys(("logprobs", "ref_logprobs"), f"*{dtype}")
        | {"out": "*fp32", "N": "i32"}
        | ({"grad": "*fp32"} if backward else {}),
        {"ESTIMATOR": estimator, "MAX_EXPONENT": K3_MAX_EXPONENT}
        | {"BACKWARD": backward, "BLOCK_N": BLOCK_N}
        | ({} if backward else {"grad": None}),
    )
    for estimator in ESTIMATORS
    for backward in (False, True)
    for dtype in ("fp32", "bf16")
]


def _result(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    dtype = compute_dtype(logprobs, ref_logprobs)
    if logprobs.dtype is dtype and logprobs.is_contiguous():
        return torch.empty_like(logprobs)  # a microsecond less
    return logprobs.new_empty(logprobs.shape, dtype=dtype)


def _launch(grad: Tensor | None, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    out = _result(logprobs, ref_logprobs)
    N = out.numel()
    if N == 0:
        return out
    with on_device(out):
        launch(_kl_penalty_kernel, ((N + BLOCK_N - 1) // BLOCK_N,))(
            None if grad is None else grad.contiguous(),
            logprobs.contiguous(), ref_logprobs.contiguous(), out,
            N,
            ESTIMATOR=estimator, MAX_EXPONENT=K3_MAX_EXPONENT, BACKWARD=grad is not None,
            BLOCK_N=BLOCK_N,
        )  # fmt: skip
    return out


def _kl_penalty_triton(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    return _launch(None, logprobs, ref_logprobs, estimator)


def _kl_penalty_native(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    out = _result(logprobs, ref_logprobs)
    x = dense(logprobs, out.dtype)
    y = dense(ref_logprobs, out.dtype)
    _native.call(
        "kl_penalty", out,
        x.data_ptr(), y.data_ptr(), out.data_ptr(),
        out.numel(),
        ESTIMATORS.index(estimator), _native.DTYPE_TAGS[out.dtype],
    )  # fmt: skip
    return out


def _backward_native(
    grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str
) -> Tensor:
    out = _result(logprobs, ref_logprobs)
    g = grad.contiguous()
    x = dense(logprobs, out.dtype)
    y = dense(ref_logprobs, out.dtype)
    _native.call(
        "kl_penalty_backward", out,
        g.data_ptr(), x.data_ptr(), y.data_ptr(), out.data_ptr(),
        out.numel(),
        ESTIMATORS.index(estimator), _native.DTYPE_TAGS[out.dtype],
    )  # fmt: skip
    return out


def _kl_penalty_fake(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str, backend: str
) -> Tensor:
    return _result(logprobs, ref_logprobs)


def _backward_fake(
    grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str, backend: str
) -> Tensor:
    return _result(logprobs, ref_logprobs)


IMPLEMENTATIONS = {"cpu": _kl_penalty_native, "triton": _kl_penalty_triton}

_kl_penalty_backward = register_backward(
    "kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, str estimator, "
    "str backend) -> Tensor",
    {"cpu": _backward_native, "triton": _launch},
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, ctx.estimator, ctx.backend = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None
    logprobs, ref_logprobs = ctx.saved_tensors
    *_, wanted, ref_wanted = ctx.needs_input_grad
    if ctx.estimator == "k1" and not torch.is_grad_enabled():
        d = grad  # as it is: no kernel. (For a graph of gradients the op is called: it refuses.)
    else:
        d = _kl_penalty_backward(grad, logprobs, ref_logprobs, ctx.estimator, ctx.backend)
    return (
        d.to(logprobs.dtype) if wanted else None,
        (-d).to(ref_logprobs.dtype) if ref_wanted else None,
    )


_kl_penalty = register(
    "kl_penalty(Tensor logprobs, Tensor ref_logprobs, str estimator, str backend) -> Tensor",
    IMPLEMENTATIONS,
    _kl_penalty_fake,
    setup_context=_setup_context,
    backward=_backward,
    inputs=(0, 1),
)


def kl_penalty(
    logprobs: Tensor,  # (...)
    ref_logprobs: Tensor,  # (...)
    *,
    estimator: str = "k1",
    backend: str | None = None,
) -> Tensor:
    """Per-token KL estimate between the policy and the reference, at the tokens taken.

    Args:
        logprobs: the policy's log-probs, any shape, in nats.
        ref_logprobs: the reference's, of the same shape.
        estimator: k1, k2, k3 or abs.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        The estimate, shaped like `logprobs`, in nats; fp32, or fp64 if an argument is.
        Differentiable in both arguments; a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or the estimator is wrong.
    """
    op = "kl_penalty"
    check_float(op, "logprobs", logprobs)
    check_like(op, "ref_logprobs", ref_logprobs, logprobs)
    check_choice(op, "estimator", estimator, ESTIMATORS)
    backend = choose(op, (logprobs, ref_logprobs), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return kl_penalty_ref(logprobs, ref_logprobs, estimator=estimator)
    return _kl_penalty(logprobs, ref_logprobs, estimator, backend)
