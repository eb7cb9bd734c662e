"""Generation beside transformers' generate and generate_batch.

    pytest bench/bench_generation.py

Llama of 8M and 30M parameters (V = 8192), random weights, fp32, temperature 1, prompts of 32 tokens
that are all different, response lengths drawn beforehand (geometric, mean 48, at most 128), the end
forced there on all sides. All variants do the same useful work, so the ratio of their times is that
of useful tokens per second; TFLOP/s counts two operations a weight and useful token, of the prompts
too. The ceiling is the decode steps' matrix products alone, with as many rows as are alive at each
step, into outputs made beforehand: in rows as torch has them, and in oneDNN's blocks.

Attention, sampling and stopping of each variant are its own, so there is no common result to
compare; tests/test_generation_models.py compares tokens and log-probs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from common import DEVICE, Variant
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fastrlhf.generation import Engine, Request, Sampling
from fastrlhf.generation.products import Product, packs

V, PROMPT, LONGEST, MEAN = 8192, 32, 128, 48
SHAPES = {
    "8M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5},
    "30M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7},
}


def model_of(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **SHAPES[size],
    )
    return LlamaForCausalLM(config).to(DEVICE).eval()


class Lengths(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths, device=DEVICE)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows have ended, (B,) bool."""
        return input_ids.shape[1] - PROMPT >= self.lengths


def theirs(model: LlamaForCausalLM, ids: Tensor, lengths: list[int], cache: str) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(lengths),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        cache_implementation=cache,
        stopping_criteria=StoppingCriteriaList([Lengths(lengths)]),
    )


def continuous(model: LlamaForCausalLM, prompts: list[list[int]], lengths: list[int]) -> int:
    """What generate_batch does, with a length for each request."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )
    found = 0
    with model.continuous_batching_context_manager(
        generation_config=config, block=True, timeout=5
    ) as manager:
        for prompt, length in zip(prompts, lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        left = len(prompts)
        while left:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                left -= 1
                found += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("generate_batch has stopped before its requests were finished")
    return found


def wanted(found: Any, right: Any) -> None:
    """Refuse work of another amount."""
    if found != right:
        raise AssertionError(f"generated {found}, wanted {right}")


@torch.inference_mode()
def products(model: LlamaForCausalLM, lengths: list[int], *, packed: bool) -> Any:
    """A function that does the matrix products of all decode steps."""
    alive = Counter(sum(length > step for length in lengths) for step in range(1, max(lengths)))
    n = len(lengths)
    groups = [[model.lm_head]]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
    inputs = [torch.randn(n, group[0].in_features, device=DEVICE) for group in groups]
    if packed:
        blocked = [Product(group, packed=True, rows=n) for group in groups]
    else:
        weights = [torch.cat([m.weight for m in group]).t() for group in groups]
        outputs = [torch.empty(n, w.shape[1], device=DEVICE) for w in weights]

    @torch.inference_mode()
    def run() -> None:
        for rows, steps in alive.items():
            for _ in range(steps):
                if packed:
                    for x, product in zip(inputs, blocked, strict=True):
                        product(x[:rows])
                else:
                    for x, w, out in zip(inputs, weights, outputs, strict=True):
                        torch.mm(x[:rows], w, out=out[:rows])

    return run


@pytest.mark.parametrize(("size", "n"), [("8M", 32), ("30M", 128)])
def test_generation(compare, size: str, n: int) -> None:
    model = model_of(size)
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / MEAN, n), LONGEST).tolist()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (n, PROMPT), generator=generator).to(DEVICE)
    prompts = ids.tolist()
    requests = [
        Request(prompt=prompt, seed=i, sampling=Sampling(max_new_tokens=length))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    engine = Engine(model, slots=n)
    # What a variant gives is what is counted: all tokens, or the padded shape.
    useful, padded = sum(lengths), (n, PROMPT + max(lengths))
    variants: dict[str, Variant] = {
        "triton" if DEVICE == "cuda" else "cpu": lambda: wanted(
            engine.run(requests).lengths.tolist(), lengths
        ),
        "generate, dynamic": lambda: wanted(theirs(model, ids, lengths, "dynamic").shape, padded),
        "generate, static": lambda: wanted(theirs(model, ids, lengths, "static").shape, padded),
        "generate_batch": lambda: wanted(continuous(model, prompts, lengths), useful),
    }
    ceilings = {"products alone": products(model, lengths, packed=False)}
    if packs(model.lm_head.weight):
        ceilings["products alone, in blocks"] = products(model, lengths, packed=True)
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    compare(
        "generation",
        variants,
        shape=f"{size} B={n} {sum(lengths)} tokens",
        dtype=torch.float32,
        flops=2 * weights * (sum(lengths) + n * PROMPT),
        ceilings=ceilings,
        rounds=3,
        pause=0.2,
    )
