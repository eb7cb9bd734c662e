"""Generalised advantage estimation over padded sequences.

    delta_t     = reward_t + gamma * value_{t+1} - value_t
    advantage_t = delta_t + gamma * lam * advantage_{t+1}
    return_t    = advantage_t + value_t

Value and advantage after the end are 0. Steps outside `mask` are treated in one of two ways:

- masked="skip": stepped over, as if cut out of the sequence (verl).
- masked="decay": their rewards and values count as 0 and the recursion runs through them, so that
  each costs a factor gamma * lam (OpenRLHF). With `value_mask`, values count where it is set and
  rewards where `mask` is (TRL's PPO, whose values live one step longer).

Shapes: rewards, values, mask, value_mask (B, T); advantages and returns (B, T). Dtypes: fp32, bf16,
fp16 or fp64; arithmetic and results are fp32, or fp64 if an argument is. No gradient: advantages
and returns are data to PPO, and come out detached.

Promises: advantages are 0 outside `mask`; returns are 0 outside `mask`, or outside `value_mask`
where that is given. NaN in a masked slot reaches nothing. A row's result does not depend on which
other rows are in the batch.

The recursion is one affine scan of a scalar, which is how the GPU runs it. Let
U_t = gamma * value_t + gamma * lam * advantage_t be what step t hands to the one before. Then

    advantage_t = reward_t - value_t + U_{t+1}
    U_t         = gamma * lam * U_{t+1} + gamma * lam * reward_t + gamma * (1 - lam) * value_t

and a step that is stepped over has U_t = U_{t+1}.

Source: Schulman et al. 2016, equations 11 to 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import (
    as_mask,
    check_choice,
    check_dims,
    check_float,
    check_like,
    check_number,
    compute_dtype,
)
from ._library import register
from ._native import pointer
from ._triton import AotConfig, jit, launch, on_device, tl

# On an H200, 8192 x 2048 (bench/sweep.py): 128 steps a warp 2.65 TB/s, 256 2.55, 512 2.47; two
# warps 2.08 to 2.30. The width fixes the order of the scan: another gives other last bits.
BLOCK_T = 128
NUM_WARPS = 1  # a warp a row: no shared memory, no barrier


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    masked: str = "skip",
    value_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification; arguments as in `gae`."""
    dtype = compute_dtype(rewards, values)
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    value_valid = valid if value_mask is None else value_mask != 0
    r = torch.where(valid, rewards.detach(), 0.0).to(dtype)
    v = torch.where(value_valid, values.detach(), 0.0).to(dtype)
    advantage = r.new_zeros(r.shape[0])
    next_value = r.new_zeros(r.shape[0])
    raw = torch.zeros_like(r)
    for t in range(r.shape[1] - 1, -1, -1):
        stepped = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * advantage
        if masked == "skip":
            advantage = torch.where(valid[:, t], stepped, advantage)
            next_value = torch.where(valid[:, t], v[:, t], next_value)
        else:
            advantage, next_value = stepped, v[:, t]
        raw[:, t] = advantage
    return torch.where(valid, raw, 0.0), torch.where(value_valid, raw + v, 0.0)


@jit()
def _compose(right_c, right_d, left_c, left_d):
    # U -> c * U + d of the right part, then of the left
    return right_c * left_c, right_d * left_c + left_d


@jit()
def scan_tile(r, v, runs, carry, lane, gamma_lam, gamma_rest):
    """U_{t+1} of each lane's t, given each lane's step t + 1, and U of the tile's left edge.

    `runs`: the recursion passes through step t + 1; `carry`: U just right of the tile.
    """
    c = tl.where(runs, gamma_lam, 1.0)
    d = tl.where(runs, gamma_lam * r + gamma_rest * v, 0.0)
    c, d = tl.associative_scan((c, d), 0, _compose, reverse=True)
    after = c * carry + d
    return after, tl.sum(tl.where(lane == 0, after, 0.0))


@jit()
def _load_steps(
    rewards, values, mask, value_mask, t, T,
    HAS_MASK: tl.constexpr, HAS_VALUE_MASK: tl.constexpr,
):  # fmt: skip
    # rewards and values in fp32, 0 where they do not count; masked slots are not read
    valid = t < T
    value_valid = valid
    if HAS_MASK:
        valid = tl.load(mask + t, mask=t < T, other=0) != 0
        value_valid = valid
    if HAS_VALUE_MASK:
        value_valid = tl.load(value_mask + t, mask=t < T, other=0) != 0
    r = tl.load(rewards + t, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(values + t, mask=value_valid, other=0.0).to(tl.float32)
    return r, v, valid, value_valid


@jit()
def gae_row(
    rewards, values, mask, value_mask, advantages, returns,  # pointers to the sequence
    T,  # size
    gamma_lam, gamma_rest,  # constants: gamma * lam, gamma * (1 - lam)
    HAS_MASK: tl.constexpr, HAS_VALUE_MASK: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One sequence, in tiles from right to left; a tile's maps are composed by a scan."""
    lane = tl.arange(0, BLOCK_T)
    n_tiles = tl.cdiv(T, BLOCK_T)
    carry = 0.0  # U just right of the tile
    for i in range(n_tiles):
        t = (n_tiles - 1 - i) * BLOCK_T + lane
        # A lane scans the map of the step after its own, so that the scan gives it U_{t+1}. All but
        # one of these loads are the tile's own, from cache.
        r, v, valid, value_valid = _load_steps(
            rewards, values, mask, value_mask, t + 1, T, HAS_MASK, HAS_VALUE_MASK
        )
        runs = t + 1 < T if DECAY else valid
        after, carry = scan_tile(r, v, runs, carry, lane, gamma_lam, gamma_rest)
        r, v, valid, value_valid = _load_steps(
            rewards, values, mask, value_mask, t, T, HAS_MASK, HAS_VALUE_MASK
        )
        advantage = r - v + after
        tl.store(advantages + t, tl.where(valid, advantage, 0.0), mask=t < T)
        tl.store(returns + t, tl.where(value_valid, advantage + v, 0.0), mask=t < T)


@jit(any_value=("T", "rewards_stride", "values_stride", "mask_stride", "value_mask_stride"))
def _gae_kernel(
    rewards, values, mask, value_mask, advantages, returns,  # pointers
    T,  # size
    rewards_stride, values_stride, mask_stride, value_mask_stride,  # between rows; results': T
    gamma_lam, gamma_rest,  # constants
    HAS_MASK: tl.constexpr, HAS_VALUE_MASK: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        mask += row * mask_stride
    if HAS_VALUE_MASK:
        value_mask += row * value_mask_stride
    gae_row(
        rewards + row * rewards_stride, values + row * values_stride, mask, value_mask,
        advantages + row * T, returns + row * T,
        T,
        gamma_lam, gamma_rest,
        HAS_MASK, HAS_VALUE_MASK, DECAY, BLOCK_T,
    )  # fmt: skip


_TYPES = (
    dict.fromkeys(("rewards", "values", "advantages", "returns"), "*fp32")
    | dict.fromkeys(("T", "rewards_stride", "values_stride"), "i32")
    | dict.fromkeys(("mask_stride", "value_mask_stride"), "i32")
    | dict.fromkeys(("gamma_lam", "gamma_rest"), "fp32")
)
_FLAGS = {"HAS_MASK": False, "HAS_VALUE_MASK": False, "DECAY": False, "BLOCK_T": BLOCK_T}

AOT_CONFIGS = [
    AotConfig(
        "skip, no mask",
        _gae_kernel,
        _TYPES,
        _FLAGS | {"mask": None, "value_mask": None},
        num_warps=NUM_WARPS,
    ),
    AotConfig(
        "skip, mask, bf16",
        _gae_kernel,
        _TYPES | {"rewards": "*bf16", "values": "*bf16", "mask": "*u8"},
        _FLAGS | {"HAS_MASK": True, "value_mask": None},
        num_warps=NUM_WARPS,
    ),
    AotConfig(
        "decay, both masks",
        _gae_kernel,
        _TYPES | {"mask": "*u8", "value_mask": "*u8"},
        _FLAGS | {"HAS_MASK": True, "HAS_VALUE_MASK": True, "DECAY": True},
        num_warps=NUM_WARPS,
    ),
]


def results(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Room for advantages and returns; both ops' fake too."""
    advantages = rewards.new_empty(rewards.shape, dtype=compute_dtype(rewards, values))
    return advantages, torch.empty_like(advantages)


def rows(x: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """`x` in `dtype`, dense along T, and its stride between rows; (None, 0) for None."""
    if x is None:
        return None, 0
    # A bool is a byte, 0 or 1: seen as such, not copied.
    x = x.view(torch.uint8) if dtype == torch.uint8 else x.to(dtype)
    x = _native.with_unit_stride(x)
    return x, x.stride(0)


def _gae_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    value_mask: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    advantages, returns = results(rewards, values)
    B, T = rewards.shape
    if B == 0 or T == 0:
        return advantages, returns
    r, rewards_stride = rows(rewards, rewards.dtype)
    v, values_stride = rows(values, values.dtype)
    m, mask_stride = rows(mask, torch.uint8)
    w, value_mask_stride = rows(value_mask, torch.uint8)
    with on_device(rewards):
        launch(_gae_kernel, (B,))(
            r, v, m, w, advantages, returns,
            T,
            rewards_stride, values_stride, mask_stride, value_mask_stride,
            gamma * lam, gamma * (1.0 - lam),
            HAS_MASK=m is not None, HAS_VALUE_MASK=w is not None, DECAY=masked == "decay",
            BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
        )  # fmt: skip
    return advantages, returns


def _gae_native(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    value_mask: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    advantages, returns = results(rewards, values)
    dtype = advantages.dtype
    B, T = rewards.shape
    r, rewards_stride = rows(rewards, dtype)
    v, values_stride = rows(values, dtype)
    m, mask_stride = rows(mask, torch.uint8)
    w, value_mask_stride = rows(value_mask, torch.uint8)
    _native.call(
        "gae", advantages,
        pointer(r), pointer(v), pointer(m), pointer(w), pointer(advantages), pointer(returns),
        B, T,
        rewards_stride, values_stride, mask_stride, value_mask_stride, T, T,
        gamma, lam, int(masked == "decay"), _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return advantages, returns


def _gae_fake(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    value_mask: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return results(rewards, values)


IMPLEMENTATIONS = {"cpu": _gae_native, "triton": _gae_triton, "cuda": _gae_native}

_gae = register(
    "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? value_mask, float gamma, float lam, "
    "str masked, str backend) -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _gae_fake,
)


def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    masked: str = "skip",
    value_mask: Tensor | None = None,  # (B, T)
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of padded sequences by generalised advantage estimation.

    Args:
        rewards: (B, T), the reward of each step.
        values: (B, T), the value of the state before each step.
        mask: (B, T), bool, int or float; nonzero is valid; None: every step is.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
        masked: "skip" or "decay", what a masked step does to the recursion; see the module.
        value_mask: (B, T), where values count, if not where rewards do; with "decay" only.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        (advantages, returns), both (B, T), detached; fp32, or fp64 if an argument is.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.
    """
    op = "gae"
    check_float(op, "rewards", rewards)
    check_dims(op, "rewards", rewards, 2, "(B, T)")
    check_like(op, "values", values, rewards)
    valid = as_mask(op, "mask", mask, rewards)
    value_valid = as_mask(op, "value_mask", value_mask, rewards)
    check_number(op, "gamma", gamma, low=0.0, high=1.0)
    check_number(op, "lam", lam, low=0.0, high=1.0)
    check_choice(op, "masked", masked, ("skip", "decay"))
    if value_valid is not None and masked == "skip":
        raise ValueError(f"{op}: value_mask needs masked='decay'; 'skip' has one mask for both")
    backend = choose(op, (rewards, values), backend, IMPLEMENTATIONS)
    if backend == "ref":
        return gae_ref(
            rewards, values, valid, gamma=gamma, lam=lam, masked=masked, value_mask=value_valid
        )
    return _gae(rewards, values, valid, value_valid, gamma, lam, masked, backend)
