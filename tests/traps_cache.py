"""Traps of the paged cache: what is written where, and what attention may look at."""

from __future__ import annotations

from typing import Any

import torch
from oracle import assert_same_bits
from torch import Tensor
from traps import NAN, Op, close, noise, trap

# ---- append_kv


def naive_flat_index(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, **_: Any
) -> None:
    """A slot of -1 is the last one."""
    k_cache.view(-1, *k.shape[1:])[slots] = k.to(k_cache.dtype)
    v_cache.view(-1, *v.shape[1:])[slots] = v.to(v_cache.dtype)


def naive_clamped(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, **_: Any
) -> None:
    """Skipped tokens are sent to slot 0."""
    naive_flat_index(k, v, k_cache, v_cache, slots.clamp(min=0))


def naive_reshaped(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, **_: Any
) -> None:
    """Of a cache that is not contiguous, reshape is a copy, and the copy is written."""
    keep = slots >= 0
    k_cache.reshape(-1, *k.shape[1:])[slots[keep]] = k[keep].to(k_cache.dtype)
    v_cache.reshape(-1, *v.shape[1:])[slots[keep]] = v[keep].to(v_cache.dtype)


def _tokens(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """k, v of three tokens, and caches of NaN: four pages of two slots."""
    k, v = (noise(3, 2, 4, seed=s).to(device, dtype) for s in (0, 1))
    caches = (torch.full((4, 2, 2, 4), NAN, dtype=dtype, device=device) for _ in range(2))
    return [k, v, *caches]


def _skips_write_nothing(op: Op, device: str) -> None:
    k, v, k_cache, v_cache = _tokens(device)
    op(k, v, k_cache, v_cache, torch.tensor([3, -1, -5], device=device))
    for cache, x in ((k_cache, k), (v_cache, v)):
        assert_same_bits(cache[1, 1], x[0])
        assert int(cache.isnan().sum()) == 7 * x[0].numel()


@trap("append_kv", naive_flat_index)
def a_skipped_token_is_not_the_last_slot_s(op: Op, device: str) -> None:
    _skips_write_nothing(op, device)


@trap("append_kv", naive_clamped)
def a_skipped_token_is_not_the_first_slot_s(op: Op, device: str) -> None:
    _skips_write_nothing(op, device)


@trap("append_kv", naive_reshaped)
def a_cache_that_is_not_contiguous_is_written(op: Op, device: str) -> None:
    k, v, k_cache, v_cache = _tokens(device)
    k_cache, v_cache = torch.stack([k_cache, v_cache], 1).unbind(1)
    op(k, v, k_cache, v_cache, torch.tensor([7, 0, 2], device=device))
    for cache, x in ((k_cache, k), (v_cache, v)):
        assert_same_bits(torch.stack([cache[3, 1], cache[0, 0], cache[1, 0]]), x)


# ---- decode_attention


def naive_gathered(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    tiled: bool = False,
    **_: Any,
) -> Tensor:
    """Right for numbers: gather, a mask of -inf, softmax, a product."""
    group = q.shape[1] // k_cache.shape[2]
    pages = block_tables.long().clamp(0, len(k_cache) - 1)
    k, v = (x[pages].flatten(1, 2).float() for x in (k_cache, v_cache))
    k, v = (x.repeat(1, 1, group, 1) if tiled else x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bhd,bthd->bht", q.float(), k) * q.shape[-1] ** -0.5
    t = torch.arange(k.shape[1], device=q.device)
    hidden = t >= seq_lens[:, None]
    if window is not None:
        hidden |= t < seq_lens[:, None] - window
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks[:, None].exp()  # not shifted by the maximum, as the others are
    return torch.einsum("bht,bthd->bhd", weights / total, v).to(q.dtype)


def naive_tiled(*args: Tensor, **settings: Any) -> Tensor:
    """Query head h reads head h modulo Hkv."""
    return naive_gathered(*args, tiled=True, **settings)


def naive_window(*args: Tensor, window: int | None = None, **settings: Any) -> Tensor:
    """The window beside the query's own token, not with it."""
    return naive_gathered(*args, window=None if window is None else window + 1, **settings)


def naive_unshifted(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, **_: Any
) -> Tensor:
    """Sums of exponentials without a maximum, of one sequence."""
    n = int(seq_lens[0])
    k, v = (x[block_tables[0].long()].flatten(0, 1)[:n].float() for x in (k_cache, v_cache))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (torch.einsum("hd,thd->ht", q[0].float(), k) * q.shape[-1] ** -0.5).exp()
    return (torch.einsum("ht,thd->hd", weights, v) / weights.sum(-1, keepdim=True))[None]


def naive_even_splits(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, **_: Any
) -> Tensor:
    """As many splits for all as keep the processors busy: fewer for each, the more there are."""
    splits = max(1, 8 // len(q))
    out = torch.zeros_like(q)
    for b, n in enumerate(seq_lens.tolist()):
        k, v = (x[block_tables[b].long()].flatten(0, 1)[:n] for x in (k_cache, v_cache))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        weights = torch.einsum("hd,thd->ht", q[b], k) * q.shape[-1] ** -0.5
        weights = (weights - weights.amax(-1, keepdim=True)).exp()
        for w, x in zip(weights.chunk(splits, 1), v.chunk(splits), strict=True):
            out[b] += torch.einsum("ht,thd->hd", w, x)
        out[b] /= weights.sum(-1)[:, None]
    return out


def _sequences(device: str, fill: float, lengths: tuple[int, ...] = (5, 11)) -> list[Tensor]:
    """Four query heads over two; pages of four tokens, `fill` where there is no token."""
    P = -(-max(lengths) // 4)
    caches = [noise(len(lengths) * P, 4, 2, 8, seed=s) for s in (1, 2)]
    tables = torch.arange(len(lengths) * P, dtype=torch.int32).view(len(lengths), P).flip(0)
    for b, n in enumerate(lengths):
        for cache in caches:
            tokens = cache[tables[b].long()].flatten(0, 1)
            tokens[n:] = fill
            cache[tables[b].long()] = tokens.view(P, 4, 2, 8)
    args = [noise(len(lengths), 4, 8), *caches, tables, torch.tensor(lengths, dtype=torch.int32)]
    return [x.to(device) for x in args]


@trap("decode_attention", naive_gathered)
def nan_past_the_end_of_a_sequence(op: Op, device: str) -> None:
    """0 * NaN is NaN."""
    wanted = op(*_sequences(device, 0.0))
    assert_same_bits(op(*_sequences(device, NAN)), wanted)


@trap("decode_attention", naive_gathered)
def nan_before_the_window(op: Op, device: str) -> None:
    args = _sequences(device, 0.0)
    wanted = op(*args, window=3)
    for cache in args[1:3]:
        cache[args[3][1, 0].long()] = NAN  # of tokens 0 to 3 of 11
    assert_same_bits(op(*args, window=3), wanted)


@trap("decode_attention", naive_gathered)
def a_sequence_without_tokens(op: Op, device: str) -> None:
    found = op(*_sequences(device, 1.0, (0, 5)))
    assert bool((found[0] == 0).all())
    assert bool(found[1].isfinite().all())


@trap("decode_attention", naive_gathered)
def sinks_are_on_the_scale_of_the_scores(op: Op, device: str) -> None:
    """Equal scores s and a sink of s: each of n tokens weighs 1 / (n + 1), whatever s is."""
    q, k_cache, v_cache, tables, lengths = _sequences(device, 0.0)
    k_cache.fill_(1.0)
    q.fill_(8.0**0.5)  # scores of 8
    found = op(q, k_cache, v_cache, tables, lengths, sinks=torch.full((4,), 8.0, device=device))
    mean = op(q, k_cache, v_cache, tables, lengths)
    share = lengths / (lengths + 1)
    close(found, mean * share[:, None, None], absolute=1e-6)


@trap("decode_attention", naive_tiled)
def a_group_is_of_neighbouring_heads(op: Op, device: str) -> None:
    q, k_cache, v_cache, tables, lengths = _sequences(device, 0.0)
    v_cache[:, :, 0], v_cache[:, :, 1] = 1.0, 2.0
    wanted = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(2, 4, 8)
    close(op(q, k_cache, v_cache, tables, lengths), wanted)


@trap("decode_attention", naive_window)
def a_window_counts_the_query_s_own_token(op: Op, device: str) -> None:
    q, k_cache, v_cache, tables, lengths = _sequences(device, 0.0)
    found = op(q, k_cache, v_cache, tables, lengths, window=1)
    last = v_cache[tables[[0, 1], [1, 2]].long(), [0, 2]]  # tokens 4 of 5 and 10 of 11
    close(found, last.repeat_interleave(2, 1))


@trap("decode_attention", naive_unshifted)
def scores_of_1000(op: Op, device: str) -> None:
    args = _sequences(device, 0.0, (11,))
    args[0] *= 1000.0
    assert bool(op(*args).isfinite().all())


@trap("decode_attention", naive_even_splits, not_on=("ref",))  # torch's products promise it not
def splits_do_not_depend_on_the_batch(op: Op, device: str) -> None:
    args = _sequences(device, 0.0, (700, 650, 999, 1000))
    together = op(*args)
    for b in range(4):
        row = slice(b, b + 1)
        assert_same_bits(op(args[0][row], *args[1:3], args[3][row], args[4][row]), together[row])
