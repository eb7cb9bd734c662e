"""`generate` against transformers' own and against loops without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_fixtures import CONTEXT, tiny_model

from fastrlhf.batching import Example, collate
from fastrlhf.generation import Generated, generate
from fastrlhf.models import LanguageModel

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])
PROMPTS = [[1, 5, 9], [1, 7], [1, 4, 30, 12, 8, 99], [1, 60, 61, 62], [1, 90]]
END = 2


def model_of(kind: str = "llama", **shape: Any) -> LanguageModel:
    """A random model with weights large enough for distributions that are far from flat."""
    model, tokenizer = tiny_model(kind=kind, **shape)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8.0)
        model.head.weight.mul_(5.0)
    return model


def sampled(model: LanguageModel, prompts: list[list[int]] = PROMPTS, **options: Any) -> Generated:
    settings = {"max_new_tokens": 12, "eos_token_id": END, "pad_token_id": 0}
    settings |= {"seeds": list(range(100, 100 + len(prompts)))}
    return generate(model, prompts, **(settings | options))


def responses(answers: Generated) -> list[list[int]]:
    return [t[:n] for t, n in zip(answers.tokens.tolist(), answers.lengths.tolist(), strict=True)]


@KINDS
def test_greedy_equals_transformers_and_a_loop_without_a_cache(kind: str) -> None:
    model = model_of(kind)
    found = responses(sampled(model, temperature=0.0))
    for prompt, response in zip(PROMPTS, found, strict=True):
        theirs = model.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert response == theirs
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == END:
                break
        assert response == tokens[len(prompt) :]


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_those_of_the_training_forward(kind: str, temperature: float) -> None:
    """In fp64: in fp32 the forward itself is up to 1.04e-5 from it, on so sharp a model."""
    model = model_of(kind)
    answers = sampled(model, temperature=temperature)
    examples = [Example((*p, *r), len(p)) for p, r in zip(PROMPTS, responses(answers), strict=True)]
    input_ids, labels = collate(examples, pad_id=0)
    placed = model.double()(input_ids, labels, temperature=temperature)
    for row, example in enumerate(examples):
        wanted = placed[row, example.start : len(example.tokens)]
        found = answers.logprobs[row, : example.targets]
        torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=0)
        assert not answers.logprobs[row, example.targets :].any()


@KINDS
def test_tokens_do_not_depend_on_batch_size_or_company(kind: str) -> None:
    model = model_of(kind)
    wanted = sampled(model)
    for batch_size in (1, 2, 3):
        found = sampled(model, batch_size=batch_size)
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
    for index, prompt in enumerate(PROMPTS):
        alone = sampled(model, [prompt], seeds=[100 + index])
        assert responses(alone)[0] == responses(wanted)[index]


@settings(max_examples=4)
@given(order=st.permutations(range(len(PROMPTS))))
def test_the_order_of_prompts_is_kept(order: list[int]) -> None:
    model = model_of()
    wanted = responses(sampled(model))
    found = responses(
        sampled(model, [PROMPTS[i] for i in order], seeds=[100 + i for i in order], batch_size=2)
    )
    assert found == [wanted[i] for i in order]


def test_seeds_fix_what_is_drawn() -> None:
    model = model_of()
    prompts = [[1, 5]] * 20
    one = sampled(model, prompts, seeds=torch.arange(20))
    two = sampled(model, prompts, seeds=range(20))
    other = sampled(model, prompts, seeds=range(20, 40))
    same = sampled(model, prompts, seeds=[4] * 20)
    assert torch.equal(one.tokens, two.tokens)
    assert responses(one) != responses(other)
    assert len({tuple(r) for r in responses(one)}) > 15
    assert len({tuple(r) for r in responses(same)}) == 1


def test_first_tokens_follow_the_models_distribution() -> None:
    model = model_of()
    n = 4000
    answers = sampled(model, [[1, 5]] * n, seeds=range(n), max_new_tokens=1)
    logits = model.model(torch.tensor([[1, 5]])).logits[0, -1].detach()
    p = torch.softmax(logits, -1)
    counts = torch.bincount(answers.tokens[:, 0], minlength=len(p))
    likely = n * p > 20
    assert int(likely.sum()) > 3
    deviation = (counts - n * p)[likely] / (n * p * (1 - p))[likely].sqrt()
    assert float(deviation.abs().max()) < 4.5


def test_filters_are_handed_on() -> None:
    model = model_of()
    prompts = [[1, 5]] * 200
    best = int(model.model(torch.tensor([[1, 5]])).logits[0, -1].argmax())
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        answers = sampled(model, prompts, seeds=range(200), max_new_tokens=1, **filters)
        assert set(answers.tokens[:, 0].tolist()) == {best}


def test_nothing_follows_the_end_of_a_response() -> None:
    model = model_of()
    n = 64
    prompts = [[1, 5, 9]] * n
    finished: list[int] = []
    # Any token may serve as the end: take one that is drawn often.
    options: dict[str, Any] = {"seeds": range(n), "max_new_tokens": 40}
    likely = int(sampled(model, prompts, **options).tokens.flatten().bincount().argmax())
    answers = sampled(model, prompts, eos_token_id=likely, advance=finished.append, **options)
    assert sum(finished) == n
    ended = answers.ended(likely)
    assert 0 < int(ended.sum()) < n
    for row, response in enumerate(responses(answers)):
        assert likely not in response[:-1]
        assert bool(ended[row]) == (response[-1] == likely)
        assert len(response) == 40 or ended[row]
        assert not answers.tokens[row, len(response) :].any()  # pad is 0
    assert answers.tokens.shape[1] == int(answers.lengths.max())


def test_responses_stop_at_the_longest_one() -> None:
    model = model_of()
    first = sampled(model, [[1, 5]], seeds=[3]).tokens[0, 0]
    answers = sampled(model, [[1, 5]], seeds=[3], eos_token_id=int(first))
    assert answers.tokens.shape == (1, 1)
    assert answers.lengths.tolist() == [1]


def test_no_prompts_give_empty_tensors() -> None:
    answers = sampled(model_of(), [])
    assert answers.tokens.shape == answers.logprobs.shape == (0, 0)
    assert answers.lengths.shape == (0,)
    assert answers.ended(END).shape == (0,)


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = model_of()
    for training in (True, False):
        model.train(training)
        sampled(model)
        assert model.training == training


def test_bad_calls_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"seeds: wanted one a prompt \(5\), got 2"):
        sampled(model, seeds=[1, 2])
    with pytest.raises(ValueError, match="prompts: number 1 is empty"):
        sampled(model, [[1], []])
    with pytest.raises(ValueError, match="max_new_tokens: must be at least 1, got 0"):
        sampled(model, max_new_tokens=0)
    with pytest.raises(ValueError, match=f"exceed the context of {CONTEXT}"):
        sampled(model, [[1] * (CONTEXT - 11)])
    assert sampled(model, [[1] * (CONTEXT - 12)]).lengths.shape == (1,)
    with pytest.raises(ValueError, match=r"top_p: must be in \(0, 1\], got 0"):
        sampled(model, top_p=0.0)


def test_logits_that_are_no_numbers_and_interrupts_are_raised() -> None:
    model = model_of()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(model, advance=interrupt)
    with torch.no_grad():
        model.head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="no numbers in 5 of 5 responses"):
        sampled(model)
