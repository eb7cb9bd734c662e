"""Attention over the paged cache, as a function that transformers' own modules call.

transformers looks an attention function up by the name in a model's config. `paged(model)` puts
this one's name there for the time of a block; the modules then hand queries, keys and values over,
after their rotary positions, together with the `Batch` that the caller passed to the model:

    keys and values of new tokens go to the cache (append_kv);
    prompts    attend among themselves: causal, each within its own sequence;
    one token  a sequence attends to the cache (decode_attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastrlhf.generation.pages import PAGE_SIZE, PagedCache
from fastrlhf_kernels import append_kv, decode_attention
from fastrlhf_kernels._backends import choose
from fastrlhf_kernels.append_kv import _append_kv_native
from fastrlhf_kernels.decode_attention import IMPLEMENTATIONS, _decode_attention_native

NAME = "fastrlhf_paged"


@dataclass(slots=True)
class Batch:
    """Tokens that go through the model together, and where they stand in the cache."""

    cache: PagedCache
    slots: Tensor
    """(tokens,) int64: page * PAGE_SIZE + offset of each token; -1: not kept (padding)."""
    block_tables: Tensor
    """(B, P) int32."""
    seq_lens: Tensor
    """(B,) int32: keys of each sequence, the new ones counted."""
    cu_seqlens: Tensor | None = None
    """(B + 1,) int32: prompts are packed into one row and begin here; None: a row a sequence."""
    longest: int = 1
    """Longest sequence of new tokens."""


def place(block_tables: Tensor, positions: Tensor) -> Tensor:
    """Slots (B,) of positions (B,), or (B, T) of (B, T), through block tables (B, P)."""
    pages = block_tables.gather(1, (positions // PAGE_SIZE).view(len(block_tables), -1))
    return pages.long().view_as(positions) * PAGE_SIZE + positions % PAGE_SIZE


class CacheOps:
    """append_kv and decode_attention of one new token a sequence, without the checks if need be.

    On the CPU the ops' own checks and registration take about as long as small attention does; the
    fused step hands over what it made itself, so it calls the C++ kernels at once.
    """

    def __init__(self, like: Tensor) -> None:
        """like: a tensor of the model's device and dtype."""
        self.backend = choose("decode_attention", (like,), None, IMPLEMENTATIONS)
        self.native = self.backend == "cpu"

    def append(self, k: Tensor, v: Tensor, batch: Batch, layer: int) -> None:
        """Write k and v (B, Hkv, D) to the cache."""
        write = _append_kv_native if self.native else append_kv
        write(k, v, batch.cache.keys[layer], batch.cache.values[layer], batch.slots)

    def attend(
        self, q: Tensor, batch: Batch, layer: int, *, scale: float, window: int | None = None
    ) -> Tensor:
        """Let q (B, Hq, D) attend to the cache -> (B, Hq, D)."""
        keys, values = batch.cache.keys[layer], batch.cache.values[layer]
        tables, lens = batch.block_tables, batch.seq_lens
        if self.native:
            return _decode_attention_native(
                q, keys, values, tables, lens, scale, 0.0, window or 0, None
            )
        return decode_attention(q, keys, values, tables, lens, scale=scale, window=window)


def paged_attention(
    module: nn.Module,
    query: Tensor,  # (B, Hq, T, D)
    key: Tensor,  # (B, Hkv, T, D)
    value: Tensor,  # (B, Hkv, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: Batch | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers -> (B, T, Hq, D)."""
    if paged is None or attention_mask is not None:
        raise UnsupportedModel(module, "it does not hand its keyword arguments to attention")
    layer = _layer_of(module)
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    B, Hq, T, D = query.shape
    if key.shape[1::2] != keys.shape[2:] or value.shape != key.shape:
        raise UnsupportedModel(
            module, f"keys {tuple(key.shape[1::2])} and values {tuple(value.shape[1::2])} of layer "
            f"{layer} differ from the first layer's {tuple(keys.shape[2:])}",
        )  # fmt: skip
    k, v = (x.transpose(1, 2).reshape(B * T, *keys.shape[2:]) for x in (key, value))
    append_kv(k, v, keys, values, paged.slots)
    decoding = T == 1
    plain = softcap is None and s_aux is None
    if paged.cu_seqlens is not None:  # only for models whose attention is plain
        packed = _packed(
            query, key, value, paged.cu_seqlens, paged.longest, scaling, sliding_window
        )
        return packed, None
    if not decoding and plain and (sliding_window is None or sliding_window >= T):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=Hq != key.shape[1]
        )
        return out.transpose(1, 2), None
    # Decoding; and prompts with a window, a softcap or sinks, each of whose tokens then asks the
    # cache as if it were the last of a sequence. What padding asks for is not used.
    tables, lens = paged.block_tables, paged.seq_lens
    if not decoding:
        tables = tables.repeat_interleave(T, 0)
        lens = torch.arange(1, T + 1, dtype=torch.int32, device=query.device).repeat(B)
        lens = torch.minimum(lens, paged.seq_lens.repeat_interleave(T))
    q = query.transpose(1, 2).reshape(B * T, Hq, D)
    out = decode_attention(
        q, keys, values, tables, lens,
        scale=scaling, softcap=softcap, window=sliding_window, sinks=s_aux,
    )  # fmt: skip
    return out.view(B, T, Hq, D), None


def _layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel(module, "its attention does not say in which layer it stands")
    return layer


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within the sequences of one packed row, by flash-attn or by torch."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    left = -1 if window is None else window - 1
    out: Tensor
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        D, group = q.shape[-1], q.shape[1] // k.shape[1]
        if group > 1:  # enable_gqa came with torch 2.13
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        if D % 8:  # which the kernel wants, and flash-attn does by itself
            q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
            scaling = D**-0.5 if scaling is None else scaling
        found = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(left, 0))
        assert isinstance(found, Tensor)
        out = found[..., :D]
    else:
        out = flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest,
            softmax_scale=scaling, causal=True, window_size=(left, 0),
        )  # fmt: skip
    return out[None]


AttentionInterface.register(NAME, paged_attention)


class UnsupportedModel(ValueError):
    """A model whose attention is not what the paged cache can stand in for."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(
            f"{type(module).__name__}: {why}. Supported: the Llama, Mistral, Qwen2, Qwen3, GPT-2 "
            "and GPT-NeoX families, and decoders that take transformers' attention interface, "
            "with causal or sliding-window attention in all layers"
        )


@contextmanager
def paged(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's attention is `paged_attention`."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def check_model(model: PreTrainedModel) -> None:
    """Refuse what cannot run on the paged cache, by what its class and config say.

    Raises:
        UnsupportedModel: and says what is supported.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(model, "it is no decoder")
    if not model._supports_attention_backend:
        raise UnsupportedModel(model, "it does not take transformers' attention interface")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UnsupportedModel(model, f"it has layers of {', '.join(strange)}")
