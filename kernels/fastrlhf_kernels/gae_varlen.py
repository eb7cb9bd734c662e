"""Generalised advantage estimation over packed sequences.

As gae, for sequences laid end to end: sequence g is the steps cu_seqlens[g] to cu_seqlens[g + 1].

    advantage_t = reward_t + gamma * value_{t+1} - value_t + gamma * lam * advantage_{t+1}
    return_t    = advantage_t + value_t

with value and advantage 0 after each sequence's end.

Shapes: rewards, values (sum T,), cu_seqlens (G + 1,) int32 or int64, from 0 to sum T, not
decreasing (empty sequences are fine); advantages and returns (sum T,). Dtypes: fp32, bf16, fp16 or
fp64; arithmetic and results are fp32, or fp64 if an argument is. No gradient: results are detached.

Promises: a sequence's result does not depend on which others it is packed with, and is the result
of gae for the same sequence.

Source: Schulman et al. 2016, equations 11 to 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import (
    check_device,
    check_dims,
    check_float,
    check_integer,
    check_like,
    check_number,
    check_values,
)
from ._library import register
from ._native import pointer
from ._triton import AotConfig, jit, launch, on_device, tl
from .gae import BLOCK_T, NUM_WARPS, gae_ref, gae_row, results


def gae_varlen_ref(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The specification; arguments as in `gae_varlen`."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if rewards.numel() == 0:
        advantages, returns = gae_ref(rewards[None], values[None])
        return advantages[0], returns[0]
    slots = torch.arange(int(lengths.max()), device=rewards.device)
    mask = slots < lengths[:, None]
    index = torch.where(mask, cu_seqlens[:-1, None] + slots, 0).long()
    advantages, returns = gae_ref(rewards[index], values[index], mask, gamma=gamma, lam=lam)
    return advantages[mask], returns[mask]


def check_cu_seqlens(op: str, cu_seqlens: Tensor, total: int) -> None:
    """Offsets run from 0 to `total` and do not decrease; reads values, see `_checks`."""
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
    ok = ends & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    check_values(op, "cu_seqlens", ok, f"offsets from 0 to {total}, not decreasing")


@jit()
def _gae_varlen_kernel(
    rewards, values, cu_seqlens, advantages, returns,  # pointers
    gamma_lam, gamma_rest,  # constants
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    gae_row(
        rewards + first, values + first, None, None, advantages + first, returns + first,
        end - first,
        gamma_lam, gamma_rest,
        False, False, False, BLOCK_T,
    )  # fmt: skip


AOT_CONFIGS = [
    AotConfig(
        f"{dtype}, offsets {offsets}",
        _gae_varlen_kernel,
        dict.fromkeys(("rewards", "values"), f"*{dtype}")
        | dict.fromkeys(("advantages", "returns"), "*fp32")
        | {"cu_seqlens": f"*{offsets}", "gamma_lam": "fp32", "gamma_rest": "fp32"},
        {"BLOCK_T": BLOCK_T},
        num_warps=NUM_WARPS,
    )
    for dtype, offsets in (("fp32", "i64"), ("bf16", "i32"))
]


def _gae_varlen_triton(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    check_cu_seqlens("gae_varlen", cu_seqlens, rewards.shape[0])
    advantages, returns = results(rewards, values)
    G = cu_seqlens.shape[0] - 1
    if G == 0:
        return advantages, returns
    with on_device(rewards):
        launch(_gae_varlen_kernel, (G,))(
            rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous(), advantages, returns,
            gamma * lam, gamma * (1.0 - lam),
            BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
        )  # fmt: skip
    return advantages, returns


def _gae_varlen_native(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    check_cu_seqlens("gae_varlen", cu_seqlens, rewards.shape[0])
    advantages, returns = results(rewards, values)
    dtype = advantages.dtype
    r = rewards.to(dtype).contiguous()
    v = values.to(dtype).contiguous()
    offsets = cu_seqlens.to(torch.int64).contiguous()
    _native.call(
        "gae_varlen", advantages,
        pointer(r), pointer(v), pointer(offsets), pointer(advantages), pointer(returns),
        offsets.shape[0] - 1,
        gamma, lam, _native.DTYPE_TAGS[dtype],
    )  # fmt: skip
    return advantages, returns


def _gae_varlen_fake(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    return results(rewards, values)


IMPLEMENTATIONS = {
    "cpu": _gae_varlen_native,
    "triton": _gae_varlen_triton,
    "cuda": _gae_varlen_native,
}

_gae_varlen = register(
    "gae_varlen(Tensor rewards, Tensor values, Tensor cu_seqlens, float gamma, float lam, "
    "str backend) -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _gae_varlen_fake,
)


def gae_varlen(
    rewards: Tensor,  # (sum T,)
    values: Tensor,  # (sum T,)
    cu_seqlens: Tensor,  # (G + 1,)
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed sequences by generalised advantage estimation.

    Args:
        rewards: (sum T,), the reward of each step, sequences laid end to end.
        values: (sum T,), the value of the state before each step.
        cu_seqlens: (G + 1,), int32 or int64, where each sequence begins, and the end of the last.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        (advantages, returns), both (sum T,), detached; fp32, or fp64 if an argument is.

    Raises:
        ValueError: a shape, dtype, device, setting or offset is wrong (offsets: for CPU tensors;
            on a GPU with FASTRLHF_DEBUG=1).
    """
    op = "gae_varlen"
    check_float(op, "rewards", rewards)
    check_dims(op, "rewards", rewards, 1, "(sum T,)")
    check_like(op, "values", values, rewards)
    check_integer(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (G + 1,), got {tuple(cu_seqlens.shape)}"
        )
    check_device(op, "cu_seqlens", cu_seqlens, rewards.device)
    check_number(op, "gamma", gamma, low=0.0, high=1.0)
    check_number(op, "lam", lam, low=0.0, high=1.0)
    backend = choose(op, (rewards, values), backend, IMPLEMENTATIONS)
    if backend == "ref":
        check_cu_seqlens(op, cu_seqlens, rewards.shape[0])
        return gae_varlen_ref(rewards, values, cu_seqlens, gamma=gamma, lam=lam)
    return _gae_varlen(rewards, values, cu_seqlens, gamma, lam, backend)
