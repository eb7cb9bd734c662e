"""What the benchmarks of PPO share: a model whose responses end as they should, and its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ppo_iteration
import torch
from bare_products import CONFIG, LAYERS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fastrlhf.encoding import prompt_ids
from fastrlhf.records import read_prompts
from fastrlhf.world import build_tokenizer

MEAN = 48  # tokens of a response, where responses end


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
