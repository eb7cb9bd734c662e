"""What the benchmarks of PPO share: the model, and the matrix products that cannot be avoided.

An iteration's products with weights, each timed by torch.mm into an output made beforehand:
sampling (each prompt once, then as many rows as are alive at each step), one pass of the reference,
of the value and of the reward model, forward and backward (two more products each) of policy and
value model; of the policy's and the reference's heads only rows of responses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ppo_iteration
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fastrlhf.encoding import prompt_ids
from fastrlhf.records import read_prompts
from fastrlhf.world import build_tokenizer

MEAN = 48  # tokens of a response, where responses end
LAYERS = 5
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
Products = Counter[tuple[int, int, int]]  # (rows, inner, columns) of a product -> how many


@torch.no_grad()
def llama(
    tokenizer: PreTrainedTokenizerBase, *, ends: bool, layers: int = LAYERS
) -> LlamaForCausalLM:
    """A random model that ends with probability 1/MEAN at each token, or never."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **CONFIG,
            num_hidden_layers=layers,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # All hidden states share a direction, in which the end token's row then sets its logit.
    model.model.embed_tokens.weight += 1.0
    end = model.lm_head.weight[tokenizer.eos_token_id]
    end.zero_()
    ids = torch.randint(10, CONFIG["vocab_size"], (8, 64))
    hidden = model.model(ids).last_hidden_state
    along = hidden.mean()
    others = model.lm_head(hidden).logsumexp(-1).mean()
    logit = others - torch.tensor(MEAN - 1.0).log() if ends else others - 40.0
    end.fill_(float(logit / (along * CONFIG["hidden_size"])))
    return model


def write_case(
    folder: Path,
    prompts: Sequence[int],
    new_tokens: int,
    *,
    iterations: int,
    ends: bool,
    layers: int = LAYERS,
) -> dict[str, Any]:
    """Models and data to the folder, for prompts of these lengths; what the sides need to know."""
    tokenizer = build_tokenizer()
    model = llama(tokenizer, ends=ends, layers=layers)
    ppo_iteration.write_run(folder, model, tokenizer, prompts, [128] * len(prompts))
    ids = prompt_ids(tokenizer, read_prompts(folder / "prompts.jsonl"))
    assert [len(p) for p in ids] == list(prompts)
    return {
        "model": str(folder / "policy"),
        "reward_model": str(folder / "reward"),
        "data": str(folder),
        "prompts": ids,
        "new_tokens": new_tokens,
        "iterations": iterations,
        "ptx_ratio": 0.0,
        "lr": 1e-6,
        "seed": 0,
    }


def layer_products(rows: int, layers: int) -> Products:
    """The products of all decoder blocks, forward."""
    h, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    one = [(rows, h, 3 * h), (rows, h, h), (rows, h, 2 * f), (rows, f, h)]
    return Counter(dict.fromkeys(one, layers))


def head_products(rows: int) -> Products:
    """The product with the output embedding."""
    return Counter({(rows, CONFIG["hidden_size"], CONFIG["vocab_size"]): 1})


def with_backward(products: Products) -> Products:
    """Beside each product those for the gradients of input and weight."""
    found = Counter(products)
    for (rows, inner, columns), count in products.items():
        found[rows, columns, inner] += count
        found[inner, rows, columns] += count
    return found


def needed(lengths: Sequence[tuple[int, int]], layers: int = LAYERS) -> dict[str, Products]:
    """The products of an iteration with these prompts and responses, by phase."""

    def blocks(rows: int) -> Products:
        return layer_products(rows, layers)

    prompts, responses = (sum(each) for each in zip(*lengths, strict=True))
    sampling = blocks(prompts) + head_products(len(lengths))
    for step in range(1, max(n for _, n in lengths)):
        alive = sum(n > step for _, n in lengths)
        sampling += blocks(alive) + head_products(alive)
    # Of a sequence's last token only the reward model needs a hidden state.
    read, rewarded = prompts + responses - len(lengths), prompts + responses
    return {
        "sample": sampling,
        "reference": blocks(read) + head_products(responses),
        "value": blocks(read),
        "reward": blocks(rewarded),
        "update policy": with_backward(blocks(read) + head_products(responses)),
        "update value": with_backward(blocks(read)),
    }


def seconds_of(products: Products) -> float:
    """How long they take, one after the other."""
    operands: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {
        (m, k, n): (torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in products
    }
    began = 0.0
    for warm in (True, False):
        began = time.perf_counter()
        for shape, count in products.items():
            a, b, out = operands[shape]
            for _ in range(1 if warm else count):
                torch.mm(a, b, out=out)
    return time.perf_counter() - began


def operations(products: Products) -> int:
    return sum(2 * m * k * n * count for (m, k, n), count in products.items())
