"""The reward model: the K-wise loss, shuffled pairs, the zero mean, held-out accuracy."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from trainer_fixtures import read_lines, rm_config, weights

from fastrlhf import reward
from fastrlhf.batching import batch_indices
from fastrlhf.encoding import Recipe, demonstration_examples
from fastrlhf.metrics import reward_scores
from fastrlhf.models import load_scalar_model, scalar_from_language_model
from fastrlhf.ranked import RankedGroup, accuracy_on, pair_outcomes, pairs_of, ranked_groups
from fastrlhf.records import read_comparisons, read_demonstrations
from fastrlhf.tokenizers import load_tokenizer
from fastrlhf.training import OptimizerConfig


def by_hand(scores: list[float], ranks: tuple[int, ...]) -> float:
    """The paper's equation 1 for one prompt, pair by pair."""
    pairs = list(combinations(range(len(ranks)), 2))
    loss = 0.0
    for i, j in pairs:
        if ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            gap = torch.tensor(scores[better] - scores[worse], dtype=torch.float64)
            loss -= float(F.logsigmoid(gap))
    return loss / len(pairs)


def groups_of(data: Path, model: Path, recipe: Recipe | None = None) -> list[RankedGroup]:
    tokenizer, path = load_tokenizer(model), data / "comparisons.jsonl"
    items, _ = (recipe or Recipe()).apply(read_comparisons(path), tokenizer, path, 99)
    return ranked_groups(tokenizer, items, 9)


def scored(model: Any, groups: list[RankedGroup], pad_id: int) -> list[list[float]]:
    return [reward_scores(model, group.sequences, pad_id).tolist() for group in groups]


def test_the_loss_of_a_batch_is_the_sum_over_pairs_by_hand(
    data: Path, start: Path, tmp_path: Path
) -> None:
    for limit in (50, 8192):  # in several micro-batches, and in one
        reward.run(rm_config(data, start, tmp_path / str(limit), max_tokens=limit))
    groups = groups_of(data, start)
    first = batch_indices([1] * len(groups), 8, 0, 0)[0]
    batch = [groups[i] for i in first]
    assert len({len(group.ranks) for group in batch}) > 1
    torch.manual_seed(0)  # as the run does before it makes the head
    model = scalar_from_language_model(start)
    pad_id = load_tokenizer(start).pad_token_id
    scores = scored(model, batch, pad_id)
    wanted = sum(by_hand(s, g.ranks) for s, g in zip(scores, batch, strict=True)) / 8
    outcomes = [
        o
        for s, g in zip(scores, batch, strict=True)
        for o in pair_outcomes(torch.tensor(s), g.ranks)
    ]
    for limit in (50, 8192):
        line = read_lines(tmp_path / str(limit) / "metrics.jsonl")[0]
        assert line["loss"] == pytest.approx(wanted, rel=1e-4)
        assert line["pair_accuracy"] == pytest.approx(sum(outcomes) / len(outcomes), abs=1e-6)


def test_shuffled_pairs_are_all_decided_pairs_as_elements_of_their_own(
    data: Path, start: Path, tmp_path: Path
) -> None:
    reward.run(rm_config(data, start, tmp_path / "run", pairing="shuffled"))
    groups = groups_of(data, start)
    pairs = [pair for group in groups for pair in pairs_of(group)]
    size = round(8 * len(pairs) / len(groups))
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == len(pairs) // size
    torch.manual_seed(0)
    model = scalar_from_language_model(start)
    batch = [pairs[i] for i in batch_indices([1] * len(pairs), size, 0, 0)[0]]
    scores = scored(model, batch, load_tokenizer(start).pad_token_id)
    wanted = sum(by_hand(s, p.ranks) for s, p in zip(scores, batch, strict=True)) / size
    assert lines[0]["loss"] == pytest.approx(wanted, rel=1e-4)


@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=7))
def test_pairs_are_the_decided_ones(ranks: list[int]) -> None:
    group = RankedGroup(tuple((i,) for i in range(len(ranks))), tuple(ranks))
    pairs = pairs_of(group)
    wanted = {(i, j) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]}
    assert {(p.sequences[0][0], p.sequences[1][0]) for p in pairs} == wanted
    assert all(p.ranks == tuple(ranks[s[0]] for s in p.sequences) for p in pairs)
    right = pair_outcomes(-torch.tensor(ranks).float(), ranks)
    assert right == [1.0] * len(wanted)
    assert pair_outcomes(torch.tensor(ranks).float(), ranks) == [0.0] * len(wanted)
    assert pair_outcomes(torch.zeros(len(ranks)), ranks) == [0.5] * len(wanted)


def test_demonstrations_score_zero_on_average(data: Path, start: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("demonstrations.jsonl", None):
        out = tmp_path / str(name)
        changed = rm_config(data, start, out, demonstrations=Path(name) if name else None)
        model = load_scalar_model(reward.run(changed))
        tokenizer = load_tokenizer(start)
        examples = demonstration_examples(
            tokenizer, read_demonstrations(data / "demonstrations.jsonl"), 9
        )
        scores = reward_scores(model, [e.tokens for e in examples], tokenizer.pad_token_id)
        found[name] = (scores.double().mean().item(), model.head.bias.item())
        assert scores.std() > 1e-3
    assert abs(found["demonstrations.jsonl"][0]) < 1e-6
    assert abs(found[None][0]) > 1e-3
    shift = found["demonstrations.jsonl"][1] - found[None][1]
    assert shift == pytest.approx(-found[None][0], abs=1e-6)


def test_the_bias_alone_differs(data: Path, start: Path, tmp_path: Path) -> None:
    one = weights(reward.run(rm_config(data, start, tmp_path / "a")))
    two = weights(reward.run(rm_config(data, start, tmp_path / "b", demonstrations=None)))
    assert [name for name in one if not torch.equal(one[name], two[name])] == ["score.bias"]


def test_a_plain_rule_is_learned_and_measured_on_held_out_users(
    data: Path, start: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = Recipe(heldout=0.3)
    optim = OptimizerConfig(lr=1e-2)
    changed = rm_config(data, start, out, recipe=recipe, epochs=12, optim=optim)
    model = load_scalar_model(reward.run(changed))
    line = read_lines(out / "metrics.jsonl")[-1]
    assert line["heldout_accuracy"] > 0.85  # shorter is better, in this data
    tokenizer, path = load_tokenizer(start), data / "comparisons.jsonl"
    train, held = recipe.apply(read_comparisons(path), tokenizer, path, 99)
    assert not {c.user for c in train} & {c.user for c in held}
    again = accuracy_on(model, ranked_groups(tokenizer, held, 9), tokenizer.pad_token_id)
    assert (again.mean, again.low, again.high) == pytest.approx(
        (line["heldout_accuracy"], line["heldout_accuracy_low"], line["heldout_accuracy_high"])
    )
    assert again.low < again.mean < again.high or again.mean == 1.0
