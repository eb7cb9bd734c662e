"""Token rewards of RLHF: the KL penalty at every valid token, the score at the last.

    reward_t = -beta * kl_t                                      at valid t
    reward_t = -beta * kl_t + clamp(score, -clip, clip)          at the last valid t

Shapes: scores (B,), kl and mask (B, T); the result (B, T). Dtypes: fp32, bf16, fp16 or fp64;
arithmetic and the result are fp32, or fp64 if an argument is. Gradients reach scores and kl.

Promises: masked slots are 0, and NaN there reaches neither values nor gradients. A row with no
valid token is all 0, and its score gets no gradient; nor does a clamped score. The mask may have
holes. A row's result does not depend on the other rows.

Source: Ouyang et al. 2022, section 3.5; Ziegler et al. 2019, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import (
    as_mask,
    check_device,
    check_dims,
    check_finite,
    check_float,
    check_number,
    check_shape,
    compute_dtype,
)
from ._library import register, register_backward
from ._native import pointer
from ._triton import AotConfig, jit, launch, on_device, tl

BLOCK_T = 1024  # not tuned; bench/bench_shape_rewards.py on a GPU would


def shape_rewards_ref(
    scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float, clip: float | None = None
) -> Tensor:
    """The specification; arguments as in `shape_rewards`."""
    dtype = compute_dtype(scores, kl)
    valid = mask != 0
    s = torch.where(valid.any(-1), scores, 0.0).to(dtype)
    if clip is not None:
        s = s.clamp(-clip, clip)
    rewards = -beta * torch.where(valid, kl, 0.0).to(dtype)
    after = valid.flip(-1).cumsum(-1).flip(-1)  # valid tokens from t on: 1 at the last of them
    return rewards + torch.where(valid & (after == 1), s[:, None], 0.0)


@jit()
def _last_valid(mask, T, BLOCK_T: tl.constexpr):
    # of a row; -1 if no token is valid
    last = -1
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = tl.load(mask + t, mask=t < T, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(valid, t, -1)))
    return last


@jit(any_value=("T", "kl_stride", "mask_stride"))
def _shape_rewards_kernel(
    scores, kl, mask, rewards,  # pointers
    T,  # size
    kl_stride, mask_stride,  # between rows; that of rewards is T
    minus_beta, clip,  # constants
    HAS_CLIP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mask += row * mask_stride
    last = _last_valid(mask, T, BLOCK_T)
    score = tl.load(scores + row).to(tl.float32)
    if HAS_CLIP:
        score = tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = tl.load(mask + t, mask=t < T, other=0) != 0
        x = tl.load(kl + row * kl_stride + t, mask=valid, other=0.0).to(tl.float32)
        reward = tl.where(valid, minus_beta * x, 0.0) + tl.where(t == last, score, 0.0)
        tl.store(rewards + row * T + t, reward, mask=t < T)


@jit(any_value=("T", "mask_stride"))
def _shape_rewards_backward_kernel(
    grad, scores, mask, d_scores, d_kl,  # pointers
    T,  # size
    mask_stride,  # between rows; that of grad and d_kl is T
    minus_beta, clip,  # constants
    HAS_CLIP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mask += row * mask_stride
    grad += row * T
    last = _last_valid(mask, T, BLOCK_T)
    passes = last >= 0
    if HAS_CLIP:
        passes = passes & (tl.abs(tl.load(scores + row).to(tl.float32)) <= clip)
    tl.store(d_scores + row, tl.load(grad + last, mask=passes, other=0.0))
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        valid = tl.load(mask + t, mask=t < T, other=0) != 0
        g = tl.load(grad + t, mask=valid, other=0.0)
        tl.store(d_kl + row * T + t, tl.where(valid, minus_beta * g, 0.0), mask=t < T)


def _aot_configs() -> list[AotConfig]:
    configs = []
    for dtype in ("fp32", "bf16"):
        for has_clip in (False, True):
            numbers = {"T": "i32", "mask_stride": "i32", "minus_beta": "fp32", "clip": "fp32"}
            flags = {"HAS_CLIP": has_clip, "BLOCK_T": BLOCK_T}
            name = f"{dtype}, {'clip' if has_clip else 'no clip'}"
            forward = {"scores": f"*{dtype}", "kl": f"*{dtype}", "mask": "*u8", "rewards": "*fp32"}
            backward = dict.fromkeys(("grad", "d_scores", "d_kl"), "*fp32")
            backward |= {"scores": f"*{dtype}", "mask": "*u8"}
            configs += [
                AotConfig(
                    name,
                    _shape_rewards_kernel,
                    forward | numbers | {"kl_stride": "i32"},
                    flags,
                ),
                AotConfig(
                    f"backward, {name}", _shape_rewards_backward_kernel, backward | numbers, flags
                ),
            ]
    return configs


AOT_CONFIGS = _aot_configs()


def _result(scores: Tensor, kl: Tensor) -> Tensor:
    return kl.new_empty(kl.shape, dtype=compute_dtype(scores, kl))


def _gradients(grad: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=grad.dtype), grad.new_empty(grad.shape)


def _shape_rewards_triton(
    scores: Tensor, kl: Tensor, mask: Tensor, beta: float, clip: float | None
) -> Tensor:
    rewards = _result(scores, kl)
    B, T = kl.shape
    if B == 0 or T == 0:
        return rewards
    x = _native.with_unit_stride(kl)
    valid = _native.with_unit_stride(mask).view(torch.uint8)
    with on_device(kl):
        launch(_shape_rewards_kernel, (B,))(
            scores.contiguous(), x, valid, rewards,
            T,
            x.stride(0), valid.stride(0),
            -beta, clip or 0.0,
            HAS_CLIP=clip is not None, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return rewards


def _shape_rewards_native(
    scores: Tensor, kl: Tensor, mask: Tensor, beta: float, clip: float | None
) -> Tensor:
    rewards = _result(scores, kl)
    B, T = kl.shape
    s = scores.to(rewards.dtype).contiguous()
    x = _native.with_unit_stride(kl.to(rewards.dtype))
    valid = _native.with_unit_stride(mask)
    _native.call(
        "shape_rewards", rewards,
        pointer(s), pointer(x), pointer(valid), pointer(rewards),
        B, T,
        x.stride(0), valid.stride(0),
        beta, -1.0 if clip is None else clip, _native.DTYPE_TAGS[rewards.dtype],
    )  # fmt: skip
    return rewards


def _backward_triton(
    grad: Tensor, scores: Tensor, mask: Tensor, beta: float, clip: float | None
) -> tuple[Tensor, Tensor]:
    d_scores, d_kl = _gradients(grad, scores)
    B, T = grad.shape
    if B == 0 or T == 0:
        return d_scores.zero_(), d_kl
    valid = _native.with_unit_stride(mask).view(torch.uint8)
    with on_device(grad):
        launch(_shape_rewards_backward_kernel, (B,))(
            grad.contiguous(), scores.contiguous(), valid, d_scores, d_kl,
            T,
            valid.stride(0),
            -beta, clip or 0.0,
            HAS_CLIP=clip is not None, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return d_scores, d_kl


def _backward_native(
    grad: Tensor, scores: Tensor, mask: Tensor, beta: float, clip: float | None
) -> tuple[Tensor, Tensor]:
    d_scores, d_kl = _gradients(grad, scores)
    B, T = grad.shape
    g = grad.contiguous()
    s = scores.to(grad.dtype).contiguous()
    valid = _native.with_unit_stride(mask)
    _native.call(
        "shape_rewards_backward", grad,
        pointer(g), pointer(s), pointer(valid), pointer(d_scores), pointer(d_kl),
        B, T,
        valid.stride(0),
        beta, -1.0 if clip is None else clip, _native.DTYPE_TAGS[grad.dtype],
    )  # fmt: skip
    return d_scores, d_kl


def _shape_rewards_fake(
    scores: Tensor, kl: Tensor, mask: Tensor, beta: float, clip: float | None, backend: str
) -> Tensor:
    return _result(scores, kl)


def _backward_fake(
    grad: Tensor, scores: Tensor, mask: Tensor, beta: float, clip: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, scores)


IMPLEMENTATIONS = {"cpu": _shape_rewards_native, "triton": _shape_rewards_triton}

_shape_rewards_backward = register_backward(
    "shape_rewards_backward(Tensor grad, Tensor scores, Tensor mask, float beta, float? clip, "
    "str backend) -> (Tensor, Tensor)",
    {"cpu": _backward_native, "triton": _backward_triton},
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, kl, mask, ctx.beta, ctx.clip, ctx.backend = inputs
    ctx.kl_dtype = kl.dtype
    ctx.save_for_backward(scores, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scores, mask = ctx.saved_tensors
    d_scores, d_kl = _shape_rewards_backward(grad, scores, mask, ctx.beta, ctx.clip, ctx.backend)
    return d_scores.to(scores.dtype), d_kl.to(ctx.kl_dtype), None, None, None


_shape_rewards = register(
    "shape_rewards(Tensor scores, Tensor kl, Tensor mask, float beta, float? clip, str backend) "
    "-> Tensor",
    IMPLEMENTATIONS,
    _shape_rewards_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def shape_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    beta: float,
    clip: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Token rewards: -beta * kl at valid tokens, plus the score at the last valid one.

    Args:
        scores: (B,), one reward-model score a sequence.
        kl: (B, T), per-token KL estimates (`kl_penalty`).
        mask: (B, T), bool, int or float; nonzero is valid.
        beta: weight of the penalty.
        clip: scores are clamped to [-clip, clip]; above 0; None leaves them.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        Rewards (B, T), 0 at masked slots; fp32, or fp64 if an argument is. Differentiable in
        `scores` and `kl`; a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "shape_rewards"
    check_float(op, "kl", kl)
    check_dims(op, "kl", kl, 2, "(B, T)")
    check_float(op, "scores", scores)
    check_shape(op, "scores", scores, kl.shape[:1])
    check_device(op, "scores", scores, kl.device)
    valid = as_mask(op, "mask", mask, kl)
    if valid is None:
        raise ValueError(f"{op}: mask must be a tensor, got None")
    check_number(op, "beta", beta)
    check_finite(op, "beta", beta)
    if clip is not None:
        check_number(op, "clip", clip, low=0.0, open_low=True)
    backend = choose(op, (kl, scores), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return shape_rewards_ref(scores, kl, valid, beta=beta, clip=clip)
    return _shape_rewards(scores, kl, valid, beta, clip, backend)
