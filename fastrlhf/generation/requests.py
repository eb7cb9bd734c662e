"""What is asked of the generator and what it answers: `Sampling`, `Request`, `Outcome`.

A request is a prompt (token ids), a seed, and the settings of its sampling. The token at position
i of its response is a function of (logits, seed, i, settings), so that it does not depend on what
else is generated at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Finish = Literal["end", "stop", "length", "error", "interrupted"]
"""Why a response is over: the end token, a stop string, max_new_tokens, logits that are no numbers,
or an interrupt (Ctrl-C) before it was finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one response is drawn, and when it ends."""

    max_new_tokens: int = 128
    """Longest response in tokens, the end token counted."""
    min_new_tokens: int = 0
    """The end token is not drawn, and stop strings do not count, before there are as many."""
    end_token_id: int | None = None
    """Token that ends the response and belongs to it; None: it runs to max_new_tokens exactly."""
    stop: tuple[str, ...] = ()
    """Strings that end the response; the token that completes one still belongs to it."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Draw among tokens with at least this share of the likeliest one's probability."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        _require(
            self.end_token_id is None or self.end_token_id >= 0,
            "end_token_id",
            self.end_token_id,
            "a token id or None",
        )
        _require(
            not isinstance(self.stop, str) and all(self.stop),
            "stop",
            self.stop,
            "a tuple of strings, none empty",
        )
        _require(
            0 <= self.temperature < math.inf, "temperature", self.temperature, "at least 0, finite"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """(temperature, top_k, top_p, min_p), as `sample` takes them."""
        return self.temperature, self.top_k, self.top_p, self.min_p


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: must be {wanted}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to generate. Requests with equal prompts share the prompt's work and memory."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    seed: int = 0
    """int64; equal seeds at equal logits draw equal tokens, so samples of one prompt need their
    own."""
    sampling: Sampling = field(default_factory=Sampling)
    """Settings of this response."""


class Token(NamedTuple):
    """One drawn token, as it is streamed."""

    request: int
    """Index of the request."""
    token: int
    logprob: float
    """In nats, under softmax(logits / temperature), before any filter."""
    finish: Finish | None
    """Why the response ends with this token; None where it goes on."""


class Result(NamedTuple):
    """One response."""

    tokens: list[int]
    logprobs: Tensor  # (len(tokens),) fp32
    finish: Finish
    error: str | None
    """What went wrong, where finish is "error"."""


@dataclass(slots=True, kw_only=True)
class Counters:
    """Work that a run has done, by count."""

    slots: int = 0
    """Sequences that are decoded together, at most."""
    steps: int = 0
    """Decode steps."""
    decoded: int = 0
    """Sequences summed over decode steps: tokens drawn beside the first ones."""
    prefill_tokens: int = 0
    """Prompt tokens that went through the model."""
    prompt_pages: int = 0
    """Pages that prompts were written to."""
    copied_pages: int = 0
    """Pages copied because samples of a prompt go on in a page that holds its last tokens."""
    pages: int = 0
    """Pages that the cache has."""
    peak_pages: int = 0
    """Pages in use at the fullest moment."""
    page_bytes: int = 0
    """Bytes of a page, over all layers, keys and values."""

    @property
    def occupancy(self) -> float:
        """Share of slots that held a sequence, over all decode steps; 1 where there were none."""
        return self.decoded / (self.slots * self.steps) if self.steps else 1.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """All responses of a run, in the order of the requests; R is the longest one allowed."""

    tokens: Tensor
    """(N, R) int64; what stands after a response's end is undefined."""
    logprobs: Tensor
    """(N, R) fp32, likewise."""
    lengths: Tensor
    """(N,) int64."""
    finishes: list[Finish]
    """Why each response is over."""
    interrupted: bool
    """An interrupt ended the run: responses that were not finished have length 0."""
    counters: Counters

    def __len__(self) -> int:
        return len(self.finishes)

    def __iter__(self) -> Iterator[Result]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Result:
        n = int(self.lengths[index])
        finish = self.finishes[index]
        return Result(
            self.tokens[index, :n].tolist(),
            self.logprobs[index, :n],
            finish,
            "the model's logits are no numbers (NaN or infinite)" if finish == "error" else None,
        )

    def padded(self, pad_token_id: int) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs cut to the longest response, padding and 0 after each one's end."""
        longest = max(int(self.lengths.max()), 1) if len(self) else 0
        past = torch.arange(longest, device=self.tokens.device) >= self.lengths[:, None]
        return (
            self.tokens[:, :longest].masked_fill(past, pad_token_id),
            self.logprobs[:, :longest].masked_fill(past, 0.0),
        )
