"""sample beside softmax and multinomial, with the filters as transformers' generate does them.

    pytest bench/bench_sample.py

Bytes: the logits read once. The variants draw different tokens, so tests/test_sample.py compares
results, not this file; "ref" has the same tokens as ours, to the last one.
"""

from __future__ import annotations

import pytest
import torch
from common import DEVICE, ours
from torch import Tensor

from fastrlhf_kernels import sample

SHAPES = [(64, 50257), (64, 151936)] if DEVICE == "cuda" else [(16, 163), (16, 50257)]
SETTINGS = {
    "no filters": {"temperature": 0.7},
    "top_k=50": {"temperature": 0.7, "top_k": 50},
    "top_p=0.9": {"temperature": 0.7, "top_p": 0.9},
}


def multinomial(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sort, mask, softmax, draw; and the token's log-prob before the filters."""
    scaled = logits.float() / temperature
    kept = scaled
    if 0 < top_k < logits.shape[1]:
        kept = kept.masked_fill(kept < kept.topk(top_k)[0][:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, places = kept.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        kept = kept.masked_fill(drop.scatter(1, places, drop), -torch.inf)
    tokens = torch.multinomial(kept.softmax(-1), 1)
    return tokens[:, 0], scaled.log_softmax(-1).gather(1, tokens)[:, 0]


@pytest.mark.parametrize("filters", SETTINGS)
@pytest.mark.parametrize(("B", "V"), SHAPES)
def test_sample(compare, B: int, V: int, filters: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(B, V, generator=generator)).to(DEVICE)
    seeds = torch.arange(B, device=DEVICE)
    settings = SETTINGS[filters]
    variants = {
        name: lambda name=name: sample(logits, seeds, seeds, **settings, backend=name)
        for name in ours("sample")
    }
    expected = sample(logits, seeds, seeds, **settings, backend="ref").tokens
    for name, call in variants.items():
        assert torch.equal(call().tokens, expected), name
    variants["softmax, multinomial"] = lambda: multinomial(logits, **settings)
    compare(
        "sample",
        variants,
        shape=f"B={B} V={V} {filters}",
        dtype=logits.dtype,
        bytes_moved=logits.nbytes,
    )
