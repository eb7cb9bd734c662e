"""Numbers that stages and evaluation share: losses, scores, and intervals around them.

Intervals are at 95 % and over independent units (prompts, documents), never over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fastrlhf.batching import Example, cut_by_length, micro_batches, pad
from fastrlhf.models import LanguageModel, ScalarModel, runs_packed

EVAL_TOKENS = 16384  # padded tokens of a batch without gradients


class Interval(NamedTuple):
    """An estimate with its 95 % interval, and the number of independent units behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of independent values with Student's t interval."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, float("-inf"), float("inf"), 1)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def ratio_interval(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray
) -> Interval:
    """Ratio of sums over independent units (loss per token over documents): the delta method."""
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if len(a) == 0 or b.sum() == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    ratio = float(a.sum() / b.sum())
    spread = mean_interval((a - ratio * b) / b.mean())
    half = (spread.high - spread.low) / 2
    return Interval(ratio, ratio - half, ratio + half, len(a))


@torch.inference_mode()
def example_losses(
    model: LanguageModel, examples: Sequence[Example], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(summed loss in nats, predicted tokens) of each example, both (N,) fp64."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = np.zeros(len(examples))
    cut = micro_batches(examples, EVAL_TOKENS, pad_id, device, packed=runs_packed(model))
    for indices, input_ids, labels in cut:
        sums[indices] = -model(input_ids, labels).double().sum(1).cpu().numpy()
    model.train(was_training)
    return sums, np.array([e.targets for e in examples], dtype=np.float64)


def mean_loss(model: LanguageModel, examples: Sequence[Example], pad_id: int) -> float:
    """Mean loss a predicted token, in nats."""
    sums, counts = example_losses(model, examples, pad_id)
    return float(sums.sum() / counts.sum())


@torch.inference_mode()
def reward_scores(model: ScalarModel, sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Scores (N,) fp32 on the CPU: the scalar at the last token of each sequence."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    scores = torch.empty(len(sequences))
    counts, padded = [len(s) for s in sequences], not runs_packed(model)
    for indices in cut_by_length(counts, EVAL_TOKENS, device, padded=padded):
        input_ids, lengths = pad([sequences[i] for i in indices], pad_id)
        scores[indices] = model(input_ids.to(device), (lengths - 1).to(device)).cpu()
    model.train(was_training)
    return scores
