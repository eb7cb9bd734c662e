"""Writes the keys and values of new tokens into a paged cache, in place.

    page, offset           = divmod(slot_n, page_size)
    k_cache[page, offset]  = k_n,   v_cache[page, offset] = v_n        (slot_n >= 0)

A slot below 0 skips its token. Slots that are not skipped must differ from each other: of two
tokens for one slot either may win.

Shapes: k, v (N, Hkv, D), N tokens, any strides; k_cache, v_cache (pages, page_size, Hkv, D), any
strides; slots (N,) int64 or int32. Dtypes: fp32, bf16, fp16 or fp64, the caches of one dtype, to
which k and v are rounded; fp64 on `ref` and `cpu`. No gradient: an argument that asks for one is
refused while gradients are recorded.

Promises: nothing of the caches is written but the slots named. A slot past the cache is refused for
CPU tensors, before anything is written; on a GPU its token is skipped. Numbers are copied, not
computed with, where the dtypes are equal.

Source: the paged cache of Kwon et al. 2023.
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
    check_no_gradient,
    check_shape,
    check_values,
    values_are_checked,
)
from ._library import register
from ._native import with_unit_stride
from ._triton import AotConfig, jit, on_device, tl

BLOCK = 1024  # elements of a program's tile; not tuned
NUM_WARPS = 4
ALIGN = 16  # elements: where all strides are multiples of it, a load takes 16 bytes or more


def append_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """The specification; arguments as in `append_kv`."""
    N = k.shape[0]
    pages, page_size = k_cache.shape[:2]
    if N == 0:
        return
    # The token that each slot gets, -1 for none; one slot more takes what is skipped.
    n_slots = pages * page_size
    skipped = (slots < 0) | (slots >= n_slots)
    target = torch.where(skipped, n_slots, slots).to(torch.int64)
    token = torch.full((n_slots + 1,), -1, device=k.device)
    token = token.scatter(0, target, torch.arange(N, device=k.device))
    token = token[:n_slots].view(pages, page_size)
    for x, cache in ((k, k_cache), (v, v_cache)):
        fresh = x.detach()[token.clamp(min=0)].to(cache.dtype)
        cache.copy_(torch.where(token[..., None, None] >= 0, fresh, cache))


@jit()
def _copy_rows(
    source, target,  # pointers, to the token and to its slot
    head, d, inside,  # the tile
    source_stride, target_stride,  # between heads
    ALIGN: tl.constexpr,
):  # fmt: skip
    rows = tl.multiple_of(head * source_stride, [ALIGN])
    x = tl.load(source + rows[:, None] + d[None, :], mask=inside)
    rows = tl.multiple_of(head * target_stride, [ALIGN])
    tl.store(target + rows[:, None] + d[None, :], x.to(target.dtype.element_ty), mask=inside)


@jit(
    any_value=(
        "HKV", "PAGES", "PAGE_SIZE",
        "k_stride", "k_head_stride", "v_stride", "v_head_stride",
        "k_page_stride", "k_slot_stride", "k_cache_head_stride",
        "v_page_stride", "v_slot_stride", "v_cache_head_stride",
    )
)  # fmt: skip
def _append_kv_kernel(
    k, v, k_cache, v_cache, slots,  # pointers
    HKV, PAGES, PAGE_SIZE,  # sizes
    k_stride, k_head_stride, v_stride, v_head_stride,  # strides
    k_page_stride, k_slot_stride, k_cache_head_stride,
    v_page_stride, v_slot_stride, v_cache_head_stride,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # One program copies BLOCK_H heads of one token.
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + n).to(tl.int64)
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (head < HKV)[:, None] & (d < D)[None, :] & (slot >= 0) & (page < PAGES)
    _copy_rows(
        k + tl.multiple_of(n * k_stride, ALIGN),
        k_cache + tl.multiple_of(page * k_page_stride + offset * k_slot_stride, ALIGN),
        head, d, inside, k_head_stride, k_cache_head_stride, ALIGN,
    )  # fmt: skip
    _copy_rows(
        v + tl.multiple_of(n * v_stride, ALIGN),
        v_cache + tl.multiple_of(page * v_page_stride + offset * v_slot_stride, ALIGN),
        head, d, inside, v_head_stride, v_cache_head_stride, ALIGN,
    )  # fmt: skip


_TYPES = (
    dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16")
    | {"slots": "*i64"}
    | dict.fromkeys(("HKV", "PAGES", "PAGE_SIZE"), "i32")
    | dict.fromkeys(("k_stride", "k_head_stride", "v_stride", "v_head_stride"), "i32")
    | dict.fromkeys(("k_page_stride", "k_slot_stride", "k_cache_head_stride"), "i32")
    | dict.fromkeys(("v_page_stride", "v_slot_stride", "v_cache_head_stride"), "i32")
)

AOT_CONFIGS = [
    AotConfig(
        "bf16, D=128",
        _append_kv_kernel,
        _TYPES,
        {"D": 128, "BLOCK_H": 8, "BLOCK_D": 128, "ALIGN": ALIGN},
        num_warps=NUM_WARPS,
    ),
    AotConfig(
        "fp32 to bf16, D=80, long strides",
        _append_kv_kernel,
        _TYPES
        | {"k": "*fp32", "v": "*fp32", "slots": "*i32"}
        | {"k_page_stride": "i64", "v_page_stride": "i64"},
        {"D": 80, "BLOCK_H": 8, "BLOCK_D": 128, "ALIGN": ALIGN},
        num_warps=NUM_WARPS,
    ),
    AotConfig(
        "fp32, D=7",
        _append_kv_kernel,
        _TYPES | dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*fp32"),
        {"D": 7, "BLOCK_H": 128, "BLOCK_D": 8, "ALIGN": 1},
        num_warps=NUM_WARPS,
    ),
]


def _slots_in_range(slots: Tensor, k_cache: Tensor) -> None:
    if values_are_checked(slots):
        n_slots = k_cache.shape[0] * k_cache.shape[1]
        check_values("append_kv", "slots", slots < n_slots, f"below pages * page_size = {n_slots}")


def _append_kv_triton(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    _slots_in_range(slots, k_cache)
    N, HKV, D = k.shape
    pages, page_size = k_cache.shape[:2]
    if k.numel() == 0 or k_cache.numel() == 0:
        return
    k, v = with_unit_stride(k), with_unit_stride(v)
    strides = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    block_d = 1 << (D - 1).bit_length()
    block_h = min(max(BLOCK // block_d, 1), 1 << (HKV - 1).bit_length())
    with on_device(k):
        _append_kv_kernel[(N, -(-HKV // block_h))](
            k, v, k_cache, v_cache, slots.contiguous(),
            HKV, pages, page_size,
            *strides,
            D=D, BLOCK_H=block_h, BLOCK_D=block_d,
            ALIGN=1 if any(s % ALIGN for s in strides) else ALIGN, num_warps=NUM_WARPS,
        )  # fmt: skip


def _append_kv_native(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """`append_kv` on the CPU without its checks, for a decode loop that has made them.

    Slots past the cache are refused all the same.
    """
    k, v = with_unit_stride(k), with_unit_stride(v)
    if k.dtype is not v.dtype:
        k, v = k.to(k_cache.dtype), v.to(k_cache.dtype)
    slots = _native.dense(slots, torch.int64)
    N, HKV, D = k.shape
    pages, page_size = k_cache.shape[:2]
    _native.call(
        "append_kv", k,
        k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(),
        N, HKV, D, pages, page_size,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        _native.DTYPE_TAGS[k.dtype], _native.DTYPE_TAGS[k_cache.dtype],
    )  # fmt: skip


def _append_kv_fake(*_: object) -> None:
    return None


IMPLEMENTATIONS = {"cpu": _append_kv_native, "triton": _append_kv_triton}

_append_kv = register(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "str backend) -> ()",
    IMPLEMENTATIONS,
    _append_kv_fake,
    mutated=(2, 3),
)


def check_caches(op: str, k_cache: Tensor, v_cache: Tensor) -> None:
    """Both (pages, page_size, Hkv, D), of one dtype, on one device, heads dense in memory."""
    check_float(op, "k_cache", k_cache)
    check_dims(op, "k_cache", k_cache, 4, "(pages, page_size, Hkv, D)")
    check_float(op, "v_cache", v_cache)
    check_shape(op, "v_cache", v_cache, k_cache.shape)
    check_device(op, "v_cache", v_cache, k_cache.device)
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"{op}: v_cache must be {k_cache.dtype} like k_cache, got {v_cache.dtype}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{op}: {name} must be dense in D, got strides {cache.stride()}")


def append_kv(
    k: Tensor,  # (N, Hkv, D)
    v: Tensor,  # (N, Hkv, D)
    k_cache: Tensor,  # (pages, page_size, Hkv, D)
    v_cache: Tensor,  # (pages, page_size, Hkv, D)
    slots: Tensor,  # (N,)
    *,
    backend: str | None = None,
) -> None:
    """Writes the keys and values of N tokens into their slots of a paged cache.

    Args:
        k: (N, Hkv, D), keys, any strides; rounded to the cache's dtype.
        v: (N, Hkv, D), values.
        k_cache: (pages, page_size, Hkv, D), written in place; dense along D.
        v_cache: like k_cache, written in place.
        slots: (N,) int64 or int32, page * page_size + offset, all different; below 0 skips.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Raises:
        ValueError: a shape, dtype or device is wrong; a slot is past the cache (CPU tensors; on a
            GPU with FASTRLHF_DEBUG=1); a tensor needs a gradient while gradients are recorded.
    """
    op = "append_kv"
    check_float(op, "k", k)
    check_dims(op, "k", k, 3, "(N, Hkv, D)")
    check_float(op, "v", v)
    check_shape(op, "v", v, k.shape)
    check_device(op, "v", v, k.device)
    check_caches(op, k_cache, v_cache)
    check_device(op, "k_cache", k_cache, k.device)
    if k_cache.shape[2:] != k.shape[1:]:
        raise ValueError(
            f"{op}: k_cache must have shape (pages, page_size, {k.shape[1]}, {k.shape[2]}) "
            f"for k {tuple(k.shape)}, got {tuple(k_cache.shape)}"
        )
    check_integer(op, "slots", slots)
    check_shape(op, "slots", slots, k.shape[:1])
    check_device(op, "slots", slots, k.device)
    check_no_gradient(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    backend = choose(op, (k, v, k_cache), backend, IMPLEMENTATIONS)
    if backend == "ref":
        _slots_in_range(slots, k_cache)
        return append_kv_ref(k, v, k_cache, v_cache, slots)
    return _append_kv(k, v, k_cache, v_cache, slots, backend)
