"""The decode batch: one row a seated sequence, the first `count` rows in use.

Everything that a step reads or writes of a sequence stands on the device, in tensors that are made
once: the token to feed, its position, how many tokens are drawn, the limits, the settings. A
sequence that ends gives its row to the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf.generation.attention import Batch, place
from fastrlhf.generation.pages import PagedCache
from fastrlhf.generation.requests import Finish, Request
from fastrlhf.generation.scheduler import Admitted
from fastrlhf_kernels import logprobs_from_logits, sample

# Codes of `Rows.verdicts`.
FINISHES: tuple[Finish | None, ...] = (None, "end", "length", "error")
END, LENGTH, ERROR = 1, 2, 3

NO_TOKEN = -1  # end token of a response that has none


class Settings:
    """Sampling settings of rows (B,): numbers where all requests of the run agree on them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        samplings = [request.sampling for request in requests]
        distinct = [set(column) for column in zip(*(s.filters for s in samplings), strict=True)]
        self.shared = [next(iter(values)) if len(values) == 1 else None for values in distinct]
        self.held = any(s.min_new_tokens > 0 and s.end_token_id is not None for s in samplings)
        """Whether some response may not end at once."""

    def alike(self, other: Settings) -> bool:
        """Whether a step captured for one draws for the other."""
        return (self.shared, self.held) == (other.shared, other.held)

    def of(self, columns: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of `sample`; columns: the four settings of the rows."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return {
            name: column if shared is None else shared
            for name, column, shared in zip(names, columns, self.shared, strict=True)
        }

    def draw(
        self, logits: Tensor, integers: Tensor, filters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their log-probs, and verdicts of one draw a row; integers: as in `Rows`."""
        drawn, minimum, limit, end = (integers[i] for i in (DRAWN, MINIMUM, LIMIT, END_TOKEN))
        arguments = self.of(filters)
        plain = logits
        if self.held:
            held = (drawn + 1 < minimum) & (end >= 0)
            column = end.clamp(min=0)[:, None]
            logits = logits.scatter(
                1, column, torch.where(held[:, None], -torch.inf, logits.gather(1, column))
            )
        tokens, logprobs, _ = sample(logits, integers[SEED], drawn, **arguments)
        if self.held:
            # Under the model's own distribution, as a policy update will see it.
            t = arguments["temperature"]
            t = torch.where(t == 0, 1.0, t) if isinstance(t, Tensor) else t or 1.0
            logprobs = torch.where(
                held, logprobs_from_logits(plain, tokens, temperature=t), logprobs
            )
        verdicts = torch.where(drawn + 1 >= limit, LENGTH, 0)
        verdicts = torch.where((tokens == end) & (drawn + 1 >= minimum), END, verdicts)
        return tokens, logprobs, torch.where(logprobs.isnan(), ERROR, verdicts)


# Rows of the table of integers.
TOKEN, POSITION, DRAWN, SEED, LIMIT, MINIMUM, END_TOKEN, TOP_K, REQUEST = range(9)


def columns_of(requests: Sequence[tuple[int, Request]], device: torch.device) -> tuple[Tensor, ...]:
    """Tables of integers (9, n) and filters (3, n) of requests whose first token is to be drawn."""
    integers, numbers = [], []
    for index, request in requests:
        s = request.sampling
        end = NO_TOKEN if s.end_token_id is None else s.end_token_id
        row = [0, len(request.prompt), 0, request.seed]
        integers.append([*row, s.max_new_tokens, s.min_new_tokens, end, s.top_k, index])
        numbers.append([s.temperature, s.top_p, s.min_p])
    return (
        torch.tensor(integers, dtype=torch.int64).T.contiguous().to(device),
        torch.tensor(numbers, dtype=torch.float32).T.contiguous().to(device),
    )


def filters_of(integers: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four settings that `sample` takes."""
    return numbers[0], integers[TOP_K], numbers[1], numbers[2]


class Rows:
    """State of the seated sequences."""

    def __init__(self, slots: int, pages: int, cache: PagedCache, device: torch.device) -> None:
        self.cache = cache
        self.seated: list[Admitted] = []
        self.integers = torch.zeros((9, slots), dtype=torch.int64, device=device)
        self.numbers = torch.zeros((3, slots), dtype=torch.float32, device=device)
        self.tables = torch.zeros((slots, pages), dtype=torch.int32, device=device)

    @property
    def count(self) -> int:
        """Rows in use."""
        return len(self.seated)

    def seat(self, sequences: Sequence[Admitted], integers: Tensor, numbers: Tensor) -> None:
        """Put sequences, whose first token is drawn, in the next rows."""
        rows = slice(self.count, self.count + len(sequences))
        self.integers[:, rows] = integers
        self.numbers[:, rows] = numbers
        width = self.tables.shape[1]
        tables = [s.pages + [0] * (width - len(s.pages)) for s in sequences]
        self.tables[rows] = torch.tensor(tables, dtype=torch.int32).to(self.tables.device)
        self.seated += sequences

    def unseat(self, row: int) -> Admitted:
        """Take a sequence out; the last one moves to its row."""
        gone, last = self.seated[row], self.count - 1
        if row != last:
            for table in (self.integers, self.numbers):
                table[:, row] = table[:, last]
            self.tables[row] = self.tables[last]
            self.seated[row] = self.seated[last]
        self.seated.pop()
        return gone

    @property
    def width(self) -> int:
        """Pages of the longest seated sequence, at its most."""
        return max(len(sequence.pages) for sequence in self.seated)

    def batch(self, rows: int, width: int, active: Tensor | None) -> tuple[Tensor, Tensor, Batch]:
        """Tokens and positions (B,) of the next step, and where they go.

        rows, width: how much of the state and of the block tables is looked at; active: (), how
        many of the rows are in use, where they are not all. A row that is not in use writes
        nothing, since its pages have gone to others, and sees nothing.
        """
        positions = self.integers[POSITION, :rows]
        tables = self.tables[:rows, :width]
        if tables.device.type == "cpu":
            tables = tables.contiguous()  # once a step, where each layer would else copy them
        if active is not None:
            used = torch.arange(rows, device=tables.device) < active
            positions = torch.where(used, positions, 0)
        slots, seq_lens = place(tables, positions), (positions + 1).to(torch.int32)
        if active is not None:
            slots = torch.where(used, slots, -1)
            seq_lens = torch.where(used, seq_lens, 0)
        batch = Batch(cache=self.cache, slots=slots, block_tables=tables, seq_lens=seq_lens)
        return self.integers[TOKEN, :rows], positions, batch

    def advance(self, rows: int, tokens: Tensor) -> None:
        """The drawn tokens (B,) are the next to feed."""
        self.integers[TOKEN, :rows] = tokens
        self.integers[POSITION : DRAWN + 1, :rows] += 1
