"""Generation beside transformers' generate and generate_batch; a decode step beside its bytes.

    pytest bench/bench_generation.py

Llama of 8M and 30M parameters (V = 8192) in fp32, on a GPU of 30M and 1.2G in bf16, random weights,
temperature 1, prompts of 32 tokens that are all different, response lengths drawn beforehand
(geometric, mean 48, at most 128), the end forced there on all sides. All variants do the same
useful work, so the ratio of their times is that of useful tokens per second; TFLOP/s counts two
operations a weight and useful token, of the prompts too. The ceiling is the decode steps' matrix
products alone, with as many rows as are alive at each step, into outputs made beforehand by torch;
beside them those of weights packed as in our own steps (fastrlhf/generation/products.py).

On a GPU, the time of a decode step of models of 1.2G and 6.7G parameters in bf16 is set beside what
a copy as large as the weights and the keys and values that it reads takes: 64 sequences of 256
prompt tokens, all different, and as the step's time the difference of runs of 192 and of 64 new
tokens by 128. That holds all that the host does.

Attention, sampling and stopping of each variant are its own, so there is no common result to
compare; tests/test_generation_models.py compares tokens and log-probs.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from common import DEVICE, Row, Variant, interleave, with_peak
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fastrlhf.generation import Engine, Request, Sampling
from fastrlhf.generation.products import Product, packs

V, PROMPT, LONGEST, MEAN = 8192, 32, 128, 48
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASES = [("30M", 128), ("1.2G", 64)] if DEVICE == "cuda" else [("8M", 32), ("30M", 128)]


def shape(H: int, F: int, layers: int, heads: int = 8, kv_heads: int = 8, V: int = V) -> dict:
    return {
        "hidden_size": H,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": V,
    }


SHAPES = {
    "8M": shape(256, 688, 5),
    "30M": shape(512, 1376, 7),
    "1.2G": shape(2048, 8192, 16, 32, 8, 128256) | {"tie_word_embeddings": True},  # Llama 3.2 1B
    "6.7G": shape(4096, 11008, 32, 32, 32, 32000),  # Llama 2 7B
}


def model_of(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **SHAPES[size],
    )
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(config, dtype=DTYPE).eval()


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
    """What generate_batch does, with a length for each request.

    On a CPU with a cache that holds these requests, a page each: of itself it takes nearly all
    memory, and three times as long.
    """
    cache = None
    if DEVICE == "cpu":
        n = len(prompts)
        cache = ContinuousBatchingConfig(
            num_blocks=n + 4, max_batch_tokens=n * PROMPT, max_requests_per_batch=n
        )
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )
    found = 0
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=cache, block=True, timeout=5
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


def multiplied(model: LlamaForCausalLM) -> int:
    """Weights that a token is multiplied with: all but the embedding, unless that is the head."""
    count = sum(p.numel() for p in model.parameters())
    tied = model.config.tie_word_embeddings
    return count if tied else count - model.model.embed_tokens.weight.numel()


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
    inputs = [torch.randn(n, g[0].in_features, device=DEVICE, dtype=DTYPE) for g in groups]
    if packed:
        by_layout = [Product(group, packed=True, rows=n) for group in groups]
    else:
        weights = [torch.cat([m.weight for m in group]).t() for group in groups]
        outputs = [torch.empty(n, w.shape[1], device=DEVICE, dtype=DTYPE) for w in weights]

    @torch.inference_mode()
    def run() -> None:
        for rows, steps in alive.items():
            for _ in range(steps):
                if packed:
                    for x, product in zip(inputs, by_layout, strict=True):
                        product(x[:rows])
                else:
                    for x, w, out in zip(inputs, weights, outputs, strict=True):
                        torch.mm(x[:rows], w, out=out[:rows])

    return run


@pytest.mark.parametrize(("size", "n"), CASES)
def test_generation(compare, size: str, n: int) -> None:
    model = model_of(size)
    vocabulary = SHAPES[size]["vocab_size"]
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / MEAN, n), LONGEST).tolist()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (n, PROMPT), generator=generator).to(DEVICE)
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
        ceilings["products alone, packed"] = products(model, lengths, packed=True)
    compare(
        "generation",
        variants,
        shape=f"{size} B={n} {sum(lengths)} tokens",
        dtype=DTYPE,
        flops=2 * multiplied(model) * (sum(lengths) + n * PROMPT),
        ceilings=ceilings,
        rounds=2 if (DEVICE, size) == ("cpu", "30M") else 3,
        least=3,
        pause=0.2,
        peaks=DEVICE == "cuda",  # a CPU's profiler would count in calls that are made once
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="the bound of a decode step's bytes is a GPU's")
@pytest.mark.parametrize("size", ["1.2G", "6.7G"])
def test_decode_step(keep, size: str) -> None:
    model, n, length, few, many = model_of(size), 64, 256, 64, 192
    config = model.config
    prompts = torch.randint(3, config.vocab_size, (n, length)).tolist()
    engine = Engine(model, slots=n, keep=True)

    def seconds(new: int) -> float:
        requests = [
            Request(prompt=prompt, seed=i, sampling=Sampling(max_new_tokens=new))
            for i, prompt in enumerate(prompts)
        ]
        torch.cuda.synchronize()
        began = time.perf_counter()
        wanted(engine.run(requests).lengths.tolist(), [new] * n)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    _, peak = with_peak(lambda: seconds(many))  # captures all graphs
    times = [(seconds(many) - seconds(few)) / (many - few) for _ in range(5)]
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    seen = length + (few + many) // 2
    moved = 2 * multiplied(model) + n * seen * a_token
    source = torch.empty(1 << 29, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    copies = interleave({"copy": lambda: target.copy_(source)})["copy"]
    rate = 2 * source.nbytes / statistics.median(copies)
    low, median, high = statistics.quantiles(times, n=4)
    row = Row(
        "decode_step",
        "triton",
        DEVICE,
        f"{size} B={n}, {seen} tokens seen",
        "bfloat16",
        median_s=median,
        iqr_s=high - low,
        rounds=len(times),
        gb_per_s=moved / median * 1e-9,
        share_of_copy=moved / rate / median,
        peak_bytes=peak,
    )
    keep([row])
