"""From records to token lists: the dataset recipe of the paper, then texts as ids.

A sequence is [begin token, prompt, completion, end token]. Prompt and completion are tokenised
apart, so that a prompt's tokens do not depend on what follows; a completion that does not begin
with white space gets one blank before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from fastrlhf import records
from fastrlhf.batching import Example
from fastrlhf.config import require
from fastrlhf.records import Comparison, Demonstration, Document, PromptRecord

R = TypeVar("R", PromptRecord, Demonstration, Comparison)


@dataclass(slots=True, kw_only=True)
class Recipe:
    """What is done to prompts before they are used (InstructGPT, section 3.2 and appendix A)."""

    prefix_tokens: int = 0
    """Prompts that share a prefix of this many tokens count as duplicates; 0: none is dropped."""
    per_user: int = 200
    """At most so many prompts of one user; 0: no cap."""
    drop_personal_data: bool = False
    """Drop records with e-mail addresses, phone or card numbers (a heuristic)."""
    heldout: float = 0.0
    """Share of the users (of the prompts, where no user is named) kept out of training."""
    split_seed: int = 0
    """Seed of that split; the same in all stages, or held-out prompts leak."""
    max_prompt: int = 0
    """Longest prompt in tokens; 0: what the context leaves beside the response."""
    drop_long: bool = False
    """Drop prompts that are longer instead of refusing the file (the paper drops them)."""

    def __post_init__(self) -> None:
        require(0 <= self.heldout < 1, "heldout", f"must lie in [0, 1), got {self.heldout}")
        for name in ("prefix_tokens", "per_user", "max_prompt"):
            require(getattr(self, name) >= 0, name, "must not be negative")

    def apply(
        self,
        items: Sequence[R],
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        limit: int,
    ) -> tuple[list[R], list[R]]:
        """(training records, held-out records) of a file; prompts fit in ``limit`` tokens.

        Raises UserError naming file, line and field for a prompt that does not.
        """
        limit = min(limit, self.max_prompt) if self.max_prompt else limit
        kept = self._within(items, tokenizer, path, limit)
        kept = records.filter_personal_data(kept, self.drop_personal_data)
        if self.prefix_tokens:

            def encode(text: str) -> list[int]:
                return tokenizer(text, add_special_tokens=False)["input_ids"]

            kept = records.drop_near_duplicates(kept, self.prefix_tokens, encode)
        if self.per_user:
            kept = records.cap_per_user(kept, self.per_user)
        if self.heldout == 0.0:
            return list(kept), []
        train, heldout = records.split_by_user(
            kept, [1.0 - self.heldout, self.heldout], self.split_seed
        )
        return train, heldout

    def _within(
        self, items: Sequence[R], tokenizer: PreTrainedTokenizerBase, path: Path, limit: int
    ) -> list[R]:
        kept = []
        for item, ids in zip(items, prompt_ids(tokenizer, items), strict=True):
            if len(ids) > limit and self.drop_long:
                continue
            records.check_prompt_length(item, len(ids), limit, path)
            kept.append(item)
        return kept


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[PromptRecord | Demonstration | Comparison]
) -> list[list[int]]:
    """Token ids of each prompt, the begin token first where the tokenizer has one."""
    return text_prompt_ids(tokenizer, [item.prompt for item in items])


def text_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """As ``prompt_ids``, for plain strings."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [begin + ids for ids in _encode(tokenizer, prompts)]


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str], limit: int
) -> list[list[int]]:
    """Token ids of each completion, the end token last; one over ``limit`` is cut, with no end."""
    texts = [text if text[:1].isspace() else " " + text for text in completions]
    end = tokenizer.eos_token_id
    return [[*ids, end][:limit] for ids in _encode(tokenizer, texts)]


def demonstration_examples(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Demonstration], max_response: int
) -> list[Example]:
    """Prompt and completion as one sequence each, the loss on the completion alone."""
    prompts = prompt_ids(tokenizer, items)
    answers = completion_ids(tokenizer, [item.completion for item in items], max_response)
    return [Example((*p, *a), len(p)) for p, a in zip(prompts, answers, strict=True)]


def document_examples(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], context: int
) -> list[Example]:
    """Documents as sequences of at most ``context`` tokens, each predicted from its second token.

    A document closes with the end token. A long one, such as a plain text file, is cut into pieces
    that overlap by one token, so that each token is predicted once.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    examples = []
    for ids in _encode(tokenizer, [document.text for document in documents]):
        tokens = begin + ids + [tokenizer.eos_token_id]
        for first in range(0, max(1, len(tokens) - 1), context - 1):
            piece = tokens[first : first + context]
            if len(piece) > 1:
                examples.append(Example(tuple(piece)))
    return examples


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of a response: up to the end token, without special tokens and outer blanks."""
    end = tokenizer.eos_token_id
    ids = list(tokens)
    ids = ids[: ids.index(end)] if end in ids else ids
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def decode_prompt(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of a prompt, without special tokens and outer blanks.

    Unlike a response it is not cut at the end token: GPT-2 begins with the same one.
    """
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
