"""An iteration of PPO beside that of TRL 1.12's PPOTrainer, phase by phase.

    make trl-1.12               # TRL's, in an environment of its own
    pytest bench/bench_ppo.py

A Llama of 8.5M parameters (V = 8192, random weights, fp32) is policy, reference, reward and value
model; 32 prompts, one pass over them in one optimiser step on both sides, no pretraining loss. In
`geometric` the prompts have 8 to 128 tokens and a response ends at each token with probability
1/48, at the latest after 128: the head's row of the end token is made so. In `full` prompts of 32
are answered by 64 tokens, and none ends. TRL samples to the full length and cuts afterwards; its
time does not depend on the draws, and ours is that of what was drawn.

The ceiling is the matrix products with weights that an iteration cannot avoid, each timed by
torch.mm into an output made beforehand: sampling (each prompt once, then as many rows as are alive
at each step), one pass of the reference, of the value and of the reward model, forward and backward
(two more products each) of policy and value model; of the policy's and the reference's heads only
rows of responses. Their number and their floating-point operations are printed. Memory is resident
memory at its peak, above what the process held before it loaded the models and above the weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import beside
import ppo_iteration
import pytest
import torch
from common import Missing, Row
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fastrlhf.encoding import prompt_ids
from fastrlhf.records import read_prompts
from fastrlhf.world import build_tokenizer

EPISODES, MEAN, TIMED = 32, 48, 4
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CASES = {
    "geometric": ([8 + i * 120 // (EPISODES - 1) for i in range(EPISODES)], 128),
    "full": ([32] * EPISODES, 64),
}
Products = Counter[tuple[int, int, int]]  # (rows, inner, columns) of a product -> how many


@torch.no_grad()
def llama(tokenizer: PreTrainedTokenizerBase, *, ends: bool) -> LlamaForCausalLM:
    """A random model that ends with probability 1/MEAN at each token, or never."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **CONFIG,
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


def layer_products(rows: int) -> Products:
    """The products of all decoder blocks, forward."""
    h, f, n = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    one = [(rows, h, 3 * h), (rows, h, h), (rows, h, 2 * f), (rows, f, h)]
    return Counter(dict.fromkeys(one, n))


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


def needed(lengths: Sequence[tuple[int, int]]) -> dict[str, Products]:
    """The products of an iteration with these prompts and responses, by phase."""
    prompts, responses = (sum(each) for each in zip(*lengths, strict=True))
    sampling = layer_products(prompts) + head_products(len(lengths))
    for step in range(1, max(n for _, n in lengths)):
        alive = sum(n > step for _, n in lengths)
        sampling += layer_products(alive) + head_products(alive)
    # Of a sequence's last token only the reward model needs a hidden state.
    read, rewarded = prompts + responses - len(lengths), prompts + responses
    return {
        "sample": sampling,
        "reference": layer_products(read) + head_products(responses),
        "value": layer_products(read),
        "reward": layer_products(rewarded),
        "update policy": with_backward(layer_products(read) + head_products(responses)),
        "update value": with_backward(layer_products(read)),
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


def rows_of(case: str, shape: str, found: Any, variant: str) -> Row:
    """The row of a side's result."""
    row = Row("PPO iteration", variant, "cpu", f"{case}: {shape}", "float32")
    if isinstance(found, Missing):
        row.note = found.why
        return row
    times = [i["seconds"] for i in found["iterations"][1:]]
    low, row.median_s, high = statistics.quantiles(times, n=4)
    row.iqr_s, row.rounds, row.peak_bytes = high - low, len(times), found["peak_bytes"]
    return row


@pytest.mark.parametrize("case", CASES)
def test_ppo(keep: Any, case: str) -> None:
    prompts, new_tokens = CASES[case]
    shape = f"{EPISODES} prompts of {min(prompts)} to {max(prompts)}, {new_tokens} at most"
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = llama(tokenizer, ends=case == "geometric")
        ppo_iteration.write_run(folder, model, tokenizer, prompts, [128] * EPISODES)
        given: dict[str, Any] = {
            "model": str(folder / "policy"),
            "reward_model": str(folder / "reward"),
            "data": str(folder),
            "prompts": prompt_ids(tokenizer, read_prompts(folder / "prompts.jsonl")),
            "new_tokens": new_tokens,
            "iterations": 1 + TIMED,
            "ptx_ratio": 0.0,
            "lr": 1e-6,
            "seed": 0,
        }
        assert [len(p) for p in given["prompts"]] == prompts
        theirs = beside.trl_1_12("ppo", given)
        found = beside.ours("ppo", given)
        mixed = beside.ours("ppo", given | {"ptx_ratio": 1.0})
    rows = [
        rows_of(case, shape, found, "cpu"),
        rows_of(case, shape, theirs, "TRL 1.12"),
        rows_of(case, shape, mixed, "ours, with as many pretraining sequences"),
    ]
    phases: dict[str, Any] = {}
    for name, side in (("ours", found), ("TRL 1.12", theirs)):
        if not isinstance(side, Missing):
            timed = side["iterations"][1:]
            phases[name] = {k: statistics.median(i[k] for i in timed) for k in timed[0]}
    if not isinstance(found, Missing):
        bare = [needed(lengths) for lengths in found["lengths"][1:]]
        times = [{k: seconds_of(p) for k, p in each.items()} for each in bare]
        phases["bare products"] = {k: statistics.median(t[k] for t in times) for k in times[0]}
        sums = [sum(t.values()) for t in times]
        low, middle, high = statistics.quantiles(sums, n=4)
        flops = statistics.median(sum(map(operations, each.values())) for each in bare)
        counts = statistics.median(sum(p.total() for p in each.values()) for each in bare)
        rows.append(
            Row(
                "PPO iteration", "bare products", "cpu", rows[0].shape, "float32",
                median_s=middle, iqr_s=high - low, rounds=len(sums), ceiling=True, peak_bytes=0,
            )
        )  # fmt: skip
        for row in rows[0], rows[-1]:
            row.tflop_per_s = flops / row.median_s * 1e-12
        mean = statistics.mean(n for lengths in found["lengths"][1:] for _, n in lengths)
        phases["work"] = {"mean response": mean, "products": counts, "operations": flops}
    keep(rows, phases=phases)
