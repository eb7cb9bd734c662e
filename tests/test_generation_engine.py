"""The engine: shared prompts, slots, memory, seeds, ends, bad input, interrupts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_fixtures import tiny_model

from fastrlhf.generation import Engine, Outcome, Request, Sampling, Token
from fastrlhf.generation.graphs import Steps, rounded
from fastrlhf.generation.pages import PAGE_SIZE, Pages, pages_for
from fastrlhf.generation.products import packs
from fastrlhf.models import LanguageModel
from fastrlhf_kernels import logprobs_from_logits, sample

END = 2
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def model_of(context: int = 128, **shape: Any) -> LanguageModel:
    """A random model whose distributions are far from flat."""
    model, _ = tiny_model(context=context, **shape)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8.0)
        model.head.weight.mul_(5.0)
    return model


def asked(n: int, prompts: int | None = None, length: int = 20, **options: Any) -> list[Request]:
    """n requests, seeds 0 and on, over as many prompts (all different by default)."""
    return [
        Request(
            prompt=[1 + (i % (prompts or n) * 7 + k) % 90 for k in range(length)],
            seed=i,
            sampling=Sampling(**({"max_new_tokens": 12} | options)),
        )
        for i in range(n)
    ]


def responses(outcome: Outcome) -> list[list[int]]:
    return [result.tokens for result in outcome]


# --- shared prompts -----------------------------------------------------------------------------


def test_eight_samples_cost_one_prompt() -> None:
    model = model_of(context=640)
    requests = asked(8, prompts=1, length=512)
    counters = Engine(model).run(requests).counters
    alone = [Engine(model).run([request]).counters for request in requests]
    assert counters.prefill_tokens == 512
    assert 8 * counters.prefill_tokens == sum(c.prefill_tokens for c in alone)
    assert counters.prompt_pages == 512 // PAGE_SIZE
    assert 8 * counters.prompt_pages == sum(c.prompt_pages for c in alone)
    assert counters.copied_pages == 0
    # And what was held at the same time: the prompt once, and each response's own pages.
    assert counters.peak_pages == 512 // PAGE_SIZE + 8 * pages_for(11)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_samples_of_a_prompt_are_those_of_requests_alone(length: int, slots: int) -> None:
    model = model_of()
    requests = asked(8, prompts=2, length=length, max_new_tokens=20)
    outcome = Engine(model, slots=slots).run(requests)
    for request, result in zip(requests, outcome, strict=True):
        alone = Engine(model).run([request])[0]
        assert result.tokens == alone.tokens
        torch.testing.assert_close(result.logprobs, alone.logprobs, atol=1e-5, rtol=0)
    assert outcome.counters.prefill_tokens == 2 * length
    # The last sample of a prompt goes on in the prompt's own last page.
    assert outcome.counters.copied_pages == (6 if length % PAGE_SIZE else 0)
    assert len({tuple(tokens) for tokens in responses(outcome)}) == 8


# --- slots and memory ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 40)),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 5),
    spare=st.integers(0, 6),
)
def test_any_mixture_within_any_memory_gives_each_request_its_own_response(
    shapes: list[tuple[int, int, int]], slots: int, spare: int
) -> None:
    model = model_of()
    requests = [
        Request(
            prompt=[1 + (which * 31 + k) % 90 for k in range(length)],
            seed=i,
            sampling=Sampling(max_new_tokens=most, end_token_id=None if i % 2 else END),
        )
        for i, (which, length, most) in enumerate(shapes)
    ]
    engine = Engine(model)
    wanted = [engine.run([request])[0].tokens for request in requests]
    needed = max(pages_for(len(r.prompt) + r.sampling.max_new_tokens - 1) + 1 for r in requests)
    page_bytes = engine.decoder.shape.page_bytes
    memory = (needed + spare) * page_bytes
    outcome = Engine(model, slots=slots, memory=memory).run(requests)
    assert responses(outcome) == wanted
    assert outcome.counters.peak_pages * page_bytes <= memory


def test_pages_are_held_and_given_back() -> None:
    pages = Pages(5)
    first = pages.take(3)
    pages.share(first[:2])
    pages.release(first)
    assert pages.free == 3
    pages.release(first[:2])
    assert pages.free == 5
    assert pages.peak == 3


def test_a_slot_that_falls_free_is_refilled_at_once() -> None:
    requests = [
        Request(prompt=[1, 5 + i], seed=i, sampling=Sampling(max_new_tokens=n))
        for i, n in enumerate([2, 9, 5, 3, 3, 7, 4, 4])
    ]
    counters = Engine(model_of(), slots=2).run(requests).counters
    # First tokens come with the prompts: what is left, two at a time, with nobody waiting.
    assert counters.decoded == sum(r.sampling.max_new_tokens - 1 for r in requests)
    assert counters.steps <= -(-counters.decoded // 2) + 2


def test_rows_that_are_not_in_use_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph runs a step: rows and block tables rounded up, their number on the device."""
    model = model_of()
    requests = asked(14, prompts=5, max_new_tokens=30, end_token_id=END)
    wanted = Engine(model, slots=6).run(requests)

    def rounded_up(self: Steps) -> Any:
        n = self.rows.count
        self.active.fill_(n)
        slots, pages = self.rows.tables.shape
        size = min(rounded(n) + 1, slots), min(rounded(self.rows.width), pages)
        return tuple(column[:n] for column in self.draw(*size, self.active))

    monkeypatch.setattr(Steps, "__call__", rounded_up)
    found = Engine(model, slots=6).run(requests)
    assert responses(found) == responses(wanted)
    torch.testing.assert_close(found.padded(0)[1], wanted.padded(0)[1], atol=1e-5, rtol=0)


def test_sizes_of_graphs_are_few_and_close() -> None:
    assert [rounded(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 25, 100)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 24, 32, 128,
    ]  # fmt: skip
    assert all(n <= rounded(n) <= max(1.5 * n, n + 1) for n in range(1, 2000))


@pytest.mark.parametrize("device", DEVICES)
def test_the_cache_is_taken_again_where_it_is_kept(device: str) -> None:
    model = model_of().to(device)
    engine = Engine(model, slots=4, pack=False, keep=True)
    long = asked(9, prompts=4, max_new_tokens=30)
    wanted = responses(Engine(model, slots=4, pack=False).run(long))
    assert responses(engine.run(long)) == wanted
    kept = engine.kept
    assert kept is not None
    assert responses(engine.run(long[:3])) == wanted[:3]
    assert responses(engine.run(long)) == wanted
    assert engine.kept is kept
    with torch.no_grad():  # as an optimiser does, in place
        model.head.weight.mul_(3.0)
        model.model.base_model.layers[0].mlp.down_proj.weight.mul_(-1.0)
    updated = responses(Engine(model, slots=4, pack=False).run(long))
    assert updated != wanted
    assert responses(engine.run(long)) == updated
    assert engine.kept is kept
    engine.run(asked(9, temperature=0.5))  # other settings, another step
    assert engine.kept is not kept
    engine.release()
    assert engine.kept is None


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_kept_grows_to_what_every_run_needs(device: str) -> None:
    model = model_of().to(device)
    engine = Engine(model, slots=4, pack=False, keep=True)
    many, long = asked(9, prompts=9, max_new_tokens=3), asked(2, max_new_tokens=60)
    for requests in (many, long, many, long):
        wanted = responses(Engine(model, slots=4, pack=False).run(requests))
        assert responses(engine.run(requests)) == wanted
    kept = engine.kept
    assert kept is not None
    engine.run(many)
    assert engine.kept is kept
    engine.run(long)
    assert engine.kept is kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_a_replayed_graph_draws_what_its_kernels_draw() -> None:
    model = model_of().to("cuda")
    requests = asked(40, prompts=9, max_new_tokens=30, temperature=0.7, top_p=0.9)
    wanted = Engine(model, slots=16, graphs=False).run(requests)
    found = Engine(model, slots=16).run(requests)
    assert responses(found) == responses(wanted)
    torch.testing.assert_close(found.logprobs, wanted.logprobs)


def test_a_large_cache_or_copies_of_weights_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    packed = Engine(model, slots=4, keep=True)
    packed.run(asked(3))
    assert (packed.kept is None) == packs(model.head.weight)
    engine = Engine(model, slots=4, pack=False, keep=True, memory=1 << 26)
    monkeypatch.setattr("fastrlhf.generation.engine.free_memory", lambda device: 1 << 10)
    engine.run(asked(3))
    assert engine.kept is None


@pytest.mark.slow
def test_thousands_of_requests_keep_64_slots_full() -> None:
    model, _ = tiny_model(context=1100, layers=1)
    lengths = np.random.default_rng(0).integers(1, 1025, 4096).tolist()
    requests = [
        Request(prompt=[1 + i % 97, 1 + i // 97], seed=i, sampling=Sampling(max_new_tokens=n))
        for i, n in enumerate(lengths)
    ]
    engine = Engine(model, slots=64)
    page_bytes = engine.decoder.shape.page_bytes
    engine.memory = 80 * pages_for(1100) * page_bytes
    outcome = engine.run(requests)
    assert outcome.counters.occupancy >= 0.9
    assert outcome.counters.peak_pages * page_bytes <= engine.memory
    assert outcome.lengths.tolist() == lengths
    assert set(outcome.finishes) == {"length"}
    for i in range(0, 4096, 511):  # each in its place
        assert outcome[i].tokens == Engine(model).run([requests[i]])[0].tokens


# --- draws --------------------------------------------------------------------------------------


def test_tokens_are_what_sample_draws_from_the_models_logits() -> None:
    """And log-probs are those of `logprobs_from_logits` on the same logits, to the bit."""
    model = model_of()
    engine = Engine(model, fused=False)
    seen: list[torch.Tensor] = []
    plain = model.scaled
    model.scaled = lambda logits: (seen.append(plain(logits)), seen[-1])[1]  # type: ignore[method-assign]
    (request,) = asked(1)
    result = engine.run([request])[0]
    for position, (token, logprob) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
        logits = seen[position]
        at = torch.tensor([position])
        drawn = sample(logits, torch.tensor([request.seed]), at)
        assert drawn.tokens.tolist() == [token]
        assert torch.equal(logprobs_from_logits(logits, drawn.tokens)[0], logprob)


def test_a_run_repeated_gives_the_same_bits() -> None:
    engine = Engine(model_of(), slots=3)
    one, two = (engine.run(asked(9, prompts=4)) for _ in range(2))
    assert responses(one) == responses(two)
    assert torch.equal(one.padded(0)[1], two.padded(0)[1])


def test_each_request_has_settings_of_its_own() -> None:
    model = model_of()
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.5, "max_new_tokens": 3},
        {"top_k": 1},
        {"top_p": 0.5},
        {"min_p": 0.2, "end_token_id": 7},
        {},
    ]
    requests = [asked(6, prompts=1, **o)[i] for i, o in enumerate(options)]
    together = Engine(model).run(requests)
    for request, result in zip(requests, together, strict=True):
        alone = Engine(model).run([request])[0]
        assert result.tokens == alone.tokens
        assert result.finish == alone.finish
        torch.testing.assert_close(result.logprobs, alone.logprobs, atol=1e-5, rtol=0)
    assert together[0].tokens == together[2].tokens  # both take the likeliest


# --- ends ---------------------------------------------------------------------------------------


def test_the_end_token_ends_a_response_but_not_before_its_time() -> None:
    model = model_of()
    free = Engine(model).run(asked(40, prompts=3, max_new_tokens=30))
    end = int(free.tokens.flatten().bincount().argmax())
    outcome = Engine(model, slots=7).run(asked(40, prompts=3, max_new_tokens=30, end_token_id=end))
    for with_end, without in zip(outcome, free, strict=True):
        first = without.tokens.index(end) + 1 if end in without.tokens else 30
        assert with_end.tokens == without.tokens[:first]
        assert with_end.finish == ("end" if end in without.tokens else "length")
    held = Engine(model, slots=7).run(
        asked(40, prompts=3, max_new_tokens=30, end_token_id=end, min_new_tokens=6)
    )
    for result in held:
        assert end not in result.tokens[:5]
        assert len(result.tokens) >= 6
    # Log-probs stay those of the model, for which the end token was possible.
    result, request = held[0], asked(1, prompts=3)[0]
    whole = torch.tensor([[*request.prompt, *result.tokens]])
    labels = whole.clone()
    labels[:, : len(request.prompt)] = -100
    wanted = model(whole, labels)[0, len(request.prompt) :].detach()
    torch.testing.assert_close(result.logprobs, wanted, atol=1e-5, rtol=0)


def test_lengths_can_be_forced() -> None:
    requests = [
        Request(prompt=[1, 2], seed=n, sampling=Sampling(max_new_tokens=n)) for n in (1, 30, 7, 1)
    ]
    outcome = Engine(model_of(), slots=2).run(requests)
    assert outcome.lengths.tolist() == [1, 30, 7, 1]
    assert outcome.finishes == ["length"] * 4


def test_stop_strings_end_a_response() -> None:
    model = model_of()
    _, tokenizer = tiny_model()
    requests = asked(30, prompts=3, max_new_tokens=30)
    engine = Engine(model, tokenizer=tokenizer, slots=4)
    free = engine.run(requests)
    pair = next(r.tokens[3:5] for r in free if "" not in map(tokenizer.decode, r.tokens[3:5]))
    stop = tokenizer.decode(pair)
    outcome = engine.run(asked(30, prompts=3, max_new_tokens=30, stop=(stop, "never said")))
    stopped = 0
    for with_stop, without in zip(outcome, free, strict=True):
        texts = [tokenizer.decode(without.tokens[:n]) for n in range(1, 31)]
        first = next((n for n, text in enumerate(texts, 1) if stop in text), None)
        stopped += first is not None
        assert with_stop.finish == ("length" if first is None else "stop")
        assert with_stop.tokens == without.tokens[:first]
    assert stopped > 0


def test_tokens_are_streamed_as_they_are_drawn() -> None:
    got: list[Token] = []
    requests = asked(9, prompts=4, end_token_id=END)
    outcome = Engine(model_of(), slots=2).run(requests, stream=got.extend)
    for index, result in enumerate(outcome):
        mine = [token for token in got if token.request == index]
        assert [token.token for token in mine] == result.tokens
        assert [token.logprob for token in mine] == result.logprobs.tolist()
        assert [token.finish for token in mine] == [None] * (len(mine) - 1) + [result.finish]


def test_progress_is_shown_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    finished: list[int] = []
    Engine(model_of(), slots=2).run(asked(5), advance=finished.append)
    assert sum(finished) == 5
    assert capsys.readouterr().err == ""
    Engine(model_of(), slots=2).run(asked(5), progress=True)
    assert "generate: 5/5 responses" in capsys.readouterr().err


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_logits_that_are_no_numbers_end_that_response_alone(fused: bool) -> None:
    model = model_of()
    poison = 77
    with torch.no_grad():
        model.model.get_input_embeddings().weight[poison] = torch.nan
    requests = asked(20, prompts=5, length=5, max_new_tokens=30)
    requests.append(Request(prompt=[1, poison], seed=3, sampling=Sampling(max_new_tokens=5)))
    outcome = Engine(model, slots=4, fused=fused).run(requests)
    assert {"length", "error"} == set(outcome.finishes)
    for result in outcome:
        if result.finish == "error":
            # Its last token, if any, was the poison: the one after it could not be drawn.
            assert result.tokens[-1:] in ([poison], [])
            assert poison not in result.tokens[:-1]
            assert result.error is not None
            assert "logits" in result.error
        else:
            assert poison not in result.tokens[:-1]
            assert result.error is None
        assert not result.logprobs.isnan().any()
    assert (outcome[20].tokens, outcome[20].finish) == ([], "error")


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Python's own handler, also where a shell started the tests with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_returns_what_is_finished() -> None:
    requests = asked(12, prompts=5)
    wanted = Engine(model_of()).run(requests)
    finished: list[int] = []

    def interrupt(n: int) -> None:
        finished.append(n)
        if sum(finished) == 5:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C does

    model = model_of()
    model.train()
    outcome = Engine(model, slots=2).run(requests, advance=interrupt)
    assert outcome.interrupted
    assert not wanted.interrupted
    done = [i for i, finish in enumerate(outcome.finishes) if finish == "length"]
    assert 4 <= len(done) < 12
    for i, result in enumerate(outcome):
        if i in done:
            assert result.tokens == wanted[i].tokens
        else:
            assert (result.tokens, result.finish) == ([], "interrupted")
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p: must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p: must be in \(0, 1\], got 1.1"),
        ({"top_p": float("nan")}, "top_p: must be in"),
        ({"min_p": -0.1}, r"min_p: must be in \[0, 1\]"),
        ({"top_k": -1}, "top_k: must be at least 0"),
        ({"temperature": -1.0}, "temperature: must be at least 0"),
        ({"temperature": float("inf")}, "temperature: must be at least 0, finite"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"min_new_tokens": 129}, r"min_new_tokens: must be from 0 to max_new_tokens \(128\)"),
        ({"end_token_id": -1}, "end_token_id: must be a token id or None"),
        ({"stop": "text"}, "stop: must be a tuple of strings"),
        ({"stop": ("",)}, "stop: must be a tuple of strings, none empty"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_bad_requests_are_refused_before_anything_runs() -> None:
    model = model_of(context=64)
    engine = Engine(model, memory=3 * Engine(model).decoder.shape.page_bytes)
    good = asked(1)
    model.hidden_states = None  # type: ignore[assignment,method-assign]

    def refused(request: Request, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            engine.run([*good, request])

    short = Sampling(max_new_tokens=2)
    refused(Request(prompt=[], sampling=short), "prompts: number 1 is empty")
    refused(Request(prompt=[10**6], sampling=short), "token outside the vocabulary")
    refused(Request(prompt=[-1], sampling=short), "token outside the vocabulary")
    refused(Request(prompt=[1] * 63, sampling=short), "exceed the context of 64")
    refused(
        Request(prompt=[1] * 40, sampling=short),
        r"prompts: number 1, of 40 tokens, and max_new_tokens=2 need .* bytes of cache; the budget",
    )
    refused(Request(prompt=[1], sampling=Sampling(max_new_tokens=2, stop=("x",))), "tokenizer")
    with pytest.raises(ValueError, match="slots: must be at least 1, got 0"):
        Engine(model, slots=0)


def test_no_requests_are_no_work() -> None:
    outcome = Engine(model_of()).run([])
    assert len(outcome) == 0
    assert outcome.counters.steps == 0
    assert outcome.counters.occupancy == 1.0
