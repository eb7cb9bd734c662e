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

from . import _native
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
from ._decode_attention_kernel import AOT_CONFIGS as AOT_CONFIGS
from ._decode_attention_kernel import launch_decode_attention
from ._library import register
from ._native import pointer, with_unit_stride
from .append_kv import check_caches

# Tokens of a split on a CPU, not tuned; as on a GPU, another length gives other last bits.
CPU_SPLIT = 256


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
    return launch_decode_attention(
        q, k_cache, v_cache, block_tables, seq_lens, scale, softcap, window, sinks
    )


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
