"""Everything between PPO's log-probs and its advantages: KL, rewards, GAE and whitening at once.

    kl_t        = the estimate of kl_penalty for logprobs_t and ref_logprobs_t
    reward_t    = -beta * kl_t, plus the clamped score at the last valid t         (shape_rewards)
    delta_t     = reward_t + gamma * value_{t+1} - value_t
    advantage_t = delta_t + gamma * lam * advantage_{t+1},  masked steps stepped over        (gae)
    return_t    = advantage_t + value_t
    advantages  : whitened over all valid entries, if asked                               (whiten)

Shapes: logprobs, ref_logprobs, values, mask (B, T), scores (B,); the four results (B, T). Dtypes:
fp32, bf16, fp16 or fp64; arithmetic and results are fp32, or fp64 if an argument is. No gradient:
results are data to PPO, and come out detached.

Promises: masked slots are 0 in all four results, and NaN there reaches nothing. A row with no valid
token is all 0, whatever its score. The mask may have holes. A row's kl, rewards and returns, and
its advantages before whitening, do not depend on the other rows. They have the bits of kl_penalty
(0 at masked slots), shape_rewards and gae called one after the other on the same backend; so have
whitened advantages in `ref` and `cpu`. On a GPU they differ from whiten's in the last bits: their
moments are summed row by row, not over whiten's tiles.

On a GPU it is one launch, and a second one to whiten; over 256 rows, one program between the two
merges the rows' moments. With `group`, ranks exchange their moments as in whiten.

Source: Ouyang et al. 2022, section 3.5; Schulman et al. 2016, equations 11 to 16; Ziegler et al.
2019, the code released with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import (
    as_mask,
    check_choice,
    check_device,
    check_dims,
    check_float,
    check_like,
    check_number,
    check_shape,
    compute_dtype,
)
from ._groups import Group
from ._library import register
from ._losses import SUM_TILE, n_tiles
from ._moments import tile_moments
from ._native import pointer
from ._triton import AotConfig, jit, launch, on_device, tl
from .gae import BLOCK_T, NUM_WARPS, gae_ref, rows, scan_tile
from .kl_penalty import ESTIMATORS, K3_MAX_EXPONENT, _estimate, kl_penalty_ref
from .shape_rewards import shape_rewards_ref
from .whiten import apply_triton, whiten_ref
from .whiten import whiten as whiten_op

EPS = 1e-8  # whiten's default


class RolloutAdvantages(NamedTuple):
    """What `rollout_advantages` returns; each is (B, T), 0 at masked slots, detached."""

    advantages: Tensor
    """GAE's, whitened if asked."""
    returns: Tensor
    """Unwhitened advantages plus values."""
    rewards: Tensor
    """-beta * kl, plus the score at the last valid token."""
    kl: Tensor
    """The estimate at each token, in nats."""


def rollout_advantages_ref(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    estimator: str = "k1",
    score_clip: float | None = None,
    whiten: bool = True,
    group: Group | None = None,
) -> RolloutAdvantages:
    """The specification; arguments as in `rollout_advantages`."""
    dtype = compute_dtype(logprobs, ref_logprobs, values, scores)
    x, y, v, s = (t.detach().to(dtype) for t in (logprobs, ref_logprobs, values, scores))
    valid = mask != 0
    kl = torch.where(valid, kl_penalty_ref(x, y, estimator=estimator), 0.0)
    rewards = shape_rewards_ref(s, kl, valid, beta=beta, clip=score_clip)
    advantages, returns = gae_ref(rewards, v, valid, gamma=gamma, lam=lam)
    if whiten:
        advantages = whiten_ref(advantages, valid, eps=EPS, group=group)
    return RolloutAdvantages(advantages, returns, rewards, kl)


@jit()
def _load_steps(
    logprobs, ref_logprobs, values, mask, t, T, last, score, minus_beta,
    ESTIMATOR: tl.constexpr, MAX_EXPONENT: tl.constexpr,
):  # fmt: skip
    # KL, reward and value of each step, 0 where it is masked; masked slots are not read
    valid = tl.load(mask + t, mask=t < T, other=0) != 0
    x = tl.load(logprobs + t, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(ref_logprobs + t, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(values + t, mask=valid, other=0.0).to(tl.float32)
    kl = _estimate(x - y, ESTIMATOR, MAX_EXPONENT)
    r = tl.where(valid, minus_beta * kl, 0.0) + tl.where(t == last, score, 0.0)
    return kl, r, v, valid


@jit(
    any_value=("T", "logprobs_stride", "ref_logprobs_stride", "values_stride", "mask_stride"),
)
def _rollout_kernel(
    logprobs, ref_logprobs, values, scores, mask,  # pointers
    advantages, returns, rewards, kls, parts,  # and to the results
    T,  # size
    logprobs_stride, ref_logprobs_stride, values_stride, mask_stride,  # between rows; results': T
    minus_beta, clip, gamma_lam, gamma_rest,  # constants; the last are gae's
    ESTIMATOR: tl.constexpr, MAX_EXPONENT: tl.constexpr, HAS_CLIP: tl.constexpr,
    HAS_PARTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logprobs += row * logprobs_stride
    ref_logprobs += row * ref_logprobs_stride
    values += row * values_stride
    mask += row * mask_stride
    score = tl.load(scores + row).to(tl.float32)
    if HAS_CLIP:
        score = tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))
    lane = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(T, BLOCK_T)
    last = -1  # the row's last valid step, once it is met
    carry = 0.0
    n = tl.full((), 0.0, tl.float64)  # the row's moments so far
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK_T + lane
        here = tl.load(mask + t, mask=t < T, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(here, t, -1)))
        # As in gae, a lane scans the step after its own.
        _, r, v, runs = _load_steps(
            logprobs, ref_logprobs, values, mask, t + 1, T, last, score, minus_beta,
            ESTIMATOR, MAX_EXPONENT,
        )  # fmt: skip
        after, carry = scan_tile(r, v, runs, carry, lane, gamma_lam, gamma_rest)
        kl, r, v, valid = _load_steps(
            logprobs, ref_logprobs, values, mask, t, T, last, score, minus_beta,
            ESTIMATOR, MAX_EXPONENT,
        )  # fmt: skip
        advantage = tl.where(valid, r - v + after, 0.0)
        at = row * T + t
        tl.store(advantages + at, advantage, mask=t < T)
        tl.store(returns + at, tl.where(valid, advantage + v, 0.0), mask=t < T)
        tl.store(rewards + at, r, mask=t < T)
        tl.store(kls + at, kl, mask=t < T)
        if HAS_PARTS:
            tile_n, tile_mean, tile_m2 = tile_moments(advantage, valid)
            both = n + tile_n
            share = tile_n / tl.where(both > 0.0, both, 1.0)
            gap = tile_mean - mean
            m2 += tile_m2 + gap * gap * n * share
            mean += gap * share
            n = both
    if HAS_PARTS:
        tl.store(parts + 3 * row, n)
        tl.store(parts + 3 * row + 1, mean)
        tl.store(parts + 3 * row + 2, m2)


AOT_CONFIGS = [
    AotConfig(
        f"{estimator}, {'whiten' if has_parts else 'not whitened'}, {dtype}",
        _rollout_kernel,
        dict.fromkeys(("logprobs", "ref_logprobs", "values", "scores"), f"*{dtype}")
        | dict.fromkeys(("advantages", "returns", "rewards", "kls"), "*fp32")
        | {"mask": "*u8", "T": "i32"}
        | dict.fromkeys(
            ("logprobs_stride", "ref_logprobs_stride", "values_stride", "mask_stride"), "i32"
        )
        | dict.fromkeys(("minus_beta", "clip", "gamma_lam", "gamma_rest"), "fp32")
        | ({"parts": "*fp64"} if has_parts else {}),
        {"ESTIMATOR": estimator, "MAX_EXPONENT": K3_MAX_EXPONENT, "HAS_CLIP": has_parts}
        | {"HAS_PARTS": has_parts, "BLOCK_T": BLOCK_T}
        | ({} if has_parts else {"parts": None}),
        num_warps=NUM_WARPS,
    )
    for estimator in ESTIMATORS
    for has_parts, dtype in ((True, "fp32"), (False, "bf16"))
]


def _results(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for advantages, returns, rewards and KL."""
    dtype = compute_dtype(logprobs, ref_logprobs, values, scores)
    first = logprobs.new_empty(logprobs.shape, dtype=dtype)
    return first, torch.empty_like(first), torch.empty_like(first), torch.empty_like(first)


def _rollout_triton(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    beta: float,
    gamma: float,
    lam: float,
    estimator: str,
    score_clip: float | None,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, returns, rewards, kl = _results(logprobs, ref_logprobs, values, scores)
    B, T = logprobs.shape
    if B == 0 or T == 0:
        return advantages, returns, rewards, kl
    x, x_stride = rows(logprobs, logprobs.dtype)
    y, y_stride = rows(ref_logprobs, ref_logprobs.dtype)
    v, values_stride = rows(values, values.dtype)
    m, mask_stride = rows(mask, torch.uint8)
    parts = advantages.new_empty((B, 3), dtype=torch.float64) if whiten else None
    with on_device(logprobs):
        launch(_rollout_kernel, (B,))(
            x, y, v, scores.contiguous(), m,
            advantages, returns, rewards, kl, parts,
            T,
            x_stride, y_stride, values_stride, mask_stride,
            -beta, score_clip or 0.0, gamma * lam, gamma * (1.0 - lam),
            ESTIMATOR=estimator, MAX_EXPONENT=K3_MAX_EXPONENT, HAS_CLIP=score_clip is not None,
            HAS_PARTS=whiten, BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
        )  # fmt: skip
    if parts is not None:
        advantages = apply_triton(advantages, mask, parts, True, False, EPS)
    return advantages, returns, rewards, kl


def _rollout_native(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    beta: float,
    gamma: float,
    lam: float,
    estimator: str,
    score_clip: float | None,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, returns, rewards, kl = _results(logprobs, ref_logprobs, values, scores)
    dtype = kl.dtype
    B, T = kl.shape
    x, x_stride = rows(logprobs, dtype)
    y, y_stride = rows(ref_logprobs, dtype)
    v, values_stride = rows(values, dtype)
    s = scores.to(dtype).contiguous()
    m = mask.contiguous()
    parts = max(B, 1) if kl.is_cuda else n_tiles(B * T, SUM_TILE)
    scratch = kl.new_empty(3 * parts, dtype=torch.float64)
    _native.call(
        "rollout_advantages", kl,
        pointer(x), pointer(y), pointer(v), pointer(s), pointer(m),
        pointer(advantages), pointer(returns), pointer(rewards), pointer(kl), pointer(scratch),
        B, T,
        x_stride, y_stride, values_stride,
        beta, gamma, lam, -1.0 if score_clip is None else score_clip, EPS,
        ESTIMATORS.index(estimator), int(whiten), _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return advantages, returns, rewards, kl


def _rollout_fake(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    beta: float,
    gamma: float,
    lam: float,
    estimator: str,
    score_clip: float | None,
    whiten: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(logprobs, ref_logprobs, values, scores)


IMPLEMENTATIONS = {"cpu": _rollout_native, "triton": _rollout_triton, "cuda": _rollout_native}

_rollout = register(
    "rollout_advantages(Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor scores, "
    "Tensor mask, float beta, float gamma, float lam, str estimator, float? score_clip, "
    "bool whiten, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _rollout_fake,
)


def rollout_advantages(
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    scores: Tensor,  # (B,)
    mask: Tensor,  # (B, T)
    *,
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    estimator: str = "k1",
    score_clip: float | None = None,
    whiten: bool = True,
    group: Group | None = None,
    backend: str | None = None,
) -> RolloutAdvantages:
    """Advantages, returns, rewards and KL of a batch of sampled responses.

    Args:
        logprobs: (B, T), the sampling policy's log-probs of the response's tokens, in nats.
        ref_logprobs: (B, T), the reference's.
        values: (B, T), the value of the state before each token.
        scores: (B,), one reward-model score a response.
        mask: (B, T), bool, int or float; nonzero is valid.
        beta: weight of the KL penalty.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
        estimator: k1, k2, k3 or abs; see `kl_penalty`.
        score_clip: scores are clamped to [-score_clip, score_clip]; above 0; None leaves them.
        whiten: scale advantages to zero mean and unit variance over the valid entries.
        group: process group whose ranks' advantages are whitened together.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        RolloutAdvantages(advantages, returns, rewards, kl), each (B, T), 0 at masked slots,
        detached; fp32, or fp64 if an argument is.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "rollout_advantages"
    check_float(op, "logprobs", logprobs)
    check_dims(op, "logprobs", logprobs, 2, "(B, T)")
    check_like(op, "ref_logprobs", ref_logprobs, logprobs)
    check_like(op, "values", values, logprobs)
    check_float(op, "scores", scores)
    check_shape(op, "scores", scores, logprobs.shape[:1])
    check_device(op, "scores", scores, logprobs.device)
    valid = as_mask(op, "mask", mask, logprobs)
    if valid is None:
        raise ValueError(f"{op}: mask must be a tensor, got None")
    check_number(op, "beta", beta)
    check_number(op, "gamma", gamma, low=0.0, high=1.0)
    check_number(op, "lam", lam, low=0.0, high=1.0)
    check_choice(op, "estimator", estimator, ESTIMATORS)
    if score_clip is not None:
        check_number(op, "score_clip", score_clip, low=0.0, open_low=True)
    if not isinstance(whiten, bool):
        raise ValueError(f"{op}: whiten must be a bool, got {type(whiten).__name__}")
    tensors = (logprobs, ref_logprobs, values, scores)
    backend = choose(op, tensors, backend, IMPLEMENTATIONS)
    settings = (beta, gamma, lam, estimator, score_clip)
    if backend == "ref":
        return rollout_advantages_ref(
            *tensors, valid,
            beta=beta, gamma=gamma, lam=lam, estimator=estimator, score_clip=score_clip,
            whiten=whiten, group=group,
        )  # fmt: skip
    alone = whiten and group is None
    advantages, *others = _rollout(*tensors, valid, *settings, alone, backend)
    if whiten and group is not None:
        # whiten has no CUDA C++: its Triton kernels run beside ours.
        whitener = "triton" if backend == "cuda" else backend
        advantages = whiten_op(advantages, valid, eps=EPS, group=group, backend=whitener)
    return RolloutAdvantages(advantages, *others)
