"""Ranked outputs as token sequences, and how often a reward model orders them rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.encoding import completion_ids, prompt_ids
from fastrlhf.metrics import Interval, ratio_interval, reward_scores
from fastrlhf.models import ScalarModel
from fastrlhf.records import Comparison


@dataclass(slots=True, frozen=True)
class RankedGroup:
    """One prompt's outputs as whole sequences, with their ranks."""

    sequences: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]


def ranked_groups(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Comparison], max_response: int
) -> list[RankedGroup]:
    """Comparisons as token sequences."""
    flat = completion_ids(
        tokenizer, [text for item in items for text in item.completions], max_response
    )
    groups, place = [], 0
    for item, prompt in zip(items, prompt_ids(tokenizer, items), strict=True):
        answers = flat[place : place + len(item.completions)]
        place += len(answers)
        groups.append(RankedGroup(tuple((*prompt, *a) for a in answers), tuple(item.ranks)))
    return groups


def pairs_of(group: RankedGroup) -> list[RankedGroup]:
    """The decided pairs of a group, each as a group of its own."""
    return [
        RankedGroup((group.sequences[i], group.sequences[j]), (group.ranks[i], group.ranks[j]))
        for i, j in combinations(range(len(group.ranks)), 2)
        if group.ranks[i] != group.ranks[j]
    ]


def accuracy_on(model: ScalarModel, groups: Sequence[RankedGroup], pad_id: int) -> Interval:
    """Share of decided pairs that the model orders rightly, with an interval over prompts."""
    flat = [sequence for group in groups for sequence in group.sequences]
    scores = reward_scores(model, flat, pad_id)
    right, pairs, place = [], [], 0
    for group in groups:
        outcomes = pair_outcomes(scores[place : place + len(group.ranks)], group.ranks)
        place += len(group.ranks)
        if outcomes:
            right.append(sum(outcomes))
            pairs.append(len(outcomes))
    return ratio_interval(right, pairs)


def pair_outcomes(scores: Tensor, ranks: Sequence[int]) -> list[float]:
    """For each decided pair of one prompt: 1 if the better one scores higher, 0.5 at equality."""
    values = scores.tolist()
    outcomes = []
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if ranks[i] < ranks[j]:
                outcomes.append((np.sign(values[i] - values[j]) + 1.0) / 2.0)
    return outcomes
