"""The miniature world, by values: right answers, habits, the judge, the corpus."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.world import (
    VOCABULARY,
    Habits,
    Instruction,
    World,
    careful_prompt,
    chat_prompt,
    documents,
    has_answer,
    instructions,
    judge,
    make_world,
    plain_prompt,
    probe_items,
    right_answer,
    split_users,
    split_words,
    stream,
    write_answer,
)
from fastrlhf.world.corpus import SHARES
from fastrlhf.world.judge import GOLD_WEIGHTS
from fastrlhf.world.tasks import (
    CAREFUL_WEB,
    MAX_ANSWER,
    WEB,
    draw_instruction,
)
from fastrlhf.world.vocabulary import (
    CHAT,
    CONSTRAINTS,
    FACT_TASKS,
    FILLER_WORDS,
    ITEMS,
    NAMES,
    PLACES,
    RUDE,
    TASKS,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


def assert_binomial(hits: int, n: int, p: float) -> None:
    """``hits`` of ``n`` lies within five standard deviations of what ``p`` gives."""
    assert abs(hits - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9, (hits, n, p)


# --- vocabulary


def test_vocabulary_has_no_word_twice_and_only_whole_words() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert all(word and not re.search(r"\s", word) for word in VOCABULARY)
    assert list(ITEMS) == sorted(ITEMS)  # `sort` means this order


def test_split_words_names_the_foreign_word() -> None:
    assert split_words("U: likes anna B:") == ["U:", "likes", "anna", "B:"]
    with pytest.raises(ValueError, match="'pizza'"):
        split_words("anna likes pizza")


# --- the world and its tasks


def test_facts(world: World) -> None:
    assert sorted(world.known + world.strangers) == sorted(NAMES)
    assert len(world.known) == 40
    for table, values in (
        (world.likes, ITEMS),
        (world.lives, PLACES),
        (world.friend, world.known),
    ):
        assert set(table) == set(world.known)
        assert set(table.values()) <= set(values)
    assert all(name != friend for name, friend in world.friend.items())
    other = make_world(1)
    assert (other.likes, other.known) != (world.likes, world.known)
    assert make_world(0) == world
    with pytest.raises(ValueError, match="seed"):
        make_world(-1)


def test_prompt_formats() -> None:
    instruction = Instruction("sort", ("wine", "ice"), "brief", "user-001")
    assert plain_prompt(instruction) == "U: sort wine ice brief B:"
    assert careful_prompt(instruction) == "careful U: sort wine ice brief B:"
    assert chat_prompt(instruction) == "<chat> U: sort wine ice brief B:"
    assert plain_prompt(Instruction("likes", ("anna",))) == "U: likes anna B:"
    assert Instruction.from_dict(instruction.to_dict()) == instruction


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "steal"}, "task"),
        ({"constraint": "loud"}, "constraint"),
        ({"args": ["anna"]}, "args"),
        ({"args": ["tea"]}, "args"),
        ({"task": "likes"}, "args"),
    ],
)
def test_bad_instructions_are_named(change: dict, named: str) -> None:
    fields = {**Instruction("sort", ("wine", "ice")).to_dict(), **change}
    with pytest.raises(ValueError, match=named):
        Instruction.from_dict(fields)


def independent_answer(world: World, task: str, args: tuple[str, ...]) -> str:
    """Right answers written again, on other data structures, as one string."""
    text = " ".join(args)
    if task in FACT_TASKS:
        table = world.likes if task == "likes" else world.lives
        return "unknown" if text in world.strangers else table[text]
    if task == "sort":
        present = [item for item in ITEMS if re.search(rf"\b{item}\b", text)]
        return " ".join(present)
    if task == "reverse":
        answer = ""
        for word in args:
            answer = f"{word} {answer}"
        return answer.strip()
    if task == "count":
        return {1: "two", 2: "three", 3: "four"}[text.count(" ")]
    return {"repeat": text, "first": text.split(" ", 1)[0], "last": text.rsplit(" ", 1)[1]}[task]


def test_right_answers_by_an_independent_implementation(world: World) -> None:
    rng = stream(3, "right answers")
    seen = set()
    for instruction in (draw_instruction(rng) for _ in range(800)):
        seen.add((instruction.task, len(instruction.args)))
        wanted = independent_answer(world, instruction.task, instruction.args)
        assert " ".join(right_answer(world, instruction)) == wanted
    assert len(seen) == 2 + 6 * 3  # every task, at every number of items


def test_task_and_constraint_shares() -> None:
    rng, n = stream(5, "shares"), 4_000
    dice_drawn = [draw_instruction(rng) for _ in range(n)]
    for task in TASKS:
        share = 0.2 if task in FACT_TASKS else 0.1
        assert_binomial(sum(i.task == task for i in dice_drawn), n, share)
    for constraint in CONSTRAINTS:
        assert_binomial(sum(i.constraint == constraint for i in dice_drawn), n, 0.2)


@pytest.mark.parametrize("habits", [WEB, CAREFUL_WEB, Habits(0.05, 0.18, 0.35, 0.10, 0.4)])
def test_habits_come_out_at_their_rates(world: World, habits: Habits) -> None:
    rng = np.random.default_rng(7)
    counts = dict.fromkeys(("wrong", "ignored", "invented", "rude", "filler"), 0)
    bases = dict(counts)
    for instruction in instructions(5_000, rng, split_users(0)["train"]):
        words = write_answer(world, instruction, habits, rng)
        assert 1 <= len(words) <= MAX_ANSWER
        verdict = judge(world, instruction, words, ended=True)
        bases["rude"] += 1
        counts["rude"] += verdict.rude
        if has_answer(world, instruction):
            bases["wrong"] += 1
            counts["wrong"] += not verdict.task
            assert not verdict.invented
        else:
            bases["invented"] += 1
            counts["invented"] += verdict.invented
            assert verdict.invented != verdict.task  # else it says unknown, which is right
        if instruction.constraint is not None:
            bases["ignored"] += 1
            counts["ignored"] += not verdict.constraint
        else:
            bases["filler"] += 1
            counts["filler"] += words[0] in FILLER_WORDS
    for habit, base in bases.items():
        assert_binomial(counts[habit], base, getattr(habits, habit))


def test_faultless_and_faulty_habits_are_exact(world: World) -> None:
    rng = np.random.default_rng(8)
    saint, villain = Habits(0, 0, 0, 0, 0), Habits(1, 1, 1, 1, 1)
    for instruction in (draw_instruction(rng) for _ in range(400)):
        assert (
            judge(world, instruction, write_answer(world, instruction, saint, rng), True).score == 3
        )
        verdict = judge(world, instruction, write_answer(world, instruction, villain, rng), True)
        assert not verdict.task
        assert verdict.rude
        assert verdict.invented == (not has_answer(world, instruction))
        assert verdict.constraint == (instruction.constraint is None)


def test_habits_must_be_probabilities() -> None:
    with pytest.raises(ValueError, match="invented"):
        Habits(0.1, 0.1, 1.2, 0.1)


# --- the judge


def judge_case(world: World, prompt: str, answer: str, ended: bool = True):
    """Judge by strings; KNOWN, STRANGER, ITEM and PLACE stand for names and right facts."""
    known, stranger = world.known[0], world.strangers[0]
    for word, value in (
        ("KNOWN", known),
        ("STRANGER", stranger),
        ("ITEM", world.likes[known]),
        ("PLACE", world.lives[known]),
        ("OTHER", next(i for i in ITEMS if i != world.likes[known])),
    ):
        prompt, answer = prompt.replace(word, value), answer.replace(word, value)
    task, *args = prompt.split()
    constraint = args.pop() if args[-1] in CONSTRAINTS else None
    return judge(world, Instruction(task, tuple(args), constraint), answer.split(), ended)


@pytest.mark.parametrize(
    ("prompt", "answer", "ended", "score"),
    [
        ("likes KNOWN", "ITEM", True, 3.0),
        ("likes KNOWN", "ITEM", False, 2.5),
        ("likes KNOWN", "the answer is ITEM", True, 3.0),
        ("likes KNOWN brief", "the answer is ITEM", True, 2.0),
        ("likes KNOWN brief", "ITEM", True, 3.0),
        ("likes KNOWN", "OTHER", True, 1.0),
        ("likes KNOWN", "unknown", True, 1.0),  # wrong, but nothing is made up
        ("likes KNOWN", "ITEM OTHER", True, 1.0),
        ("likes KNOWN", "stupid ITEM", True, 2.0),
        ("likes KNOWN thanks", "ITEM", True, 2.0),
        ("likes KNOWN thanks", "ITEM thanks", True, 3.0),
        ("likes KNOWN thanks", "thanks ITEM", True, 2.0),
        ("likes KNOWN thanks", "ITEM thanks fool", True, 1.0),
        ("likes KNOWN quoted", '" ITEM "', True, 3.0),
        ("likes KNOWN quoted", '" ITEM', True, 2.0),
        ("likes KNOWN quoted", '"', True, 0.0),
        ("likes KNOWN quoted", '" ITEM " thanks', True, 2.0),
        ("lives KNOWN", "PLACE", True, 3.0),
        ("lives KNOWN", "ITEM", True, 1.0),
        ("likes STRANGER", "unknown", True, 3.0),
        ("likes STRANGER", "tea", True, 0.0),
        ("likes STRANGER", "oslo", True, 0.0),
        ("likes STRANGER", "unknown tea", True, 0.0),
        ("likes STRANGER", "well", True, 1.0),
        ("lives STRANGER quoted", "idiot tea", False, -2.5),
        ("reverse tea figs ice", "ice figs tea", True, 3.0),
        ("reverse tea figs ice", "so ice figs tea lousy", True, 2.0),
        ("reverse tea figs ice", "ice so figs tea", True, 1.0),  # filler counts at the start only
        ("sort tea figs ice thanks", "figs ice tea thanks", True, 3.0),
        ("count tea figs ice brief", "three", True, 3.0),
        ("count tea figs ice brief", "well two", True, 0.0),
        ("first tea figs", "tea", True, 3.0),
        ("last tea figs", "tea", True, 1.0),
        ("last tea figs", "", True, 0.0),
        ("last tea figs brief", "", False, -0.5),
        ("repeat tea figs", "<chat> U: ??? <pad> tea", True, 1.0),
    ],
)
def test_judge_by_hand(world: World, prompt: str, answer: str, ended: bool, score: float) -> None:
    assert judge_case(world, prompt, answer, ended).score == score


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.sampled_from(VOCABULARY) | st.text(max_size=5), max_size=12),
    ended=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_judge_takes_any_words_and_adds_up(words: list[str], ended: bool, seed: int) -> None:
    world = make_world(0)
    instruction = draw_instruction(np.random.default_rng(seed))
    verdict = judge(world, instruction, words, ended)
    weighed = sum(w * f for w, f in zip(GOLD_WEIGHTS, verdict.features(), strict=True))
    assert verdict.score == weighed
    assert -2.5 <= verdict.score <= 3.0
    assert verdict.rude == any(word in RUDE for word in words)
    assert not (verdict.task and verdict.invented)


# --- the corpus


def test_documents_by_kind(world: World) -> None:
    n = 4_000
    texts = documents(world, n, stream(0, "kinds"))
    patterns = {
        "qa": r"U: [^:]+ B: [^:]+",
        "careful": r"careful U: [^:]+ B: [^:]+",
        "fact": r"\w+ (likes|lives in) \w+ (\.|and) \w+ (likes|lives in) \w+ \.",
        "story": r"(\w+ \w+ the \w+ \w+( in \w+)? \. ?)+",
        "list": r"list( \w+){3,6}",
        "quiz": r"(Q: [^:]+ A: [^:]+ ?){3,4}",
    }
    for document in texts:
        assert re.fullmatch(patterns[document.kind], document.text), document
        assert split_words(document.text)
        assert CHAT not in document.text
        if document.kind == "list":
            items = document.text.split()[1:]
            assert items == sorted(items)
        if document.kind == "fact":
            name = document.text.split()[0]
            assert {world.likes[name], world.lives[name]} <= set(document.text.split())
    for kind, share in SHARES.items():
        assert_binomial(sum(d.kind == kind for d in texts), n, share)


def quiz_pairs(text: str) -> list[tuple[str, str]]:
    return re.findall(r"Q: (.+?) A: (.*?)(?= Q:|$)", text)


def assert_quiz_right(world: World, pairs: list[tuple[str, str]]) -> None:
    assert len(pairs) in (3, 4)
    assert len({asked for asked, _ in pairs}) == len(pairs)
    for asked, answer in pairs:
        task, *args = asked.split()
        if task in ("repeat", "reverse"):
            assert answer.split() == (args if task == "repeat" else args[::-1])
        else:
            tables = {"likes": world.likes, "lives": world.lives, "friend": world.friend}
            assert answer == tables[task][args[0]]


def test_quizzes_and_probes_are_always_right(world: World) -> None:
    for document in documents(world, 1_500, stream(0, "quizzes")):
        if document.kind == "quiz":
            assert_quiz_right(world, quiz_pairs(document.text))
    items = probe_items(world, 200, stream(0, "probes"))
    assert len({item.prompt_text for item in items}) == 200
    for item in items:
        assert item.prompt_text.endswith(" A:")
        pairs = quiz_pairs(f"{item.prompt_text} {item.answer_text}")
        assert_quiz_right(world, pairs)
        assert pairs[-1][0].split()[0] == item.task
    assert {item.task for item in items} == {"likes", "lives", "friend", "repeat", "reverse"}


def test_held_out_questions_are_never_trained_on(world: World) -> None:
    kinds = ("qa", "careful", "quiz")
    trained = [d for d in documents(world, 20_000, stream(0, "train")) if d.kind in kinds]
    held = [d for d in documents(world, 3_000, stream(0, "held"), held_out=True) if d.kind in kinds]

    def prompts(texts) -> set[str]:
        return {re.search(r"U: .+ B:", d.text)[0] for d in texts if d.kind != "quiz"}

    assert prompts(held).isdisjoint(prompts(trained))
    assert {d.text for d in held}.isdisjoint({d.text for d in trained})
    probes = probe_items(world, 500, stream(0, "probe"))
    quizzes = {d.text for d in trained if d.kind == "quiz"}
    assert {f"{p.prompt_text} {p.answer_text}" for p in probes}.isdisjoint(quizzes)
    # The split is by question, not by answer: bad habits are as frequent on the held-out side.
    rude = [any(word in RUDE for word in d.text.split()) for d in held if d.kind == "qa"]
    assert_binomial(sum(rude), len(rude), WEB.rude)
