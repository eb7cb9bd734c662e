"""What a Llama-like model's decode step does between its products, in torch and in C++.

    norm         x / sqrt(mean(x^2) + eps) * weight
    rope_append  q, k turned by their positions; k and v to the paged cache
    gate         silu(gate) * up
    Panels       a product's weight in the layout in which few rows meet it fastest
    Between      all of a step but the attention, one call a layer

x (B, H) is the residual stream, fp32. Weights, products and caches have one dtype, that of the
model; arithmetic is fp32, rounded to that dtype once at the end. A row's result depends on that row
alone. `*_ref` are the specification; `*_native` run on the CPU, and those of _decode_step_triton.py
on a GPU, on tensors as the decode step makes them (contiguous, fp32, bf16 or fp16), without checks
but, on the CPU, of positions and slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._native import pointer
from .append_kv import append_kv

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (B, H), fp32, in the dtype of weight (H,)."""
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight).to(weight.dtype)


def norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm_ref` on the CPU."""
    out = torch.empty_like(x, dtype=weight.dtype)
    N, H = x.shape
    _native.call(
        "decode_norm", x,
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), N, H, eps,
        _native.DTYPE_TAGS[weight.dtype],
    )  # fmt: skip
    return out


def rope_append_ref(
    qkv: Tensor,  # (B, Hq + 2 Hkv, D)
    positions: Tensor,  # (B,) int64
    slots: Tensor,  # (B,) int64
    cos: Tensor,  # (positions, D) fp32
    sin: Tensor,  # (positions, D) fp32
    norms: tuple[Tensor, Tensor] | None,  # of queries and of keys, (D,) each
    k_cache: Tensor,  # (pages, page_size, Hkv, D)
    v_cache: Tensor,
    eps: float,
) -> Tensor:
    """Queries (B, Hq, D), normalised and turned; keys, likewise, and values go to their slots.

    sin has the sign of its half: y[d] = x[d] cos[d] + x[d + D/2 mod D] sin[d].
    """
    D, n_kv = qkv.shape[-1], k_cache.shape[2]
    n_q = qkv.shape[1] - 2 * n_kv
    qk, v = qkv[:, : n_q + n_kv].float(), qkv[:, n_q + n_kv :]
    if norms is not None:
        qk = F.rms_norm(qk, (D,), None, eps)
        qk[:, :n_q] *= norms[0]
        qk[:, n_q:] *= norms[1]
    turned = qk * cos[positions][:, None]
    qk = turned.addcmul_(qk.roll(D // 2, -1), sin[positions][:, None]).to(v.dtype)
    append_kv(qk[:, n_q:], v, k_cache, v_cache, slots)
    return qk[:, :n_q]


def rope_append_native(
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
    """`rope_append_ref` on the CPU. Queries are turned in place: the result is a part of qkv."""
    B, heads, D = qkv.shape
    pages, page_size, n_kv, _ = k_cache.shape
    q_norm, k_norm = norms or (None, None)
    _native.call(
        "decode_rope", qkv,
        qkv.data_ptr(), positions.data_ptr(), slots.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        pointer(q_norm), pointer(k_norm), k_cache.data_ptr(), v_cache.data_ptr(),
        B, heads - 2 * n_kv, n_kv, D, cos.shape[0], pages, page_size,
        *k_cache.stride()[:3], *v_cache.stride()[:3], eps, _native.DTYPE_TAGS[qkv.dtype],
    )  # fmt: skip
    return qkv[:, : heads - 2 * n_kv]


def gate_ref(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (B, I), of gate_up (B, 2 I)."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gate_native(gate_up: Tensor) -> Tensor:
    """`gate_ref` on the CPU."""
    N, width = gate_up.shape
    out = gate_up.new_empty((N, width // 2))
    _native.call(
        "decode_gate", gate_up,
        gate_up.data_ptr(), out.data_ptr(), N, width // 2, _native.DTYPE_TAGS[gate_up.dtype],
    )  # fmt: skip
    return out


PANEL = 64  # columns of a panel: csrc/product_tile.h


class Panels:
    """A weight (N, K) fp32 copied into panels, and its product with few rows, on the CPU.

    y = residual + bias + x weight^T, x (B, K). The weight is read once, end to end, as fast as the
    memory gives it. A row's bits do not depend on how many rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.N, self.K = weight.shape
        count = -(-self.N // PANEL)
        padded = F.pad(weight, (0, 0, 0, count * PANEL - self.N))
        self.panels = padded.view(count, PANEL, self.K).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.contiguous()

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the panels and of the bias, 0 if there is none."""
        return self.panels.data_ptr(), pointer(self.bias) or 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (B, K) contiguous -> (B, N), written over the residual (B, N) if there is one."""
        B = len(x)
        out = x.new_empty(B, self.N) if residual is None else residual
        _native.call(
            "decode_product", x,
            x.data_ptr(), self.panels.data_ptr(), pointer(self.bias), pointer(residual),
            out.data_ptr(), B, self.N, self.K,
        )  # fmt: skip
        return out


class Layer(NamedTuple):
    """What a layer's step multiplies with, fp32; biases are in the panels."""

    first_norm: Tensor  # (H,)
    qkv: Panels
    head_norms: tuple[Tensor, Tensor] | None  # of queries and of keys, (D,) each
    out: Panels
    second_norm: Tensor  # (H,)
    gate_up: Panels
    down: Panels


class Between:
    """What is between the attentions of a Llama-like model's step, in one call each: fp32, CPU.

    Of few rows the calls of these small operations from Python take as long as their work.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        norm: Tensor,
        head: Panels,
        rope: tuple[Tensor, Tensor],
        kv_heads: int,
        eps: float,
    ) -> None:
        """norm and head: the last ones; rope: cos and sin (positions, D), as in rope_append_ref."""
        self.held = layers, norm, head, rope  # whose addresses the tables have
        self.head, self.cos, self.sin, self.kv_heads, self.eps = head, *rope, kv_heads, eps
        self.width = layers[0].qkv.N
        self.hidden = layers[0].down.K
        self.finish = torch.tensor(
            [
                (
                    *layer.out.addresses, layer.second_norm.data_ptr(),
                    *layer.gate_up.addresses, *layer.down.addresses,
                )
                for layer in layers
            ],
            dtype=torch.int64,
        )  # fmt: skip
        self.start = torch.zeros((len(layers) + 1, 7), dtype=torch.int64)
        for row, layer in zip(self.start, layers, strict=False):
            norms = [] if layer.head_norms is None else [x.data_ptr() for x in layer.head_norms]
            addresses = [layer.first_norm.data_ptr(), *layer.qkv.addresses, *norms]
            row[: len(addresses)] = torch.tensor(addresses)
        self.start[-1, :3] = torch.tensor([norm.data_ptr(), *head.addresses])
        self.caches: tuple[list[Tensor], list[Tensor]] | None = None

    def into(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """The caches (pages, page_size, Hkv, D) that keys and values of the layers go to."""
        if self.caches is None or self.caches[0] is not keys or self.caches[1] is not values:
            self.caches = keys, values
            for row, k, v in zip(self.start, keys, values, strict=False):
                row[5], row[6] = k.data_ptr(), v.data_ptr()

    def __call__(
        self, layer: int, x: Tensor, seen: Tensor | None, positions: Tensor, slots: Tensor
    ) -> Tensor:
        """Finish the layer before, with what its attention has `seen` (B, Hq, D), and start this.

        x (B, H) is updated in place. Returns queries, turned, keys and values (B, (Hq + 2 Hkv) D),
        or after the last layer the logits (B, V).
        """
        assert self.caches is not None
        (B, H), I = x.shape, self.hidden
        cache = self.caches[0][0]
        pages, page_size, _, D = cache.shape
        last = layer == len(self.finish)
        out = x.new_empty(B, self.head.N if last else self.width)
        room = x.new_empty(B * (H + 3 * I))
        at = room.data_ptr()
        row = 7 * 8  # bytes of a row of addresses
        _native.call(
            "decode_between", x,
            x.data_ptr(), pointer(seen), at, at + 4 * B * H, at + 4 * B * (H + 2 * I),
            out.data_ptr(),
            None if seen is None else self.finish.data_ptr() + (layer - 1) * row,
            self.start.data_ptr() + layer * row,
            positions.data_ptr(), slots.data_ptr(), self.cos.data_ptr(), self.sin.data_ptr(),
            B, H, I, out.shape[1], self.width // D - 2 * self.kv_heads, self.kv_heads, D,
            len(self.cos), pages, page_size, *cache.stride()[:3], self.eps,
        )  # fmt: skip
        return out
