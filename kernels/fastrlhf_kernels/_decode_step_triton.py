"""The parts of _decode_step.py between a decode step's products, as Triton kernels.

One launch each, where torch's operations take four to nine. A program has a row (norm), a row and a
head (rope_append), or a piece of a row (gate), so that a row's result depends on that row alone.
Rows whose slot is below 0 write nothing to the cache: under a CUDA graph they are not in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import AotConfig, exp, jit, launch, on_device, tl

GATE_BLOCK = 1024


@jit(any_value=("H",))
def _norm_kernel(
    x, y, weight, out,  # pointers
    H, eps,
    HAS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    z = tl.load(x + row * H + column, mask=inside, other=0.0)
    if HAS_Y:
        z += tl.load(y + row * H + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row * H + column, z, mask=inside)
    mean = tl.div_rn(tl.sum(z * z, 0), H.to(tl.float32))
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + column, (z * scale * w).to(out.dtype.element_ty), mask=inside)


@jit()
def _head(x, norm, d, inside, scale, HAS_NORM: tl.constexpr):
    """Elements d of a head, in fp32, normalised if it has a weight."""
    z = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        z = z * scale * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    return z


@jit(
    any_value=(
        "HQ", "HKV", "PAGE_SIZE", "k_page_stride", "k_slot_stride", "k_head_stride",
        "v_page_stride", "v_slot_stride", "v_head_stride",
    )
)  # fmt: skip
def _rope_append_kernel(
    qkv, positions, slots, cos, sin, q_norm, k_norm, q_out, k_cache, v_cache,  # pointers
    HQ, HKV, PAGE_SIZE,  # sizes
    k_page_stride, k_slot_stride, k_head_stride,
    v_page_stride, v_slot_stride, v_head_stride,
    eps,
    HAS_NORM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = qkv + (n * (HQ + 2 * HKV) + head) * D
    slot = tl.load(slots + n)
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    if head >= HQ + HKV:  # a value is copied
        v = tl.load(x + d, mask=inside, other=0.0)
        target = v_cache + page * v_page_stride + offset * v_slot_stride
        target += (head - HQ - HKV).to(tl.int64) * v_head_stride
        tl.store(target + d, v.to(v_cache.dtype.element_ty), mask=inside & (slot >= 0))
    else:
        is_q = head < HQ
        scale = 1.0
        norm = q_norm
        if HAS_NORM:
            z = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
            scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(z * z, 0), D * 1.0) + eps))
            norm = tl.where(is_q, q_norm, k_norm)
        other = tl.where(d < D // 2, d + D // 2, d - D // 2)
        position = tl.load(positions + n)
        c = tl.load(cos + position * D + d, mask=inside, other=0.0)
        s = tl.load(sin + position * D + d, mask=inside, other=0.0)
        mine = _head(x, norm, d, inside, scale, HAS_NORM)
        theirs = _head(x, norm, other, inside, scale, HAS_NORM)
        turned = tl.fma(theirs, s, mine * c)
        if is_q:
            tl.store(
                q_out + (n * HQ + head) * D + d, turned.to(q_out.dtype.element_ty), mask=inside
            )
        else:
            target = k_cache + page * k_page_stride + offset * k_slot_stride
            target += (head - HQ).to(tl.int64) * k_head_stride
            tl.store(target + d, turned.to(k_cache.dtype.element_ty), mask=inside & (slot >= 0))


@jit(any_value=("width",))
def _gate_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * 2 * width
    gate = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width + column, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.div_rn(gate, 1.0 + exp(-gate)) * up
    tl.store(out + row * width + column, hidden.to(out.dtype.element_ty), mask=inside)


def norm_triton(x: Tensor, weight: Tensor, eps: float, y: Tensor | None = None) -> Tensor:
    """`norm_ref` of x, to which y (B, H) of the weight's dtype is first added, in place."""
    B, H = x.shape
    out = torch.empty_like(x, dtype=weight.dtype)
    if B == 0:
        return out
    block = max(1 << (H - 1).bit_length(), 32)
    with on_device(x):
        launch(_norm_kernel, (B,))(
            x, y, weight, out, H, eps,
            HAS_Y=y is not None, BLOCK=block, num_warps=min(max(block // 1024, 1), 16),
        )  # fmt: skip
    return out


def rope_append_triton(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
) -> Tensor:
    """`rope_append_ref`; contiguous but for the caches, which are dense along D."""
    B, heads, D = qkv.shape
    page_size, n_kv = k_cache.shape[1:3]
    n_q = heads - 2 * n_kv
    q = qkv.new_empty((B, n_q, D))
    if B == 0:
        return q
    q_norm, k_norm = norms or (None, None)
    with on_device(qkv):
        launch(_rope_append_kernel, (B, heads))(
            qkv, positions, slots, cos, sin, q_norm, k_norm, q, k_cache, v_cache,
            n_q, n_kv, page_size, *k_cache.stride()[:3], *v_cache.stride()[:3], eps,
            HAS_NORM=norms is not None, D=D, BLOCK=max(1 << (D - 1).bit_length(), 16), num_warps=1,
        )  # fmt: skip
    return q


def gate_triton(gate_up: Tensor) -> Tensor:
    """`gate_ref`, of a contiguous tensor."""
    B, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((B, width))
    if out.numel() == 0:
        return out
    with on_device(gate_up):
        launch(_gate_kernel, (B, -(-width // GATE_BLOCK)))(
            gate_up, out, width, BLOCK=GATE_BLOCK, num_warps=4
        )
    return out


_NUMBERS = dict.fromkeys(("HQ", "HKV", "PAGE_SIZE"), "i32") | dict.fromkeys(
    [f"{x}_{of}_stride" for x in "kv" for of in ("page", "slot", "head")], "i32"
)
AOT_CONFIGS = [
    AotConfig(
        "norm, fp32 and a bf16 product, H=4096",
        _norm_kernel,
        {"x": "*fp32", "y": "*bf16", "weight": "*bf16", "out": "*bf16", "H": "i32", "eps": "fp32"},
        {"HAS_Y": True, "BLOCK": 4096},
        num_warps=4,
    ),
    AotConfig(
        "rope and cache, bf16, heads normalised, D=128",
        _rope_append_kernel,
        dict.fromkeys(("qkv", "q_norm", "k_norm", "q_out", "k_cache", "v_cache"), "*bf16")
        | {"positions": "*i64", "slots": "*i64", "cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
        | _NUMBERS,
        {"HAS_NORM": True, "D": 128, "BLOCK": 128},
        num_warps=1,
    ),
    AotConfig(
        "gate, bf16",
        _gate_kernel,
        {"gate_up": "*bf16", "out": "*bf16", "width": "i32"},
        {"BLOCK": GATE_BLOCK},
        num_warps=4,
    ),
]
