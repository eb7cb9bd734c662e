"""What the miniature's models say, and how simulated labelers rank it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastrlhf import world
from fastrlhf.encoding import decode, text_prompt_ids
from fastrlhf.generation import generate
from fastrlhf.models import LanguageModel, load_language_model
from fastrlhf.runlog import progress
from fastrlhf.tokenizers import load_tokenizer

MAX_RESPONSE = 9  # tokens: the longest right answer in quotes behind filler, and the end


@dataclass(slots=True, frozen=True)
class Answer:
    """A sampled response as words, and whether it came to its end."""

    words: tuple[str, ...]
    ended: bool


def answers(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    key: tuple[int | str, ...],
    *,
    temperature: float = 1.0,
) -> list[Answer]:
    """One sampled response to each prompt; another key draws other ones."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    first = int.from_bytes(digest, "big")  # 56 bits: room to count up in int64
    drawn = generate(
        model,
        text_prompt_ids(tokenizer, prompts),
        max_new_tokens=MAX_RESPONSE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seeds=range(first, first + len(prompts)),
        temperature=temperature,
        batch_size=512,
    )
    ended = drawn.ended(tokenizer.eos_token_id).tolist()
    return [
        Answer(tuple(decode(tokenizer, tokens[:n]).split()), end)
        for tokens, n, end in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), ended, strict=True)
    ]


# Who writes the outputs of a prompt that labelers rank: mostly the SFT model, as in the paper, and
# others for variety. One entry a sample: (model, prompt format, temperature).
WRITERS: tuple[tuple[str, str, float], ...] = (
    *[("sft", "chat", 1.0)] * 5,
    *[("start", "chat", 1.0)] * 3,
    *[("base", "careful", 1.0)] * 3,
    *[("sft", "chat", 1.5)] * 2,
)
FORMATS: dict[str, Callable[[world.Instruction], str]] = {
    "plain": world.plain_prompt,
    "careful": world.careful_prompt,
    "chat": world.chat_prompt,
}


def outputs_to_rank(
    models: Mapping[str, LanguageModel],
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    seed: int,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Prompt records with sampled ``completions`` and ``ended``, in shuffled order."""
    asked = instructions_of(records)
    drawn: list[list[Answer]] = [[] for _ in records]
    for number, (name, form, temperature) in enumerate(WRITERS):
        prompts = [FORMATS[form](instruction) for instruction in asked]
        for mine, answer in zip(
            drawn,
            answers(
                models[name],
                tokenizer,
                prompts,
                ("rank", seed, number),
                temperature=temperature,
            ),
            strict=True,
        ):
            mine.append(answer)
        advance(len(records))
    rng = np.random.default_rng(seed)
    written = []
    for record, mine in zip(records, drawn, strict=True):
        order = rng.permutation(len(mine))
        written.append(
            {
                **record,
                "completions": [" ".join(mine[k].words) for k in order],
                "ended": [mine[k].ended for k in order],
            }
        )
    return written


def collect_comparisons(
    made: world.World, seed: int, data: Path, models: Mapping[str, Path], prompts: int
) -> None:
    """Sample outputs, have them ranked, and write the four comparison files of the world's folder.

    ``models`` maps the names in WRITERS to checkpoints; ``prompts`` training prompts are ranked.

    Training and validation prompts go to the labelers in training; validation prompts go to the
    held-out labelers and to the hidden rule as well.
    """
    if (data / "comparisons.jsonl").is_file():  # written last
        return
    loaded = {name: load_language_model(path) for name, path in models.items()}
    tokenizer = load_tokenizer(models["base"])
    labelers = world.world_labelers(seed)
    own = [labeler for labeler in labelers if not labeler.held_out]
    others = [labeler for labeler in labelers if labeler.held_out]
    train = read_jsonl(data / "prompts_rm.jsonl")[:prompts]
    validation = read_jsonl(data / "prompts_validation.jsonl")
    total = len(WRITERS) * (len(train) + len(validation))
    with progress("comparisons", total, "response") as bar:
        held = outputs_to_rank(loaded, tokenizer, validation, seed * 10 + 2, bar.advance)
        mine = outputs_to_rank(loaded, tokenizer, train, seed * 10 + 1, bar.advance)
    ranked = list(world.label(made, held, own, seed * 10 + 2))
    by_rule = [{**r, "ranks": gold_ranks(made, r)} for r in ranked]
    write_jsonl(data / "comparisons_validation.jsonl", ranked)
    write_jsonl(data / "comparisons_gold.jsonl", by_rule)
    write_jsonl(
        data / "comparisons_heldout.jsonl",
        list(world.label(made, held, others, seed * 10 + 3)),
    )
    write_jsonl(data / "comparisons.jsonl", list(world.label(made, mine, own, seed * 10 + 1)))


def gold_ranks(made: world.World, record: Mapping[str, Any]) -> list[int]:
    """Ranks of a comparison's outputs by the hidden rule, without noise."""
    (instruction,) = instructions_of([record])
    scores = [
        world.judge(made, instruction, text.split(), ended).score
        for text, ended in zip(record["completions"], record["ended"], strict=True)
    ]
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


def instructions_of(records: Sequence[Mapping[str, Any]]) -> list[world.Instruction]:
    """The structured instructions of prompt records."""
    return [world.Instruction.from_dict(record["instruction"]) for record in records]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, whole or not at all."""
    staging = path.with_name(path.name + ".partial")
    with staging.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    staging.replace(path)
