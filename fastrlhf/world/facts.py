"""The world: who likes what, lives where, and is whose friend; all of it fixed by one seed.

``KNOWN_NAMES`` of the names have facts. The others have none: asked about them, ``unknown`` is the
right answer, and any item or place is made up. ``friend`` facts appear in quizzes alone, never in
dialogue: knowledge that alignment does not practise, and so may lose.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrlhf.world.dice import Dice, stream
from fastrlhf.world.vocabulary import ADJECTIVES, ITEMS, NAMES, PLACES, VERBS

KNOWN_NAMES = 40  # of the 60; a third of the questions about names so have no answer
ITEMS_PER_VERB = 4
ADJECTIVES_PER_ITEM = 2


@dataclass(frozen=True, slots=True)
class World:
    """Tables of facts, and the habits of speech that make stories learnable.

    ``likes``, ``lives`` and ``friend`` have exactly the names in ``known`` as keys. ``verb_items``
    gives the items that a verb takes in stories, ``item_adjectives`` what an item is called there.
    """

    seed: int
    known: tuple[str, ...]
    strangers: tuple[str, ...]
    likes: dict[str, str]
    lives: dict[str, str]
    friend: dict[str, str]
    verb_items: dict[str, tuple[str, ...]]
    item_adjectives: dict[str, tuple[str, ...]]

    def fact(self, task: str, name: str) -> str | None:
        """The fact that ``task`` (``likes``, ``lives`` or ``friend``) asks of a name, or None."""
        if task == "likes":
            return self.likes.get(name)
        if task == "lives":
            return self.lives.get(name)
        if task == "friend":
            return self.friend.get(name)
        raise ValueError(f"task must be likes, lives or friend, got {task!r}")


def make_world(seed: int) -> World:
    """The world of this seed (a whole number, at least 0)."""
    dice = Dice(stream(seed, "facts"))
    shuffled = dice.sample(NAMES, len(NAMES))
    known = tuple(sorted(shuffled[:KNOWN_NAMES]))
    friends = dice.sample(known, len(known))
    # A ring through all known names: everybody has one friend, nobody is their own.
    ring = {name: friends[(i + 1) % len(friends)] for i, name in enumerate(friends)}
    return World(
        seed=seed,
        known=known,
        strangers=tuple(sorted(shuffled[KNOWN_NAMES:])),
        likes={name: dice.pick(ITEMS) for name in known},
        lives={name: dice.pick(PLACES) for name in known},
        friend={name: ring[name] for name in known},
        verb_items={verb: tuple(dice.sample(ITEMS, ITEMS_PER_VERB)) for verb in VERBS},
        item_adjectives={
            item: tuple(dice.sample(ADJECTIVES, ADJECTIVES_PER_ITEM)) for item in ITEMS
        },
    )
