"""Stop strings: whether the text of a response has come to contain one.

A token is a piece of text only beside its neighbours, so the last tokens of a response are decoded
together: as many as the longest stop string has bytes, and a few for characters of several tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastrlhf.generation.requests import Finish, Request

MARGIN = 8  # tokens before those that a stop string may take


class StopStrings:
    """The responses so far of those requests that have stop strings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, requests: Sequence[Request]
    ) -> None:
        self.tokenizer = tokenizer
        self.requests = requests
        self.drawn: dict[int, list[int]] = {
            index: [] for index, request in enumerate(requests) if request.sampling.stop
        }

    @property
    def wanted(self) -> bool:
        """Whether any request has stop strings."""
        return bool(self.drawn)

    def judge(
        self, indices: Sequence[int], tokens: Sequence[int], verdicts: Sequence[Finish | None]
    ) -> list[Finish | None]:
        """Take in a token for each of the requests; verdicts, with "stop" where one ends."""
        return [
            "stop" if verdict in (None, "length") and self._stops(index, token) else verdict
            for index, token, verdict in zip(indices, tokens, verdicts, strict=True)
        ]

    def _stops(self, index: int, token: int) -> bool:
        drawn = self.drawn.get(index)
        if drawn is None:
            return False
        drawn.append(token)
        sampling = self.requests[index].sampling
        if len(drawn) < sampling.min_new_tokens:
            return False
        assert self.tokenizer is not None
        longest = max(len(stop.encode()) for stop in sampling.stop)
        text = self.tokenizer.decode(drawn[-(longest + MARGIN) :])
        return any(stop in text for stop in sampling.stop)
