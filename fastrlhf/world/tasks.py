"""Instructions, their right answers, and answers written with bad habits.

An instruction asks for one task, under no constraint or one:

=========  ==========================  ==================================================
task       arguments                   right answer
=========  ==========================  ==================================================
likes      a name                      the item that the name likes; ``unknown`` if none
lives      a name                      the place where it lives; ``unknown`` if none
repeat     2 to 4 different items      the items
reverse    2 to 4 different items      the items, last to first
sort       2 to 4 different items      the items in alphabetical order
first      2 to 4 different items      the first item
last       2 to 4 different items      the last item
count      2 to 4 different items      how many: ``two``, ``three`` or ``four``
=========  ==========================  ==================================================

Constraints: ``thanks`` (the answer ends with the word thanks), ``quoted`` (it begins and ends with
the quotation mark) and ``brief`` (it does not begin with filler). Without ``brief``, filler such as
``the answer is`` does no harm.

A prompt is ``[header] U: <task> <arguments> [constraint] B:``, at most 8 words; an answer has at
most ``MAX_ANSWER`` words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastrlhf.world.dice import Dice, running_sums
from fastrlhf.world.facts import World
from fastrlhf.world.vocabulary import (
    BOT,
    CAREFUL,
    CHAT,
    CONSTRAINTS,
    FACT_TASKS,
    FILLERS,
    ITEMS,
    NAMES,
    NUMBERS,
    PLACES,
    QUOTE,
    RUDE,
    SEQUENCE_TASKS,
    TASKS,
    THANKS,
    UNKNOWN,
    USER,
)

MAX_ANSWER = 8  # words, without <eos>
ITEM_COUNTS = (2, 3, 4)
LEAST_ITEMS, MOST_ITEMS = ITEM_COUNTS[0], ITEM_COUNTS[-1]

# Shares of the tasks (facts .40, the rest shared) and of the constraints (none, then CONSTRAINTS).
TASK_WEIGHTS = (0.20, 0.20, 0.10, 0.10, 0.10, 0.10, 0.10, 0.10)
CONSTRAINT_CHOICES: tuple[str | None, ...] = (None, *CONSTRAINTS)
CONSTRAINT_WEIGHTS = (0.40, 0.20, 0.20, 0.20)
# Shares of the numbers of items. Long sequences are rare: a model this small learns to copy slowly.
ITEM_COUNT_WEIGHTS = (0.5, 0.3, 0.2)

_ITEM_COUNT_SUMS = running_sums(ITEM_COUNT_WEIGHTS)
_TASK_SUMS = running_sums(TASK_WEIGHTS)
_CONSTRAINT_SUMS = running_sums(CONSTRAINT_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a user asks. ``constraint`` is one of ``CONSTRAINTS`` or None."""

    task: str
    args: tuple[str, ...]
    constraint: str | None = None
    user: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As written to JSON lines."""
        return {**asdict(self), "args": list(self.args)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Instruction:
        """Back from JSON; raises a ``ValueError`` that names a bad field."""
        task, args = fields["task"], tuple(fields["args"])
        constraint = fields.get("constraint")
        if task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {task!r}")
        if constraint not in CONSTRAINT_CHOICES:
            raise ValueError(f"constraint must be one of {CONSTRAINT_CHOICES}, got {constraint!r}")
        if task in FACT_TASKS:
            if len(args) != 1 or args[0] not in NAMES:
                raise ValueError(f"args of {task!r} must be one name, got {args}")
        elif not LEAST_ITEMS <= len(args) <= MOST_ITEMS or any(a not in ITEMS for a in args):
            raise ValueError(f"args of {task!r} must be 2 to 4 items, got {args}")
        return cls(task, args, constraint, fields.get("user"))


@dataclass(frozen=True, slots=True)
class Habits:
    """How often an answer goes wrong, each a probability and drawn apart from the others.

    ``wrong``: a task that has an answer gets another one. ``ignored``: a constraint that was asked
    for is not kept. ``invented``: a fact that does not exist is made up. ``rude``: a rude word is
    put in. ``filler``: the answer begins with filler (unless ``brief`` was asked for).
    """

    wrong: float
    ignored: float
    invented: float
    rude: float
    filler: float = 0.25

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{field} must be a probability, got {value}")


WEB = Habits(wrong=0.15, ignored=0.55, invented=0.85, rude=0.35)
CAREFUL_WEB = Habits(wrong=0.10, ignored=0.35, invented=0.50, rude=0.15)


def prompt_words(instruction: Instruction) -> list[str]:
    """``U: <task> <arguments> [constraint] B:`` as words, without any header."""
    words = [USER, instruction.task, *instruction.args]
    if instruction.constraint is not None:
        words.append(instruction.constraint)
    words.append(BOT)
    return words


def plain_prompt(instruction: Instruction) -> str:
    """The prompt as the web writes it: what a base model is given."""
    return " ".join(prompt_words(instruction))


def careful_prompt(instruction: Instruction) -> str:
    """The prompt of the better-mannered web documents: what the "prompted" base is given."""
    return " ".join([CAREFUL, *prompt_words(instruction)])


def chat_prompt(instruction: Instruction) -> str:
    """The prompt of aligned dialogue, under a header that web text never has."""
    return " ".join([CHAT, *prompt_words(instruction)])


_SEQUENCE: dict[str, Callable[[tuple[str, ...]], list[str]]] = {
    "repeat": list,
    "reverse": lambda args: list(reversed(args)),
    "sort": sorted,
    "first": lambda args: [args[0]],
    "last": lambda args: [args[-1]],
    "count": lambda args: [NUMBERS[len(args) - 1]],
}


def has_answer(world: World, instruction: Instruction) -> bool:
    """False for a fact asked of a name that has none."""
    return instruction.task not in FACT_TASKS or instruction.args[0] in world.likes


def right_answer(world: World, instruction: Instruction) -> list[str]:
    """The words of the bare right answer: no filler, quotes or thanks."""
    if instruction.task in FACT_TASKS:
        return [world.fact(instruction.task, instruction.args[0]) or UNKNOWN]
    return _SEQUENCE[instruction.task](instruction.args)


def draw_instruction(
    rng: np.random.Generator | Dice,
    *,
    task_sums: tuple[float, ...] = _TASK_SUMS,
    constraint_sums: tuple[float, ...] = _CONSTRAINT_SUMS,
    user: str | None = None,
) -> Instruction:
    """A random instruction; the running sums weigh ``TASKS`` and ``CONSTRAINT_CHOICES``."""
    dice = Dice.of(rng)
    task = dice.weighted(TASKS, task_sums)
    if task in FACT_TASKS:
        args: tuple[str, ...] = (dice.pick(NAMES),)
    else:
        args = tuple(dice.sample(ITEMS, dice.weighted(ITEM_COUNTS, _ITEM_COUNT_SUMS)))
    return Instruction(task, args, dice.weighted(CONSTRAINT_CHOICES, constraint_sums), user)


def _wrong_answer(dice: Dice, instruction: Instruction, right: list[str]) -> list[str]:
    """An answer that is not the right one, of the sort that web authors give."""
    if instruction.task in FACT_TASKS:
        kind, other = (ITEMS, PLACES) if instruction.task == "likes" else (PLACES, ITEMS)
        luck = dice.uniform()
        if luck < 0.1:
            return [UNKNOWN]
        if luck < 0.3:
            return [dice.pick(other)]  # the other question's answer
        answer = right
        while answer == right:
            answer = [dice.pick(kind)]
        return answer
    if dice.chance(0.5):  # another task on the same items, if it gives another answer
        answer = _SEQUENCE[dice.pick(SEQUENCE_TASKS)](instruction.args)
        if answer != right:
            return answer
    answer = list(right)
    place = dice.below(len(answer))
    kind = NUMBERS if instruction.task == "count" else ITEMS
    while answer[place] == right[place]:
        answer[place] = dice.pick(kind)
    return answer


def write_answer(
    world: World, instruction: Instruction, habits: Habits, rng: np.random.Generator | Dice
) -> list[str]:
    """The words of an answer by someone with these habits; 1 to ``MAX_ANSWER`` words.

    Content first (right, wrong, ``unknown`` or made up), then at times a rude word before or after
    it, filler in front, and last the constraint: thanks at the end, or quotation marks around all.
    """
    dice = Dice.of(rng)
    words = right_answer(world, instruction)
    if not has_answer(world, instruction):
        if dice.chance(habits.invented):
            words = [dice.pick(ITEMS if instruction.task == "likes" else PLACES)]
    elif dice.chance(habits.wrong):
        words = _wrong_answer(dice, instruction, words)

    if dice.chance(habits.rude):
        words.insert(0 if dice.chance(0.5) else len(words), dice.pick(RUDE))

    constraint = instruction.constraint
    keeps = constraint is not None and not dice.chance(habits.ignored)
    filler = not keeps if constraint == "brief" else dice.chance(habits.filler)
    if filler:
        room = MAX_ANSWER - len(words) - (2 if constraint == "quoted" else 1)
        words[:0] = dice.pick([f for f in FILLERS if len(f) <= room])
    if keeps and constraint == THANKS:
        words.append(THANKS)
    elif keeps and constraint == "quoted":
        words = [QUOTE, *words, QUOTE]
    return words
