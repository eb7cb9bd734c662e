"""Generation with a paged KV cache: continuous batching, shared prompts, log-probs as drawn.

`generate` is what the trainer's stages call; `Engine` takes requests with settings of their own.
Every token is drawn by `fastrlhf_kernels.sample` from (seed of the sequence, position in the
response), so what is drawn from given logits does not depend on the batch.

    requests.py    what is asked and answered
    scheduler.py   who gets pages and a slot;  pages.py  the paged cache
    engine.py      the loop;  rows.py  the decode batch;  stops.py  stop strings
    decoder.py     prompts, and any model's own modules;  attention.py  their attention
    fused.py       the decode step of Llama-like models and GPT-2;  products.py  its products
    batch.py       `generate`
"""

from fastrlhf.generation.attention import UnsupportedModel
from fastrlhf.generation.batch import Generated, generate
from fastrlhf.generation.engine import Engine
from fastrlhf.generation.requests import (
    Counters,
    Outcome,
    Request,
    Result,
    Sampling,
    Token,
)

__all__ = [
    "Counters",
    "Engine",
    "Generated",
    "Outcome",
    "Request",
    "Result",
    "Sampling",
    "Token",
    "UnsupportedModel",
    "generate",
]
