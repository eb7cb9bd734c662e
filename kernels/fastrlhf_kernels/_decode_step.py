"""What a Llama-like model's decode step does between its products, in torch and in C++.

    norm         x / sqrt(mean(x^2) + eps) * weight
    rope_append  q, k turned by their positions; k and v to the paged cache
    gate         silu(gate) * up

x (B, H) is the residual stream, fp32. Weights, products and caches have one dtype, that of the
model; arithmetic is fp32, rounded to that dtype once at the end. A row's result depends on that row
alone. `*_ref` are the specification; `*_native` run on the CPU, and those of _decode_step_triton.py
on a GPU, on tensors as the decode step makes them (contiguous, fp32, bf16 or fp16), without checks
but, on the CPU, of positions and slots.
"""

from __future__ import annotations

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
