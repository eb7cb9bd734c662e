"""Evaluation and the numbers it rests on: intervals, losses, scores, win rates, accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from trainer_fixtures import read_lines, tiny_model

from fastrlhf import evaluate, generate_cli
from fastrlhf.batching import Example
from fastrlhf.encoding import Recipe, document_examples, prompt_ids
from fastrlhf.errors import UserError
from fastrlhf.evaluate import EvalConfig
from fastrlhf.generate_cli import GenerateConfig
from fastrlhf.generation import Engine, Outcome, Request, generate
from fastrlhf.metrics import (
    Interval,
    example_losses,
    mean_interval,
    mean_loss,
    ratio_interval,
    reward_scores,
)
from fastrlhf.models import load_language_model, load_scalar_model
from fastrlhf.ranked import accuracy_on, ranked_groups
from fastrlhf.records import read_comparisons, read_documents, read_prompts
from fastrlhf.tokenizers import load_tokenizer

# --- intervals


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_interval_of_a_mean_is_students(values: list[float]) -> None:
    found = mean_interval(values)
    mean, error = np.mean(values), stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error) if error else (mean, mean)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), abs=1e-9)
    assert found.n == len(values)


def test_intervals_of_few_values() -> None:
    assert math.isnan(mean_interval([]).mean)
    assert mean_interval([3.0]) == Interval(3.0, -math.inf, math.inf, 1)
    assert math.isnan(ratio_interval([], []).mean)
    assert f"{Interval(0.5, 0.25, 0.75, 9):.1f}" == "0.5 [0.2, 0.8]"
    assert str(Interval(0.5, 0.25, 0.75, 9)) == "0.500 [0.250, 0.750]"


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        counts = rng.integers(1, 8, 60).astype(float)
        sums = 2.0 * counts + rng.normal(0, 3, 60)
        found = ratio_interval(sums, counts)
        assert found.mean == pytest.approx(sums.sum() / counts.sum())
        covered += found.low <= 2.0 <= found.high
    assert abs(covered / 500 - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 500)


def test_equal_denominators_make_a_ratio_a_mean() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    ratio, mean = ratio_interval([3 * v for v in values], [3.0] * 4), mean_interval(values)
    assert ratio == pytest.approx(mean)


# --- losses and scores


def test_losses_are_those_of_each_sequence_alone() -> None:
    model, tokenizer = tiny_model()
    examples = [Example((1, 5, 9, 7), 2), Example((1, 4)), Example((1, 8, 8, 3, 2, 6), 1)]
    sums, counts = example_losses(model, examples, tokenizer.pad_token_id)
    for example, found in zip(examples, sums, strict=True):
        ids = torch.tensor([example.tokens])
        logprobs = torch.log_softmax(model.model(input_ids=ids).logits[0, :-1], -1)
        wanted = -sum(logprobs[t - 1, ids[0, t]] for t in range(example.start, ids.shape[1]))
        assert found == pytest.approx(float(wanted), abs=1e-4)
    assert counts.tolist() == [2, 1, 5]
    assert mean_loss(model, examples, 0) == pytest.approx(sums.sum() / 8)


def test_scores_are_read_at_the_last_token(judge: Path) -> None:
    model = load_scalar_model(judge).train()
    sequences = [[1, 5, 9], [1, 4, 4, 7, 2], [1]]
    scores = reward_scores(model, sequences, 0)
    for sequence, score in zip(sequences, scores, strict=True):
        alone = model.eval().model(input_ids=torch.tensor([sequence])).logits[0, -1, 0]
        assert score.item() == pytest.approx(alone.item(), abs=1e-5)
    assert scores.dtype == torch.float32
    # Training mode comes back.
    model.train()
    reward_scores(model, sequences, 0)
    assert model.training


# --- the command


def run(out: Path, **options: Any) -> dict[str, Interval]:
    path = evaluate.run(EvalConfig(out=out, **options))
    return {name: Interval(**v) for name, v in json.loads(path.read_text()).items()}


# What is compared to single bits' worth is computed where the command computes it.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampled_scores(model: Path, judge: Path, prompts: list[list[int]], seed: int) -> np.ndarray:
    tokenizer = load_tokenizer(model)
    drawn = generate(
        load_language_model(model).to(DEVICE),
        [p for p in prompts for _ in range(2)],
        max_new_tokens=9,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seeds=[(seed << 32) + i for i in range(2 * len(prompts))],
    )
    whole = [
        prompts[i // 2] + row[:n]
        for i, (row, n) in enumerate(
            zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
        )
    ]
    scores = reward_scores(load_scalar_model(judge).to(DEVICE), whole, tokenizer.pad_token_id)
    return scores.double().numpy().reshape(-1, 2)


def test_scores_and_win_rate(
    data: Path, base: Path, start: Path, judge: Path, tmp_path: Path
) -> None:
    found = run(
        tmp_path, data=data, model=start, baseline=base, reward_model=judge, max_response=9,
        prompts=Path("prompts_test.jsonl"), samples=2, seed=3,
    )  # fmt: skip
    prompts = prompt_ids(load_tokenizer(start), read_prompts(data / "prompts_test.jsonl"))
    mine, theirs = (sampled_scores(m, judge, prompts, 3) for m in (start, base))
    wins = [
        np.mean([float(a > b) + 0.5 * (a == b) for a in one for b in two])
        for one, two in zip(mine, theirs, strict=True)
    ]
    assert found["model: reward score"] == pytest.approx(mean_interval(mine.mean(1)))
    assert found["baseline: reward score"] == pytest.approx(mean_interval(theirs.mean(1)))
    assert found["win rate against the baseline"] == pytest.approx(mean_interval(wins))
    assert found["win rate against the baseline"].n == len(prompts) == 12


def test_a_model_ties_with_itself(data: Path, start: Path, judge: Path, tmp_path: Path) -> None:
    found = run(
        tmp_path, data=data, model=start, baseline=start, reward_model=judge, max_response=9,
        prompts=Path("prompts_test.jsonl"),
    )  # fmt: skip
    assert found["win rate against the baseline"][:3] == (0.5, 0.5, 0.5)


def test_accuracy_is_taken_on_held_out_prompts(data: Path, judge: Path, tmp_path: Path) -> None:
    recipe = Recipe(heldout=0.4)
    tokenizer, path = load_tokenizer(judge), data / "comparisons.jsonl"
    items = read_comparisons(path)
    _, held = recipe.apply(items, tokenizer, path, 99)
    assert 0 < len(held) < len(items)
    model = load_scalar_model(judge).to(DEVICE)
    for config, chosen in ((recipe, held), (Recipe(), items)):
        found = run(
            tmp_path, data=data, reward_model=judge, comparisons=Path(path.name), recipe=config,
            max_response=3, max_completion=9,
        )  # fmt: skip
        wanted = accuracy_on(model, ranked_groups(tokenizer, chosen, 9), tokenizer.pad_token_id)
        assert found["reward model accuracy on pairs"] == pytest.approx(wanted)
        assert wanted.n <= len(chosen)


def test_text_loss_of_model_and_baseline(
    data: Path, base: Path, start: Path, tmp_path: Path
) -> None:
    documents = Path("pretrain_heldout.jsonl")
    found = run(tmp_path, data=data, model=start, baseline=base, documents=documents)
    for name, path in (("model", start), ("baseline", base)):
        model, tokenizer = load_language_model(path).to(DEVICE), load_tokenizer(path)
        examples = document_examples(tokenizer, read_documents(data / documents), model.context)
        value = found[f"{name}: loss a token of text (nats)"]
        assert value.mean == pytest.approx(mean_loss(model, examples, tokenizer.pad_token_id))
        assert value.n == 20


def test_what_cannot_be_evaluated_is_refused(data: Path, start: Path, tmp_path: Path) -> None:
    for options, field in (
        ({}, "prompts"),
        ({"prompts": Path("p")}, "model"),
        ({"prompts": Path("p"), "model": start}, "reward_model"),
        ({"comparisons": Path("c")}, "reward_model"),
        ({"documents": Path("d")}, "model"),
        ({"documents": Path("d"), "model": start, "samples": 0}, "samples"),
    ):
        with pytest.raises(UserError, match=f"field '{field}'"):
            EvalConfig(out=tmp_path, **options)


# --- generate, the command


def test_generate_writes_a_line_a_sample(data: Path, start: Path, tmp_path: Path) -> None:
    lines = {}
    for batch_size in (64, 5):
        config = GenerateConfig(
            model=start, prompts=Path("prompts_test.jsonl"), data=data, samples=3, max_response=9,
            out=tmp_path / f"{batch_size}.jsonl", batch_size=batch_size, seed=2,
        )  # fmt: skip
        lines[batch_size] = read_lines(generate_cli.run(config))
    asked = read_lines(data / "prompts_test.jsonl")
    model, tokenizer = load_language_model(start), load_tokenizer(start)
    assert len(lines[64]) == 3 * len(asked)
    for row, (line, other) in enumerate(zip(lines[64], lines[5], strict=True)):
        assert line["prompt"] == asked[row // 3]["prompt"]
        assert line["user"] == asked[row // 3]["user"]
        assert line["instruction"] == asked[row // 3]["instruction"]
        assert {k: v for k, v in line.items() if k != "logprob"} == {
            k: v for k, v in other.items() if k != "logprob"
        }
        assert line["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert 1 <= line["tokens"] <= 9
        if line["ended"]:
            ids = tokenizer(line["prompt"])["input_ids"]
            answer = tokenizer(line["completion"], add_special_tokens=False)["input_ids"]
            if len(answer) + 1 != line["tokens"]:
                continue  # special tokens were drawn, which text leaves out
            example = Example((*ids, *answer, tokenizer.eos_token_id), len(ids))
            sums, _ = example_losses(model, [example], tokenizer.pad_token_id)
            assert line["logprob"] == pytest.approx(-sums[0], abs=1e-4)
    assert len({line["completion"] for line in lines[64]}) > len(asked)
    assert not list(tmp_path.glob("*.partial"))


def test_generate_takes_stop_strings_and_shortest_responses(
    data: Path, start: Path, tmp_path: Path
) -> None:
    def lines(**changes: Any) -> list[dict[str, Any]]:
        return read_lines(
            generate_cli.run(
                GenerateConfig(
                    model=start, prompts=Path("prompts_test.jsonl"), data=data, samples=2,
                    max_response=9, out=tmp_path / "out.jsonl", **changes,
                )
            )
        )  # fmt: skip

    word = next(w for line in lines() for w in line["completion"].split()[1:])
    stopped = lines(stop=(word,))
    assert any(word in line["completion"] for line in stopped)
    for line in stopped:
        assert word not in line["completion"].split()[:-1]
    assert min(line["tokens"] for line in lines()) < 7
    assert min(line["tokens"] for line in lines(min_response=7)) >= 7


def test_generate_leaves_what_is_finished_when_it_is_interrupted(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerateConfig(
        model=start, prompts=Path("prompts_test.jsonl"), data=data, max_response=9,
        out=tmp_path / "out.jsonl", batch_size=2,
    )  # fmt: skip
    wanted = read_lines(generate_cli.run(config))
    config.out.unlink()
    run = Engine.run

    def interrupted(self: Engine, requests: list[Request], **options: Any) -> Outcome:
        finished: list[int] = []

        def advance(n: int) -> None:
            finished.append(n)
            if len(finished) == 4:
                raise KeyboardInterrupt

        return run(self, requests, **(options | {"advance": advance}))

    monkeypatch.setattr(Engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_cli.run(config)
    assert not config.out.exists()
    left = read_lines(tmp_path / "out.jsonl.partial")
    assert 0 < len(left) < len(wanted)
    assert all(line in wanted for line in left)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"samples": 0}, "samples"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_response": 129}, "min_response"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_bad_sampling_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"field '{field}'"):
        GenerateConfig(model=Path("m"), prompts=Path("p"), out=Path("o"), **changes)
