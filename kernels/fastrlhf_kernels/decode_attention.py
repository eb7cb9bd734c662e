"""Attention of one new token a sequence over a paged cache of keys and values.

    s_t = scale * q . k_t,   then softcap * tanh(s_t / softcap)          (softcap given)
    out = sum_t exp(s_t) v_t / (sum_t exp(s_t) + exp(sink))              (sinks given, else no sink)

over the tokens t of the sequence, first <= t < seq_len, where first is seq_len - window, or 0
without a window. Token t lies in page block_tables[b, t // page_size], at offset t % page_size.
Query head h reads key-value head h // (Hq / Hkv).

Shapes: q (B, Hq, D); k_cache, v_cache (pages, page_size, Hkv, D), any strides but dense along D;
block_tables (B, P), seq_lens (B,) int32 or int64; sinks (Hq,); out (B, Hq, D). Dtypes: q, the
caches and the result have one, fp32, bf16, fp16 or fp64 (`ref` and `cpu`); sinks any of these;
arithmetic is fp32, or fp64 for fp64. No gradient: an argument that asks for one is refused while
gradients are recorded.

Promises:
- A sequence of length 0 gives zeros, with sinks too.
- Nothing in a page that is not referenced, nor past seq_len, nor before the window, is computed
  with: NaN there reaches nothing. Entries of block_tables for such tokens may hold anything.
- A sequence's bits do not depend on the other sequences, on P, or on where its pages lie.
- A page outside the cache and a seq_len outside [0, P * page_size] are refused for CPU tensors, and
  never read out of bounds on a GPU.
- All scores -inf, without a sink, give NaN in that head, as softmax does.

Tokens are cut into splits of a fixed length; each split gives its maximum m, the sum of
exp(s - m), and the same sum weighted with v; splits are merged from left to right. The length is
fixed, so that the order of summing depends on a sequence's own length alone. On a GPU a program
reads a split of one key-value head once, for all query heads of its group, and a second kernel
merges. The grid is that of the longest sequence that block_tables has room for: nothing is read on
the host, and the launch can be captured in a CUDA graph.

Source: Dao et al. 2023 (Flash-Decoding); Shazeer 2019, Ainslie et al. 2023 (grouped queries);
softcap: Gemma 2; sinks: gpt-oss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _env, _native
from ._backends import choose
from ._checks import (
    check_device,
    check_dims,
    check_finite,
    check_float,
    check_int,
    check_integer,
    check_no_gradient,
    check_number,
    check_shape,
    check_values,
    compute_dtype,
    values_are_checked,
)
from ._library import register
from ._native import pointer, with_unit_stride
from ._triton import LOG2E, AotConfig, jit, launch, on_device, tanh, tl
from .append_kv import check_caches

# Tokens of a split on a GPU and on a CPU. On an H200, 64 sequences of 4096 tokens, 32 heads on 8 of
# 128, bf16 (bench/sweep.py): 128 tokens 2.73 TB/s, 256 2.34, 512 2.04; the CPU's is not tuned. They
# fix the order of summing, so another length gives other last bits.
SPLIT = 128
CPU_SPLIT = 256
MERGED = 16  # splits that the merging kernel takes at once
MIN_GROUP, MAX_GROUP = 16, 64  # query heads of a program: what tl.dot needs, what registers hold
# In fp32 up to FEW query heads go by products and sums, not tl.dot; elements of these products.
FEW, FEW_ELEMENTS = 4, 2048
ALIGN = 16  # elements: where all strides are multiples of it, a load takes 16 bytes or more


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The specification; arguments as in `decode_attention`."""
    B, HQ, D = q.shape
    pages, page_size, HKV = k_cache.shape[:3]
    T = block_tables.shape[1] * page_size
    if q.numel() == 0 or T == 0 or k_cache.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    dtype = compute_dtype(q, k_cache)
    t = torch.arange(T, device=q.device)
    lengths = seq_lens.to(torch.int64)[:, None]
    valid = t < lengths
    if window is not None:
        valid &= t >= lengths - window

    # (B, T, HKV, D), zero where nothing is attended to
    page = block_tables.to(torch.int64).repeat_interleave(page_size, dim=1)
    page = torch.where(valid, page, 0).clamp(0, pages - 1)
    k, v = (
        torch.where(valid[..., None, None], cache.detach()[page, t % page_size], 0.0).to(dtype)
        for cache in (k_cache, v_cache)
    )
    grouped = q.detach().to(dtype).view(B, HKV, HQ // HKV, D)
    scores = torch.einsum("bhgd,bthd->bhgt", grouped, k) * _scale(scale, D)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    if sinks is not None:  # one more token, whose value is 0
        sink = sinks.detach().to(dtype).view(1, HKV, HQ // HKV, 1).expand(B, -1, -1, 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., :T]
    out = torch.einsum("bhgt,bthd->bhgd", weights, v).reshape(B, HQ, D)
    return torch.where(lengths[..., None] > 0, out, 0.0).to(q.dtype)


def _scale(scale: float | None, D: int) -> float:
    return 1.0 / math.sqrt(D) if scale is None else float(scale)


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


def _check_tables(
    k_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, window: int | None
) -> None:
    """Lengths that the tables have room for; pages that are there, for the tokens attended to."""
    if not values_are_checked(seq_lens):
        return  # on a GPU what follows would be a dozen launches
    op = "decode_attention"
    pages, page_size = k_cache.shape[:2]
    longest = block_tables.shape[1] * page_size
    fits = (seq_lens >= 0) & (seq_lens <= longest)
    check_values(op, "seq_lens", fits, f"in [0, P * page_size = {longest}]")
    last = (seq_lens[:, None] + page_size - 1) // max(page_size, 1)
    p = torch.arange(block_tables.shape[1], device=block_tables.device)
    used = p < last
    if window is not None:
        used &= (p + 1) * page_size > seq_lens[:, None] - window
    there = (block_tables >= 0) & (block_tables < pages)
    check_values(op, "block_tables", there | ~used, f"in [0, pages = {pages}) up to seq_lens")


def _decode_attention_triton(
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
    _check_tables(k_cache, block_tables, seq_lens, window or None)
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


def _decode_attention_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """`decode_attention` on the CPU without its checks, for a decode loop that has made them.

    softcap 0.0 and window 0 stand for None. `out`, if given, is (B, Hq, D), contiguous, of q's
    dtype. Lengths and pages outside the tables and the cache are refused all the same.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = compute_dtype(q)
    B, HQ, D = q.shape
    pages, page_size, HKV = k_cache.shape[:3]
    q = with_unit_stride(q)
    tables = _native.dense(block_tables, torch.int32)
    lengths = _native.dense(seq_lens, torch.int32)
    sinks = None if sinks is None else _native.dense(sinks, dtype)
    # Few heads for many threads: splits are shared out, and what they give needs a place each.
    P = tables.shape[1]
    splits = -(-P * page_size // CPU_SPLIT)
    spread = splits > 1 and 4 * _native.nthreads() > B * HKV
    scratch = q.new_empty(B * HQ * splits * (D + 2), dtype=dtype) if spread else None
    _native.call(
        "decode_attention", q,
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), tables.data_ptr(),
        lengths.data_ptr(), pointer(sinks), pointer(scratch), out.data_ptr(),
        B, HQ, HKV, D, pages, page_size, P, window, CPU_SPLIT,
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        scale, softcap, _native.DTYPE_TAGS[q.dtype],
    )  # fmt: skip
    return out


def _decode_attention_fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


IMPLEMENTATIONS = {"cpu": _decode_attention_native, "triton": _decode_attention_triton}

_decode_attention = register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor seq_lens, float scale, float softcap, int window, Tensor? sinks, str backend) "
    "-> Tensor",
    IMPLEMENTATIONS,
    _decode_attention_fake,
)


def decode_attention(
    q: Tensor,  # (B, Hq, D)
    k_cache: Tensor,  # (pages, page_size, Hkv, D)
    v_cache: Tensor,  # (pages, page_size, Hkv, D)
    block_tables: Tensor,  # (B, P)
    seq_lens: Tensor,  # (B,)
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,  # (Hq,)
    backend: str | None = None,
) -> Tensor:
    """Attention of one query token a sequence over its tokens in a paged cache.

    Args:
        q: (B, Hq, D), 1 <= D <= 256, any strides.
        k_cache: (pages, page_size, Hkv, D), keys, of q's dtype; Hq is a multiple of Hkv.
        v_cache: (pages, page_size, Hkv, D), values, of q's dtype.
        block_tables: (B, P) int32 or int64, the pages of each sequence in order.
        seq_lens: (B,) int32 or int64, the tokens of each sequence, the query's own among them.
        scale: factor of the scores; default 1 / sqrt(D).
        softcap: c in c * tanh(score / c), above 0; None leaves the scores as they are.
        window: only the last `window` tokens are attended to; None: all.
        sinks: (Hq,), a logit a head that joins the softmax's denominator.
        backend: ref, cpu, triton or cuda; default: by `use_backend` and q's device.

    Returns:
        (B, Hq, D), of q's dtype.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong; a page or a length is out of range
            (CPU tensors; on a GPU with FASTRLHF_DEBUG=1); a tensor needs a gradient while
            gradients are recorded.
    """
    op = "decode_attention"
    check_float(op, "q", q)
    check_dims(op, "q", q, 3, "(B, Hq, D)")
    check_caches(op, k_cache, v_cache)
    check_device(op, "k_cache", k_cache, q.device)
    B, HQ, D = q.shape
    HKV = k_cache.shape[2]
    if not 1 <= D <= 256 or k_cache.shape[3] != D:
        raise ValueError(
            f"{op}: q and k_cache must have the same D in [1, 256], got {D} and {k_cache.shape[3]}"
        )
    if HKV == 0 or HQ % HKV != 0:
        raise ValueError(f"{op}: q must have a multiple of k_cache's {HKV} heads, got {HQ}")
    if k_cache.shape[1] == 0:
        raise ValueError(f"{op}: k_cache must have page_size >= 1, got {tuple(k_cache.shape)}")
    if q.dtype != k_cache.dtype:
        raise ValueError(f"{op}: k_cache must be {q.dtype} like q, got {k_cache.dtype}")
    check_integer(op, "block_tables", block_tables)
    check_dims(op, "block_tables", block_tables, 2, "(B, P)")
    check_shape(op, "block_tables", block_tables, (B, block_tables.shape[1]))
    check_device(op, "block_tables", block_tables, q.device)
    check_integer(op, "seq_lens", seq_lens)
    check_shape(op, "seq_lens", seq_lens, (B,))
    check_device(op, "seq_lens", seq_lens, q.device)
    if scale is not None:
        check_number(op, "scale", scale)
        check_finite(op, "scale", scale)
    if softcap is not None:
        check_number(op, "softcap", softcap, low=0.0, open_low=True)
        check_finite(op, "softcap", softcap)
    if window is not None:
        check_int(op, "window", window)
        if window < 1:
            raise ValueError(f"{op}: window must be at least 1, got {window}")
    if sinks is not None:
        check_float(op, "sinks", sinks)
        check_shape(op, "sinks", sinks, (HQ,))
        check_device(op, "sinks", sinks, q.device)
    check_no_gradient(op, q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    backend = choose(op, (q, k_cache), backend, IMPLEMENTATIONS)
    if backend == "ref":
        _check_tables(k_cache, block_tables, seq_lens, window)
        return decode_attention_ref(
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=sinks,
        )
    return _decode_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        _scale(scale, D),
        0.0 if softcap is None else float(softcap),
        0 if window is None else min(window, 2**31 - 1),
        sinks,
        backend,
    )
