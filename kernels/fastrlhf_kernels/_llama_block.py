"""What a Llama-like model does between its products in training, each in one pass, on a CPU.

    norm       x, x / sqrt(mean(x^2) + eps) * weight        x goes through, to be added to later
    attention  causal within sequences that stand end to end, queries and keys turned on the way
    gate       silu(gate) * up

Transformers' modules do this in some 25 operations a block, most of them a pass through memory.
Rows are tokens, those of all sequences end to end, so that there is no padding. All tensors are
fp32. `*_ref` are the specification, differentiated by PyTorch; the others are C++ (csrc/
llama_block.cpp, packed_attention.cpp) on contiguous CPU tensors, differentiable once. A sequence's
result depends on that sequence alone, but for products; runs repeat their bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._native import pointer

NORM_ROWS = 64  # rows of a tile of the norm's weight gradient: csrc/llama_block.cpp


def norm_ref(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (N, H) itself, and its RMSNorm with the weight (H,)."""
    return x, x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (N, heads, D) by cos and sin (N, D), sin with the sign of its half."""
    return x * cos[:, None] + x.roll(x.shape[-1] // 2, -1) * sin[:, None]


def attention_ref(
    qkv: Tensor,  # (N, Hq + 2 Hkv, D)
    cu_seqlens: Tensor,  # (S + 1,) int64, from 0 to N
    cos: Tensor,  # (positions, D)
    sin: Tensor,  # (positions, D), with the sign of its half
    kv_heads: int,
    scale: float,
) -> Tensor:
    """Causal attention (N, Hq, D) within sequences cu[s] to cu[s + 1], each from position 0."""
    heads = qkv.shape[1] - 2 * kv_heads
    found = [qkv.new_zeros(0, heads, qkv.shape[-1])]
    for one in qkv.split(cu_seqlens.diff().tolist()):
        q, k, v = one.split([heads, kv_heads, kv_heads], 1)
        q, k = (turn(x, cos[: len(one)], sin[: len(one)]) for x in (q, k))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        later = torch.ones(len(one), len(one), dtype=torch.bool, device=qkv.device).triu(1)
        scores = (q @ k.mT * scale).masked_fill(later, -torch.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


def gate_ref(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (N, I), of gate_up (N, 2 I)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        N, H = x.shape
        out, inverse = torch.empty_like(x), x.new_empty(N)
        _native.call(
            "block_norm", x,
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), inverse.data_ptr(), N, H, eps,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, inverse)
        ctx.set_materialize_grads(False)
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_through: Tensor | None, d_out: Tensor | None) -> Any:
        if d_out is None:
            return d_through, None, None
        x, weight, inverse = ctx.saved_tensors
        N, H = x.shape
        d_out = d_out.contiguous()
        if d_through is not None:
            d_through = d_through.contiguous()
        d_x, parts = torch.empty_like(x), x.new_empty(-(-N // NORM_ROWS), H)
        _native.call(
            "block_norm_backward", x,
            d_out.data_ptr(), pointer(d_through), x.data_ptr(), weight.data_ptr(),
            inverse.data_ptr(), d_x.data_ptr(), parts.data_ptr(), N, H,
        )  # fmt: skip
        return d_x, parts.sum(0), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cu: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, scale: float
    ) -> Tensor:
        N, heads, D = qkv.shape
        out = qkv.new_empty(N, heads - 2 * kv_heads, D)
        logsum = qkv.new_empty(out.shape[:2])
        ctx.sizes = len(cu) - 1, N, out.shape[1], kv_heads, D, len(cos), scale
        _native.call(
            "packed_attention", qkv,
            qkv.data_ptr(), cu.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
            logsum.data_ptr(), *ctx.sizes,
        )  # fmt: skip
        ctx.save_for_backward(qkv, cu, cos, sin, out, logsum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        qkv, cu, cos, sin, out, logsum = ctx.saved_tensors
        d_out, d_qkv = d_out.contiguous(), torch.empty_like(qkv)
        _native.call(
            "packed_attention_backward", qkv,
            d_out.data_ptr(), qkv.data_ptr(), cu.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            out.data_ptr(), logsum.data_ptr(), d_qkv.data_ptr(), *ctx.sizes,
        )  # fmt: skip
        return d_qkv, None, None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        N, width = gate_up.shape
        out = gate_up.new_empty(N, width // 2)
        _native.call("block_gate", gate_up, gate_up.data_ptr(), out.data_ptr(), N, width // 2)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        N, width = gate_up.shape
        d_out, d_gate_up = d_out.contiguous(), torch.empty_like(gate_up)
        _native.call(
            "block_gate_backward", gate_up,
            d_out.data_ptr(), gate_up.data_ptr(), d_gate_up.data_ptr(), N, width // 2,
        )  # fmt: skip
        return d_gate_up


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`norm_ref` in C++."""
    found: tuple[Tensor, Tensor] = _Norm.apply(x, weight, eps)
    return found


def attention(
    qkv: Tensor, cu_seqlens: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """`attention_ref` in C++."""
    found: Tensor = _Attention.apply(qkv, cu_seqlens, cos, sin, kv_heads, scale)
    return found


def gate(gate_up: Tensor) -> Tensor:
    """`gate_ref` in C++."""
    found: Tensor = _Gate.apply(gate_up)
    return found
