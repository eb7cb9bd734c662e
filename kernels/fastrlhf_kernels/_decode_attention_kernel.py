"""The Triton kernels of decode_attention, whose module has the specification.

A program reads a split of one key-value head once, for all query heads of its group (or for as
many as registers hold); a second kernel merges a head's splits from left to right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _env
from ._native import with_unit_stride
from ._triton import LOG2E, AotConfig, jit, launch, on_device, tanh, tl

# Tokens of a split. On an H200, 64 sequences of 4096 tokens, 32 heads on 8 of 128, bf16
# (bench/sweep.py): 128 tokens 2.73 TB/s, 256 2.34, 512 2.04. It fixes the order of summing, so
# another length gives other last bits.
SPLIT = 128
MERGED = 16  # splits that the merging kernel takes at once
MIN_GROUP, MAX_GROUP = 16, 64  # query heads of a program: what tl.dot needs, what registers hold
# In fp32 up to FEW query heads go by products and sums, not tl.dot; elements of these products.
FEW, FEW_ELEMENTS = 4, 2048
ALIGN = 16  # elements: where all strides are multiples of it, a load takes 16 bytes or more


@jit()
def _finite_or_zero(m):
    # a maximum that may be subtracted: -inf - -inf is NaN
    return tl.where(m == float("-inf"), 0.0, m)


@jit()
def _load_tokens(
    cache, page, offset, head, d, read,  # pointer, the tokens' places, and which are read
    page_stride, slot_stride, head_stride,
    D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # (tokens, BLOCK_D), 0 where not read
    rows = page * page_stride + offset * slot_stride + head * head_stride
    rows = tl.multiple_of(rows, [ALIGN])
    inside = read[:, None] & (d < D)[None, :]
    return tl.load(cache + rows[:, None] + d[None, :], mask=inside, other=0.0)


@jit(
    any_value=(
        "HKV", "GROUP", "PAGES", "PAGE_SIZE", "P", "SPLITS", "WINDOW",
        "q_stride", "q_head_stride", "tables_stride",
        "k_page_stride", "k_slot_stride", "k_head_stride",
        "v_page_stride", "v_slot_stride", "v_head_stride",
    )
)  # fmt: skip
def _split_kernel(
    q, k_cache, v_cache, block_tables, seq_lens, maxima, sums, parts,  # pointers
    HKV, GROUP, PAGES, PAGE_SIZE, P, SPLITS, WINDOW,  # sizes
    q_stride, q_head_stride, tables_stride,  # strides
    k_page_stride, k_slot_stride, k_head_stride,
    v_page_stride, v_slot_stride, v_head_stride,
    scale, softcap,  # constants
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, NARROW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One split of one key-value head of one sequence, for up to BLOCK_G of its query heads.

    maxima, sums (B, Hq, SPLITS); parts (B, Hq, SPLITS, D). NARROW: products are of the caches'
    dtype, on tensor cores; else of fp32.
    """
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    blocks = tl.cdiv(GROUP, BLOCK_G)
    kv_head = tl.program_id(2) // blocks
    in_group = (tl.program_id(2) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    seq_len = tl.minimum(tl.load(seq_lens + sequence).to(tl.int32), P * PAGE_SIZE)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - WINDOW, 0)
    begin = split * SPLIT
    if (begin >= seq_len) | (begin + SPLIT <= first):
        return
    head = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    d = tl.arange(0, BLOCK_D)
    wanted = is_head[:, None] & (d < D)[None, :]
    query = q + sequence * q_stride + head[:, None].to(tl.int64) * q_head_stride + d[None, :]
    x = tl.load(query, mask=wanted, other=0.0)
    if not NARROW:
        x = x.to(tl.float32)
    tables = block_tables + sequence * tables_stride
    at_head = kv_head.to(tl.int64)

    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    part = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    # The last split's rest is not looped over; that depends on the sequence alone.
    for t0 in range(begin, tl.minimum(begin + SPLIT, seq_len), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        valid = (t < seq_len) & (t >= first)
        page = tl.load(tables + t // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        offset = (t % PAGE_SIZE).to(tl.int64)
        read = valid & (page >= 0) & (page < PAGES)
        k = _load_tokens(
            k_cache, page, offset, at_head, d, read,
            k_page_stride, k_slot_stride, k_head_stride, D, ALIGN,
        )  # fmt: skip
        v = _load_tokens(
            v_cache, page, offset, at_head, d, read,
            v_page_stride, v_slot_stride, v_head_stride, D, ALIGN,
        )  # fmt: skip
        if not NARROW:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        if BLOCK_G < 16:  # fewer query heads than a tl.dot has rows: it would multiply padding
            scores = tl.sum(x[:, None, :] * k[None, :, :], 2) * scale
        else:
            scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        shift = _finite_or_zero(new_m)
        p = tl.exp2((scores - shift[:, None]) * LOG2E)
        shrink = tl.exp2((m - shift) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        part = part * shrink[:, None]
        if NARROW:
            # In two parts, so that weights keep twice the digits of the narrow type.
            high = p.to(v.dtype)
            part = tl.dot(high, v, part)
            part = tl.dot((p - high.to(tl.float32)).to(v.dtype), v, part)
        elif BLOCK_G < 16:
            part += tl.sum(p[:, :, None] * v[None, :, :], 1)
        else:
            part = tl.dot(p, v, part, input_precision="ieee")
        m = new_m
    at = (sequence * HKV * GROUP + head) * SPLITS + split
    tl.store(maxima + at, m, mask=is_head)
    tl.store(sums + at, total, mask=is_head)
    tl.store(parts + at[:, None] * D + d[None, :], part, mask=wanted)


@jit(any_value=("HQ", "LONGEST", "SPLITS", "WINDOW"))
def _merge_kernel(
    maxima, sums, parts, seq_lens, sinks, out,  # pointers
    HQ, LONGEST, SPLITS, WINDOW,  # sizes
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one query head of one sequence, BLOCK_S at a time."""
    row = tl.program_id(0).to(tl.int64)
    seq_len = tl.minimum(tl.load(seq_lens + row // HQ).to(tl.int32), LONGEST)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - WINDOW, 0) // SPLIT
    d = tl.arange(0, BLOCK_D)
    is_d = d < D
    m = float("-inf")
    total = 0.0
    if HAS_SINKS:
        m = tl.load(sinks + row % HQ)
        total = tl.where(m == float("-inf"), 0.0, 1.0)
    merged = tl.zeros((BLOCK_D,), tl.float32)
    for s0 in range(first, tl.cdiv(seq_len, SPLIT), BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        there = s < tl.cdiv(seq_len, SPLIT)
        at = row * SPLITS + s
        split_m = tl.load(maxima + at, mask=there, other=float("-inf"))
        split_total = tl.load(sums + at, mask=there, other=0.0)
        wanted = there[:, None] & is_d[None, :]
        split_part = tl.load(parts + at[:, None] * D + d[None, :], mask=wanted, other=0.0)
        new_m = tl.maximum(m, tl.max(split_m, 0))
        shift = _finite_or_zero(new_m)
        weight = tl.exp2((split_m - shift) * LOG2E)
        shrink = tl.exp2((m - shift) * LOG2E)
        total = total * shrink + tl.sum(weight * split_total, 0)
        merged = merged * shrink + tl.sum(weight[:, None] * split_part, 0)
        m = new_m
    result = merged / tl.where(seq_len > 0, total, 1.0)  # of no tokens: 0
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=is_d)


def _tile(D: int, group: int, narrow: bool) -> tuple[int, int, int, int]:
    """BLOCK_D, BLOCK_G, BLOCK_T and warps of the split kernel."""
    block_d = max(16, 1 << (D - 1).bit_length())
    if not narrow and group <= FEW:
        block_g = 1 << (group - 1).bit_length()
        return block_d, block_g, min(max(FEW_ELEMENTS // (block_d * block_g), 16), 64), 4
    if not narrow:
        return block_d, MIN_GROUP, 32 if block_d <= 64 else 16, 4
    most = MAX_GROUP if block_d <= 128 else MAX_GROUP // 2
    block_g = min(max(MIN_GROUP, 1 << (group - 1).bit_length()), most)
    return block_d, block_g, 64 if block_d <= 128 else 32, 8 if block_d * block_g > 4096 else 4


def _aot_configs() -> list[AotConfig]:
    """Every shape of tile, with the flags spread over them."""
    sizes = ("HKV", "GROUP", "PAGES", "PAGE_SIZE", "P", "SPLITS", "WINDOW")
    strides = (
        *("q_stride", "q_head_stride", "tables_stride"),
        *("k_page_stride", "k_slot_stride", "k_head_stride"),
        *("v_page_stride", "v_slot_stride", "v_head_stride"),
    )
    types = (
        {"block_tables": "*i32", "seq_lens": "*i32"}
        | dict.fromkeys(("maxima", "sums", "parts"), "*fp32")
        | dict.fromkeys((*sizes, *strides), "i32")
        | dict.fromkeys(("scale", "softcap"), "fp32")
    )
    found = []
    for name, D, group, dtype, softcap, window in (
        ("bf16, D=64", 64, 1, "*bf16", False, False),
        ("fp16, D=80, window", 80, 8, "*fp16", False, True),
        ("bf16, D=128", 128, 4, "*bf16", False, False),
        ("bf16, D=128, group 32, softcap", 128, 32, "*bf16", True, False),
        ("bf16, D=128, group 71, window", 128, 71, "*bf16", False, True),
        ("bf16, D=256, softcap, window", 256, 2, "*bf16", True, True),
        ("bf16, D=256, group 64", 256, 64, "*bf16", False, False),
        ("bf16, D=16", 16, 5, "*bf16", False, False),
        ("fp32, D=64", 64, 1, "*fp32", False, False),
        ("fp32, D=80, group 3", 80, 3, "*fp32", False, False),
        ("fp32, D=128, window", 128, 8, "*fp32", False, True),
        ("fp32, D=256, softcap, window", 256, 1, "*fp32", True, True),
    ):
        block_d, block_g, block_t, warps = _tile(D, group, dtype != "*fp32")
        found.append(
            AotConfig(
                name,
                _split_kernel,
                types | dict.fromkeys(("q", "k_cache", "v_cache"), dtype),
                {
                    "HAS_SOFTCAP": softcap,
                    "HAS_WINDOW": window,
                    "NARROW": dtype != "*fp32",
                    "D": D,
                    "BLOCK_D": block_d,
                    "BLOCK_G": block_g,
                    "BLOCK_T": block_t,
                    "SPLIT": SPLIT,
                    "ALIGN": ALIGN,
                },
                num_warps=warps,
            )
        )
    merge_types = dict.fromkeys(("maxima", "sums", "parts"), "*fp32") | {"seq_lens": "*i32"}
    merge_types |= dict.fromkeys(("HQ", "LONGEST", "SPLITS", "WINDOW"), "i32")
    for name, D, out, sinks, window in (
        ("merge, bf16, D=128", 128, "*bf16", False, False),
        ("merge, bf16, D=80, sinks, window", 80, "*bf16", True, True),
        ("merge, fp32, D=256", 256, "*fp32", False, False),
    ):
        found.append(
            AotConfig(
                name,
                _merge_kernel,
                merge_types | {"out": out} | ({"sinks": "*fp32"} if sinks else {}),
                {"HAS_SINKS": sinks, "HAS_WINDOW": window, "D": D, "BLOCK_S": MERGED}
                | {"BLOCK_D": 1 << (D - 1).bit_length(), "SPLIT": SPLIT}
                | ({} if sinks else {"sinks": None}),
            )
        )
    return found


AOT_CONFIGS = _aot_configs()


def launch_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> Tensor:
    """`decode_attention` without its checks; softcap 0.0 and window 0 stand for None."""
    B, HQ, D = q.shape
    pages, page_size, HKV = k_cache.shape[:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    q, tables, lengths = with_unit_stride(q), with_unit_stride(block_tables), seq_lens.contiguous()
    P = tables.shape[1]
    splits = -(-P * page_size // SPLIT)
    maxima = q.new_empty((B, HQ, splits), dtype=torch.float32)
    sums = torch.empty_like(maxima)
    parts = q.new_empty((B, HQ, splits, D), dtype=torch.float32)
    # Triton's interpreter multiplies the bits of bf16, not the numbers.
    narrow = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and not _env.INTERPRET)
    block_d, block_g, block_t, warps = _tile(D, HQ // HKV, narrow)
    strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    with on_device(q):
        if splits > 0 and k_cache.numel() > 0:
            launch(_split_kernel, (B, splits, HKV * -(-(HQ // HKV) // block_g)))(
                q, k_cache, v_cache, tables, lengths, maxima, sums, parts,
                HKV, HQ // HKV, pages, page_size, P, splits, window,
                *q.stride()[:2], tables.stride(0),
                *strides,
                scale, softcap,
                HAS_SOFTCAP=softcap > 0.0, HAS_WINDOW=window > 0, NARROW=narrow,
                D=D, BLOCK_D=block_d, BLOCK_G=block_g, BLOCK_T=block_t, SPLIT=SPLIT,
                ALIGN=1 if any(s % ALIGN for s in strides) else ALIGN, num_warps=warps,
            )  # fmt: skip
        launch(_merge_kernel, (B * HQ,))(
            maxima, sums, parts, lengths,
            None if sinks is None else sinks.to(torch.float32).contiguous(), out,
            HQ, P * page_size, splits, window,
            HAS_SINKS=sinks is not None, HAS_WINDOW=window > 0,
            D=D, BLOCK_D=1 << (D - 1).bit_length(), BLOCK_S=MERGED, SPLIT=SPLIT,
        )  # fmt: skip
    return out
