"""Sample responses to a file of prompts.

    fastrlhf generate --model runs/demo/ppo-ptx/model --prompts prompts.jsonl --out answers.jsonl

Writes one JSON line a response: prompt, completion, tokens, logprob (summed, in nats), ended, and
the prompt's other fields. Samples are a function of the seed, the prompt's place in the file and
the sample's number, whatever the batch size; those of one prompt share its work and memory. Ctrl-C
leaves the responses that are finished in OUT.partial.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastrlhf.config import require, resolve
from fastrlhf.encoding import Recipe, decode, prompt_ids
from fastrlhf.errors import UserError
from fastrlhf.generation import Engine, Request, Sampling
from fastrlhf.models import load_language_model
from fastrlhf.records import read_prompts
from fastrlhf.runlog import writable_dir
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
    min_response: int = 0
    """Shortest response in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the end token."""
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
        require(
            0 <= self.min_response <= self.max_response,
            "min_response",
            f"must lie in [0, {self.max_response}] (max_response), got {self.min_response}",
        )
        require(all(self.stop), "stop", "an empty string ends every response")
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
    sampling = Sampling(
        max_new_tokens=config.max_response,
        min_new_tokens=config.min_response,
        end_token_id=tokenizer.eos_token_id,
        stop=config.stop,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
    first = config.seed << 32
    requests = [
        Request(prompt=ids[row // config.samples], seed=first + row, sampling=sampling)
        for row in range(total)
    ]
    engine = Engine(model, slots=config.batch_size, tokenizer=tokenizer)
    answers = engine.run(requests, progress=True)
    if broken := answers.finishes.count("error"):
        raise UserError(f"{config.model}: {broken} of {total} responses met logits that are NaN")
    staging = config.out.with_name(config.out.name + ".partial")
    with staging.open("w", encoding="utf-8") as file:
        for row, answer in enumerate(answers):
            if answer.finish == "interrupted":
                continue
            item = items[row // config.samples]
            line = {
                "prompt": item.prompt,
                "completion": decode(tokenizer, answer.tokens),
                "tokens": len(answer.tokens),
                "logprob": float(answer.logprobs.sum()),
                "ended": answer.finish == "end",
            }
            extra = {"user": item.user} if item.user is not None else {}
            file.write(json.dumps(extra | item.extra | line, ensure_ascii=False) + "\n")
    if answers.interrupted:
        raise KeyboardInterrupt
    staging.replace(config.out)
    return config.out
