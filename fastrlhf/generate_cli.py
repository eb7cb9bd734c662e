"""Sample responses to a file of prompts.

    fastrlhf generate --model runs/demo/ppo-ptx/model --prompts prompts.jsonl --out answers.jsonl

Writes one JSON line a response: prompt, completion, tokens, logprob (summed, in nats), ended, and
the prompt's other fields. Samples are a function of the seed, the prompt's place in the file and
the sample's number, whatever the batch size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastrlhf.config import require, resolve
from fastrlhf.encoding import Recipe, decode, prompt_ids
from fastrlhf.generation import generate
from fastrlhf.models import load_language_model
from fastrlhf.records import read_prompts
from fastrlhf.runlog import progress, writable_dir
from fastrlhf.tokenizers import load_tokenizer


@dataclass(slots=True, kw_only=True)
class GenerateConfig:
    """Settings of sampling."""

    model: Path
    """Language model (a Hugging Face folder)."""
    prompts: Path
    """JSON lines with prompt."""
    out: Path
    """File of JSON lines to write; taken whole at the end."""
    data: Path | None = None
    """Folder that relative prompt files are looked up in."""
    recipe: Recipe = field(default_factory=lambda: Recipe(per_user=0))
    """What is done to the prompts first."""
    samples: int = 1
    """Responses to each prompt."""
    max_response: int = 128
    """Longest response in tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0: always the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Draw among tokens with at least this share of the likeliest one's probability."""
    batch_size: int = 64
    """Sequences generated together."""
    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_response", "batch_size"):
            require(getattr(self, name) > 0, name, f"must be positive, got {getattr(self, name)}")
        require(self.temperature >= 0, "temperature", "must not be negative")
        require(self.top_k >= 0, "top_k", "must not be negative")
        require(0 < self.top_p <= 1, "top_p", f"must lie in (0, 1], got {self.top_p}")
        require(0 <= self.min_p <= 1, "min_p", f"must lie in [0, 1], got {self.min_p}")


def run(config: GenerateConfig) -> Path:
    """Sample and write; returns the file."""
    writable_dir(config.out.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_language_model(config.model).to(device)
    tokenizer = load_tokenizer(config.model)
    path = resolve(config.data, config.prompts)
    require(
        config.max_response < model.context,
        "max_response",
        f"leaves no room for a prompt in {model.context} tokens",
    )
    items, _ = config.recipe.apply(
        read_prompts(path), tokenizer, path, model.context - config.max_response
    )
    ids = prompt_ids(tokenizer, items)
    total = len(items) * config.samples
    with progress("generate", total, "response") as bar:
        answers = generate(
            model,
            [p for p in ids for _ in range(config.samples)],
            max_new_tokens=config.max_response,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seeds=range(config.seed << 32, (config.seed << 32) + total),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            batch_size=config.batch_size,
            advance=bar.advance,
        )
    ended = answers.ended(tokenizer.eos_token_id).tolist()
    staging = config.out.with_name(config.out.name + ".partial")
    with staging.open("w", encoding="utf-8") as file:
        for row, (tokens, n) in enumerate(
            zip(answers.tokens.tolist(), answers.lengths.tolist(), strict=True)
        ):
            item = items[row // config.samples]
            line = {
                "prompt": item.prompt,
                "completion": decode(tokenizer, tokens[:n]),
                "tokens": n,
                "logprob": float(answers.logprobs[row].sum()),
                "ended": ended[row],
            }
            extra = {"user": item.user} if item.user is not None else {}
            file.write(json.dumps(extra | item.extra | line, ensure_ascii=False) + "\n")
    staging.replace(config.out)
    return config.out
