"""Cheap scalar draws from a ``numpy.random.Generator``.

A scalar call of a numpy generator costs microseconds, a document takes a dozen of them. ``Dice``
draws uniforms by the block and hands them out one by one, which is some twenty times cheaper, and
as reproducible: the same generator state gives the same draws. ``stream`` derives one independent
generator per purpose from the world's seed, so that a change in one file's size moves no other.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 1024  # uniforms a refill


def stream(seed: int, purpose: str) -> np.random.Generator:
    """An independent generator for ``purpose`` (any string), fixed by ``seed`` (>= 0)."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    key = zlib.crc32(purpose.encode())
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))


class Dice:
    """Scalar draws, made by the block from one generator (which ``Dice`` then owns)."""

    __slots__ = ("_left", "_rng")

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: list[float] = []

    @classmethod
    def of(cls, rng: np.random.Generator | Dice) -> Dice:
        """``rng`` itself when it is a ``Dice``, else a ``Dice`` over it."""
        return rng if isinstance(rng, Dice) else cls(rng)

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._left:
            self._left = self._rng.random(_BLOCK).tolist()
        return self._left.pop()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def below(self, n: int) -> int:
        """A whole number in 0 .. n - 1."""
        return int(self.uniform() * n)

    def pick(self, choices: Sequence[T]) -> T:
        """One of ``choices``, all alike likely."""
        return choices[int(self.uniform() * len(choices))]

    def sample(self, choices: Sequence[T], k: int) -> list[T]:
        """``k`` of ``choices`` at different places, in random order; k is small beside them."""
        if k > len(choices):
            raise ValueError(f"cannot draw {k} different ones out of {len(choices)}")
        chosen: list[int] = []
        while len(chosen) < k:
            index = int(self.uniform() * len(choices))
            if index not in chosen:
                chosen.append(index)
        return [choices[index] for index in chosen]

    def weighted(self, choices: Sequence[T], cumulative: Sequence[float]) -> T:
        """One of ``choices`` by the running sums of their weights (see ``running_sums``)."""
        index = bisect_right(cumulative, self.uniform() * cumulative[-1])
        return choices[min(index, len(choices) - 1)]


def running_sums(weights: Sequence[float]) -> tuple[float, ...]:
    """Running sums of weights that are at least 0 and not all 0."""
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}")
    return tuple(accumulate(weights))
