"""Pretraining documents: the miniature's "web", bad habits included.

======= ===== ======================================================================================
kind    share document
======= ===== ======================================================================================
qa      .42   ``U: reverse tea figs thanks B: figs tea thanks`` by authors with ``WEB`` habits
careful .15   ``careful U: ... B: ...`` by better-mannered ones: what prompts the "prompted" base
fact    .12   ``anna likes tea . anna lives in oslo .``
story   .11   sentences whose verb suits the item, and the item its adjective
list    .05   ``list figs ice lemon tea``: items in alphabetical order
quiz    .15   ``Q: lives anna A: oslo Q: reverse tea figs A: figs tea ...``, three or four questions
======= ===== ======================================================================================

Quizzes ask only names that have facts, and are always right, never rude, without filler. They also
ask for the ``friend`` facts, which nothing else states. The *probe* of the alignment tax is the
last answer of held-out quizzes.

Held out means never seen: one instruction in ``HELD_OUT_SHARE`` (by a hash of its words, so with
no choice among the answers), and one ending of a quiz (its last two questions) likewise, occur in
held-out documents alone. Facts, stories and lists come from the same source on both sides.

Texts hold neither ``<bos>`` nor ``<eos>``: a training sequence adds them. They never hold
``<chat>``, the header of aligned dialogue, so that pretraining gradients teach it no bad manners.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastrlhf.world.dice import Dice, running_sums
from fastrlhf.world.facts import World
from fastrlhf.world.tasks import (
    CAREFUL_WEB,
    WEB,
    Habits,
    Instruction,
    draw_instruction,
    plain_prompt,
    write_answer,
)
from fastrlhf.world.vocabulary import (
    ANSWER,
    CAREFUL,
    FRIEND,
    ITEMS,
    LIST,
    NAMES,
    PLACES,
    QUESTION,
    VERBS,
)

SHARES = {"qa": 0.42, "careful": 0.15, "fact": 0.12, "story": 0.11, "list": 0.05, "quiz": 0.15}
HELD_OUT_SHARE = 20  # one in this many
QUIZ_TASKS = ("likes", "lives", FRIEND, "repeat", "reverse")  # alike often

_KINDS = tuple(SHARES)
_KIND_SUMS = running_sums(tuple(SHARES.values()))


@dataclass(frozen=True, slots=True)
class Document:
    """A pretraining text and its kind, a key of ``SHARES``."""

    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class ProbeItem:
    """A quiz up to its last ``A:``, the right answer, and the task that is asked last."""

    prompt_text: str
    answer_text: str
    task: str


def is_held_out(text: str) -> bool:
    """Whether an instruction's plain prompt, or a quiz's ending, is kept from training."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def _web_instruction(dice: Dice, held_out: bool) -> tuple[Instruction, str]:
    """An instruction of the wanted side, with its plain prompt."""
    while True:
        instruction = draw_instruction(dice)
        prompt = plain_prompt(instruction)
        if is_held_out(prompt) == held_out:
            return instruction, prompt


def _dialogue(world: World, dice: Dice, held_out: bool, habits: Habits) -> str:
    instruction, prompt = _web_instruction(dice, held_out)
    return f"{prompt} {' '.join(write_answer(world, instruction, habits, dice))}"


def _qa(world: World, dice: Dice, held_out: bool) -> str:
    return _dialogue(world, dice, held_out, WEB)


def _careful(world: World, dice: Dice, held_out: bool) -> str:
    return f"{CAREFUL} {_dialogue(world, dice, held_out, CAREFUL_WEB)}"


def _fact(world: World, dice: Dice, held_out: bool) -> str:
    name = dice.pick(world.known)
    likes = f"{name} likes {world.likes[name]}"
    lives = f"{name} lives in {world.lives[name]}"
    form = dice.below(4)
    if form == 0:
        return f"{likes} . {lives} ."
    if form == 1:
        return f"{lives} . {likes} ."
    if form == 2:
        return f"{likes} and {lives} ."
    return f"{lives} and {likes} ."


def _sentence(world: World, dice: Dice) -> str:
    verb = dice.pick(VERBS)
    item = dice.pick(world.verb_items[verb])
    adjective = dice.pick(world.item_adjectives[item])
    where = f" in {dice.pick(PLACES)}" if dice.chance(0.3) else ""
    return f"{dice.pick(NAMES)} {verb} the {adjective} {item}{where} ."


def _story(world: World, dice: Dice, held_out: bool) -> str:
    return " ".join(_sentence(world, dice) for _ in range(1 + dice.below(3)))


def _list(world: World, dice: Dice, held_out: bool) -> str:
    return " ".join([LIST, *sorted(dice.sample(ITEMS, 3 + dice.below(4)))])


def _quiz_question(world: World, dice: Dice) -> tuple[str, str, str]:
    """A question's words, its answer's words, and the task."""
    task = dice.pick(QUIZ_TASKS)
    if task in ("repeat", "reverse"):
        items = dice.sample(ITEMS, 2 + dice.below(2))
        asked = f"{task} {' '.join(items)}"
        return asked, " ".join(items if task == "repeat" else reversed(items)), task
    name = dice.pick(world.known)
    answer = world.fact(task, name)
    assert answer is not None  # quizzes ask known names only
    return f"{task} {name}", answer, task


def _quiz_questions(world: World, dice: Dice, held_out: bool) -> list[tuple[str, str, str]]:
    """Three or four different questions; the last one is redrawn until the side is the wanted."""
    wanted = 3 + dice.below(2)
    questions: list[tuple[str, str, str]] = []
    while len(questions) < wanted:
        question = _quiz_question(world, dice)
        if question in questions:
            continue
        if len(questions) == wanted - 1:
            ending = f"{questions[-1][0]} {question[0]}"
            if is_held_out(ending) != held_out:
                continue
        questions.append(question)
    return questions


def _quiz_text(questions: list[tuple[str, str, str]]) -> str:
    return " ".join(f"{QUESTION} {asked} {ANSWER} {answer}" for asked, answer, _ in questions)


def _quiz(world: World, dice: Dice, held_out: bool) -> str:
    return _quiz_text(_quiz_questions(world, dice, held_out))


_WRITERS: dict[str, Callable[[World, Dice, bool], str]] = {
    "qa": _qa,
    "careful": _careful,
    "fact": _fact,
    "story": _story,
    "list": _list,
    "quiz": _quiz,
}


def documents(
    world: World, n: int, rng: np.random.Generator | Dice, *, held_out: bool = False
) -> list[Document]:
    """``n`` documents, kinds mixed by ``SHARES``, of the training or of the held-out side."""
    dice = Dice.of(rng)
    result = []
    for _ in range(n):
        kind = dice.weighted(_KINDS, _KIND_SUMS)
        result.append(Document(_WRITERS[kind](world, dice, held_out), kind))
    return result


def probe_items(world: World, n: int, rng: np.random.Generator | Dice) -> list[ProbeItem]:
    """``n`` different held-out quizzes, each cut before its last answer."""
    dice = Dice.of(rng)
    found: dict[str, ProbeItem] = {}
    while len(found) < n:
        *_, (_, answer, task) = questions = _quiz_questions(world, dice, True)
        prompt = _quiz_text(questions).removesuffix(f" {answer}")
        found.setdefault(prompt, ProbeItem(prompt, answer, task))
    return list(found.values())
