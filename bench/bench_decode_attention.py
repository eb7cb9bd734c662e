"""decode_attention beside torch's scaled_dot_product_attention, and flash-attn.

    pytest bench/bench_decode_attention.py

Bytes: the keys and values of every token, read once. "sdpa" is given its keys and values gathered
and contiguous, (B, Hkv, T, D) with a mask of the lengths, and is timed without the gathering;
"gather, sdpa" does it from the same pages as ours. Lengths are spread over half to all of T.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import DEVICE, Variant
from peers import each, flash_decode
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastrlhf_kernels import available_backends, decode_attention
from fastrlhf_kernels.decode_attention import _decode_attention_native, decode_attention_ref

PAGE_SIZE = 16
# B, Hq, Hkv, D, T: a small GPT-2, Llama-like models, one long sequence.
SHAPES = [
    (32, 12, 12, 64, 512),
    (8, 16, 4, 64, 1024),
    (4, 32, 8, 128, 2048),
    (1, 16, 2, 128, 8192),
]
if DEVICE == "cuda":
    SHAPES = [
        (64, 12, 12, 64, 1024),
        (64, 32, 8, 128, 4096),
        (256, 32, 8, 128, 1024),
        (1, 32, 8, 128, 32768),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "HQ", "HKV", "D", "T"), SHAPES)
def test_decode_attention(
    compare, B: int, HQ: int, HKV: int, D: int, T: int, dtype: torch.dtype
) -> None:
    # flash-attn's pages are multiples of 256 tokens.
    page_size = 256 if DEVICE == "cuda" else PAGE_SIZE
    generator = torch.Generator().manual_seed(0)
    P = T // page_size
    lengths = torch.linspace(T / 2, T, B).round().int() if B > 1 else torch.tensor([T]).int()
    tables = torch.randperm(B * P, generator=generator).view(B, P).int().to(DEVICE)
    lengths = lengths.to(DEVICE)
    q = torch.randn(B, HQ, D, generator=generator).to(DEVICE, dtype)
    k_cache, v_cache = (
        torch.randn(B * P, page_size, HKV, D, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    args = (q, k_cache, v_cache, tables, lengths)
    few = min(B, 4)
    exact = decode_attention_ref(
        q[:few].double(), k_cache.double(), v_cache.double(), tables[:few], lengths[:few]
    )

    def gathered() -> tuple[Tensor, Tensor]:
        k, v = (x[tables.long()].flatten(1, 2).transpose(1, 2) for x in (k_cache, v_cache))
        return k, v

    mask = torch.arange(T, device=DEVICE) < lengths[:, None, None, None]
    together = [x.contiguous() for x in gathered()]
    variants: dict[str, Variant] = {
        name: lambda name=name: decode_attention(*args, backend=name)
        for name in (("triton",) if DEVICE == "cuda" else ("cpu",))
        if name in available_backends()
    }
    if "cpu" in variants:
        settings = (1.0 / math.sqrt(D), 0.0, 0, None)
        variants["cpu, without checks"] = lambda: _decode_attention_native(*args, *settings)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q[:, :, None], k, v, attn_mask=mask, enable_gqa=HQ != HKV)[:, :, 0]

    variants["sdpa"] = lambda: attend(*together)
    variants["gather, sdpa"] = lambda: attend(*gathered())
    if dtype != torch.float32:  # which flash-attn does not take
        variants |= each({"flash-attn": flash_decode()}, lambda f: f(*args))
    tokens = int(lengths.sum())
    compare(
        "decode_attention",
        variants,
        shape=f"B={B} Hq={HQ} Hkv={HKV} D={D} T<={T}",
        dtype=dtype,
        oracle=lambda found: float((found[:few].double() - exact).abs().max()),
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        bytes_moved=2 * tokens * HKV * D * q.element_size(),
    )
