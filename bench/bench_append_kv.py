"""append_kv beside index_copy_ into a flat view of the cache.

    pytest bench/bench_append_kv.py

Bytes: keys and values read and written once. N tokens: of a decode step, and of a prompt.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE
from torch import Tensor

from fastrlhf_kernels import append_kv, available_backends
from fastrlhf_kernels.append_kv import _append_kv_native

SHAPES = [(8, 12, 64), (64, 4, 64), (4096, 4, 64)]
if DEVICE == "cuda":
    SHAPES = [(64, 8, 128), (8192, 8, 128)]
PAGE_SIZE = 16


def index_copy(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """No token may be skipped."""
    for x, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *x.shape[1:]).index_copy_(0, slots, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("N", "HKV", "D"), SHAPES)
def test_append_kv(compare, N: int, HKV: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pages = -(-4 * N // PAGE_SIZE)
    k, v = torch.randn(2, N, HKV, D, generator=generator).to(DEVICE, dtype)
    caches = [torch.zeros(pages, PAGE_SIZE, HKV, D, device=DEVICE, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(pages * PAGE_SIZE, generator=generator)[:N].to(DEVICE)
    wanted = [cache.clone() for cache in caches]
    index_copy(k, v, *wanted, slots)
    variants = {
        name: lambda name=name: append_kv(k, v, *caches, slots, backend=name)
        for name in (("triton",) if DEVICE == "cuda" else ("cpu",))
        if name in available_backends()
    }
    for name, call in variants.items():
        for cache in caches:
            cache.zero_()
        call()
        assert all(torch.equal(x, y) for x, y in zip(caches, wanted, strict=True)), name
    if "cpu" in variants:
        variants["cpu, without checks"] = lambda: _append_kv_native(k, v, *caches, slots)
    variants["index_copy_"] = lambda: index_copy(k, v, *caches, slots)
    compiled = torch.compile(index_copy)
    variants["index_copy_, torch.compile"] = lambda: compiled(k, v, *caches, slots)
    compare(
        "append_kv",
        variants,
        shape=f"N={N} Hkv={HKV} D={D}",
        dtype=dtype,
        bytes_moved=2 * (k.nbytes + v.nbytes),
    )
