"""Users who ask, labelers who demonstrate and rank.

A labeler's opinion of an answer is the hidden rule seen through their own eyes:

    opinion = sum_i weight_i * (1 + .25 N_i) * feature_i + taste * (words - 4)
    rating  = clip(round(3 + opinion + noise * N), 1, 7)

with the judge's five features and weights, one N(0, 1) a labeler and feature, a taste for length
drawn once (``LENGTH_TASTE`` N(0, 1) a word), and noise drawn afresh for every labeler and different
output. Outputs of one prompt that are the same get the same rating. Equal ratings tie.

``NOISE`` is set so that two labelers agree on about .73 of the pairs that both decided, which is
what InstructGPT reports of its own (72.6 +- 1.5 %). Measured with all ten labelers: .729 on
``mixed_pool`` (seeds 0 to 4), .740 and .718 on the outputs that the demonstration had ranked on two
development seeds; it varies by a few points from world to world. Without noise .99, the ceiling
that different weights, tastes and rounding leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from fastrlhf.world.dice import Dice, running_sums, stream
from fastrlhf.world.facts import World
from fastrlhf.world.judge import GOLD_WEIGHTS, judge
from fastrlhf.world.tasks import (
    CAREFUL_WEB,
    CONSTRAINT_WEIGHTS,
    TASK_WEIGHTS,
    WEB,
    Habits,
    Instruction,
    draw_instruction,
    write_answer,
)

LEAST_OUTPUTS, MOST_OUTPUTS = 4, 9  # K of a comparison
WEIGHT_SPREAD = 0.25
LENGTH_TASTE = 0.1
NOISE = 1.1  # swept over .9, 1, 1.05, 1.1: agreement .778, .751, .740, .729 on the mixed pool
USERS = 400
LABELERS, HELD_OUT_LABELERS = 10, 5

DEMONSTRATION = Habits(wrong=0.05, ignored=0.18, invented=0.35, rude=0.10)


@dataclass(frozen=True, slots=True)
class User:
    """Someone who asks, with running sums of a taste over tasks and over constraints."""

    name: str
    task_sums: tuple[float, ...]
    constraint_sums: tuple[float, ...]


def make_users(rng: np.random.Generator, n: int = USERS) -> list[User]:
    """``n`` users, ``user-000`` on; their tastes scatter about the world's shares (gamma, 2)."""
    tasks = np.asarray(TASK_WEIGHTS) * rng.gamma(2.0, size=(n, len(TASK_WEIGHTS)))
    constraints = np.asarray(CONSTRAINT_WEIGHTS) * rng.gamma(2.0, size=(n, len(CONSTRAINT_WEIGHTS)))
    return [
        User(f"user-{i:03d}", running_sums(t), running_sums(c))
        for i, (t, c) in enumerate(zip(tasks.tolist(), constraints.tolist(), strict=True))
    ]


def instructions(
    n: int, rng: np.random.Generator | Dice, users: Sequence[User]
) -> list[Instruction]:
    """``n`` instructions, each of a user drawn at random.

    Users ask about any name, not knowing who has facts, so that the world plays no part here.
    """
    if not users:
        raise ValueError("users must not be empty")
    dice = Dice.of(rng)
    asked = []
    for _ in range(n):
        user = dice.pick(users)
        asked.append(
            draw_instruction(
                dice,
                task_sums=user.task_sums,
                constraint_sums=user.constraint_sums,
                user=user.name,
            )
        )
    return asked


def demonstration(
    world: World,
    instruction: Instruction,
    rng: np.random.Generator | Dice,
    habits: Habits = DEMONSTRATION,
) -> list[str]:
    """The words of a labeler's own answer: far better than the web's, not faultless."""
    return write_answer(world, instruction, habits, rng)


@dataclass(frozen=True, slots=True)
class Labeler:
    """Someone who ranks. ``weights`` follow the judge's features (task, constraint, invented,
    rude, not ended); ``length_taste`` is per word above four; ``held_out`` ones label only to test
    the reward model."""

    name: str
    weights: tuple[float, ...]
    length_taste: float
    noise: float
    held_out: bool

    def opinion(
        self, world: World, instruction: Instruction, words: Sequence[str], ended: bool
    ) -> float:
        """What this labeler thinks of an answer, before noise and rounding."""
        features = judge(world, instruction, words, ended).features()
        value = sum(w * f for w, f in zip(self.weights, features, strict=True))
        return value + self.length_taste * (len(words) - 4)


def make_labelers(
    rng: np.random.Generator, n: int = LABELERS, held_out: int = HELD_OUT_LABELERS
) -> list[Labeler]:
    """``n`` labelers, ``labeler-0`` on; the last ``held_out`` of them are held out."""
    if not 0 <= held_out <= n:
        raise ValueError(f"held_out must lie in 0 .. {n}, got {held_out}")
    scale = 1.0 + WEIGHT_SPREAD * rng.standard_normal((n, len(GOLD_WEIGHTS)))
    weights = np.asarray(GOLD_WEIGHTS) * scale
    tastes = LENGTH_TASTE * rng.standard_normal(n)
    return [
        Labeler(
            f"labeler-{i}", tuple(weights[i].tolist()), float(tastes[i]), NOISE, i >= n - held_out
        )
        for i in range(n)
    ]


Output = tuple[tuple[str, ...], bool]  # an answer's words, and whether it ended


def rate(
    world: World,
    labeler: Labeler,
    instruction: Instruction,
    outputs: Sequence[Output],
    rng: np.random.Generator,
) -> list[int]:
    """Ratings 1 (worst) to 7, one an output; the same outputs get the same rating."""
    different = list(dict.fromkeys(outputs))
    noise = rng.standard_normal(len(different)).tolist()
    ratings = {
        output: min(
            7, max(1, round(3 + labeler.opinion(world, instruction, *output) + labeler.noise * z))
        )
        for output, z in zip(different, noise, strict=True)
    }
    return [ratings[output] for output in outputs]


def rank(
    world: World,
    labeler: Labeler,
    instruction: Instruction,
    outputs: Sequence[Output],
    rng: np.random.Generator,
) -> list[int]:
    """Ranks, one an output: 1 is best, equal ratings share a rank, no rank is left out."""
    ratings = rate(world, labeler, instruction, outputs, rng)
    place = {rating: i + 1 for i, rating in enumerate(sorted(set(ratings), reverse=True))}
    return [place[rating] for rating in ratings]


@dataclass(frozen=True, slots=True)
class Agreement:
    """``rate``: share of ``pairs`` (those that both labelers decided) decided alike."""

    rate: float
    pairs: int


def agreement(
    world: World,
    labelers: Sequence[Labeler],
    pool: Sequence[tuple[Instruction, Sequence[Output]]],
    rng: np.random.Generator,
    *,
    noise: float | None = None,
) -> Agreement:
    """How often two labelers agree, over all pairs of labelers and of a prompt's outputs.

    A pair counts where neither labeler tied it. ``noise`` replaces the labelers' own; 0 gives the
    ceiling that their tastes and the rounding alone leave.
    """
    if noise is not None:
        labelers = [replace(labeler, noise=noise) for labeler in labelers]
    alike = decided = 0
    for instruction, outputs in pool:
        ratings = np.array([rate(world, who, instruction, outputs, rng) for who in labelers])
        left, right = np.triu_indices(len(outputs), 1)
        verdicts = np.sign(ratings[:, left] - ratings[:, right])
        for one, other in combinations(verdicts, 2):
            products = one * other
            decided += int(np.count_nonzero(products))
            alike += int(np.count_nonzero(products > 0))
    if decided == 0:
        raise ValueError("no pair of outputs was decided by two labelers")
    return Agreement(alike / decided, decided)


def mixed_pool(
    world: World,
    n: int,
    rng: np.random.Generator,
    users: Sequence[User],
    *,
    habits: Sequence[Habits] = (WEB, CAREFUL_WEB, DEMONSTRATION),
) -> list[tuple[Instruction, list[Output]]]:
    """``n`` prompts with outputs as ``label`` would rank them, written instead of sampled.

    Nine outputs a prompt, each by a writer with one of the ``habits``, one in twenty without an
    end; repetitions are dropped, and so are prompts with fewer than ``LEAST_OUTPUTS`` left.
    """
    dice = Dice.of(rng)
    pool: list[tuple[Instruction, list[Output]]] = []
    while len(pool) < n:
        (instruction,) = instructions(1, dice, users)
        drawn = []
        for _ in range(MOST_OUTPUTS):
            words = write_answer(world, instruction, dice.pick(habits), dice)
            drawn.append((tuple(words), not dice.chance(0.05)))
        outputs = list(dict.fromkeys(drawn))
        if len(outputs) >= LEAST_OUTPUTS:
            pool.append((instruction, outputs))
    return pool


def label(
    world: World,
    records: Sequence[Mapping[str, Any]],
    labelers: Sequence[Labeler],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Have each prompt's outputs ranked by one labeler, drawn at random: comparison records.

    A record of ``prompts_*.jsonl`` comes with ``completions`` (texts without ``<eos>``) and
    ``ended`` (a bool each: it came to its end token). Outputs that repeat an earlier one of the
    prompt are dropped, since rating them apart would contradict itself. What is left is
    ranked if it is ``LEAST_OUTPUTS`` or more; above ``MOST_OUTPUTS``, the first ones are taken.
    Yields ``{"prompt", "completions", "ended", "ranks", "user", "labeler", "instruction"}``.
    """
    if not labelers:
        raise ValueError("labelers must not be empty")
    rng = stream(seed, "labels")
    for record in records:
        texts, ended = record["completions"], record["ended"]
        if len(texts) != len(ended):
            raise ValueError(
                f"completions and ended differ in length for the prompt {record['prompt']!r}: "
                f"{len(texts)} and {len(ended)}"
            )
        labeler = labelers[int(rng.integers(len(labelers)))]
        words = ((tuple(text.split()), bool(end)) for text, end in zip(texts, ended, strict=True))
        outputs = list(dict.fromkeys(words))[:MOST_OUTPUTS]
        if len(outputs) < LEAST_OUTPUTS:
            continue
        instruction = Instruction.from_dict(record["instruction"])
        yield {
            "prompt": record["prompt"],
            "completions": [" ".join(answer) for answer, _ in outputs],
            "ended": [end for _, end in outputs],
            "ranks": rank(world, labeler, instruction, outputs, rng),
            "user": record["user"],
            "labeler": labeler.name,
            "instruction": record["instruction"],
        }
