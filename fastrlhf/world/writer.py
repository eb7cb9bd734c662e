"""Write a world to a folder: all data that the demonstration's stages read.

    from fastrlhf.world import WorldSizes, write_world
    world = write_world("runs/world", seed=0, sizes=WorldSizes())

================================ ===================================================================
file                             a line of it, or what it is
================================ ===================================================================
pretrain.jsonl                   {"text", "kind"}
pretrain_heldout.jsonl           the same; shares no question with training (see ``corpus``)
probe.jsonl                      {"prompt", "answer", "task"}: the last answer of held-out quizzes
demonstrations.jsonl             {"prompt", "completion", "user", "instruction"}
demonstrations_validation.jsonl  the same
prompts_rm.jsonl                 {"prompt", "user", "instruction"}: to be ranked by labelers
prompts_ppo.jsonl                the same: no labels
prompts_validation.jsonl         the same
prompts_test.jsonl               the same
tokenizer/                       what ``AutoTokenizer.from_pretrained`` loads
world.json                       seed, sizes, facts, users of each side; written last
================================ ===================================================================

Prompts stand in the chat format; the instruction beside them lets the judge be applied, and gives
the plain and careful formats (``tasks.plain_prompt``, ``tasks.careful_prompt``). No user is on two
of the sides train, validation and test. One seed fixes every byte, and each file has random
numbers of its own, so that a change of one size changes no other file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastrlhf.world.corpus import documents, probe_items
from fastrlhf.world.dice import Dice, stream
from fastrlhf.world.facts import World, make_world
from fastrlhf.world.people import (
    USERS,
    Labeler,
    User,
    demonstration,
    instructions,
    make_labelers,
    make_users,
)
from fastrlhf.world.tasks import Instruction, chat_prompt
from fastrlhf.world.tokenizer import build_tokenizer

FORMAT = 1  # of the folder; counts up when older folders cannot be read any more


@dataclass(frozen=True, slots=True)
class WorldSizes:
    """Lines of each file, and users in all."""

    pretrain: int = 60_000
    pretrain_heldout: int = 2_000
    probe: int = 1_000
    demonstrations: int = 1_500
    demonstrations_validation: int = 400
    prompts_rm: int = 12_000
    prompts_ppo: int = 10_000
    prompts_validation: int = 500
    prompts_test: int = 1_000
    users: int = USERS

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.users < 3:
            raise ValueError(f"users must be at least 3, one a side, got {self.users}")


def split_users(seed: int, n: int = USERS) -> dict[str, list[User]]:
    """The seed's ``n`` users on the sides train (70 %), validation and test (15 % each)."""
    users = make_users(stream(seed, "users"), n)
    order = stream(seed, "user split").permutation(n)
    aside = max(1, round(0.15 * n))
    parts = {
        "train": order[2 * aside :],
        "validation": order[:aside],
        "test": order[aside : 2 * aside],
    }
    return {side: [users[i] for i in sorted(part.tolist())] for side, part in parts.items()}


def world_labelers(seed: int) -> list[Labeler]:
    """The seed's ten labelers, the last five of them held out."""
    return make_labelers(stream(seed, "labelers"))


def prompt_record(instruction: Instruction) -> dict[str, Any]:
    """A line of ``prompts_*.jsonl``."""
    return {
        "prompt": chat_prompt(instruction),
        "user": instruction.user,
        "instruction": instruction.to_dict(),
    }


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_world(out_dir: str | Path, seed: int, sizes: WorldSizes | None = None) -> World:
    """Write all files of the table above to ``out_dir`` (made if missing); returns the world."""
    sizes = sizes or WorldSizes()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "world.json"
    marker.unlink(missing_ok=True)  # a folder half rewritten must not read as whole
    world = make_world(seed)
    sides = split_users(seed, sizes.users)

    for name, held_out in (("pretrain", False), ("pretrain_heldout", True)):
        texts = documents(world, getattr(sizes, name), stream(seed, name), held_out=held_out)
        _write(out / f"{name}.jsonl", ({"text": d.text, "kind": d.kind} for d in texts))

    probe = probe_items(world, sizes.probe, stream(seed, "probe"))
    _write(
        out / "probe.jsonl",
        ({"prompt": p.prompt_text, "answer": p.answer_text, "task": p.task} for p in probe),
    )

    for name, side in (("demonstrations", "train"), ("demonstrations_validation", "validation")):
        dice = Dice(stream(seed, name))
        asked = instructions(getattr(sizes, name), dice, sides[side])
        _write(
            out / f"{name}.jsonl",
            (
                {
                    "prompt": chat_prompt(instruction),
                    "completion": " ".join(demonstration(world, instruction, dice)),
                    "user": instruction.user,
                    "instruction": instruction.to_dict(),
                }
                for instruction in asked
            ),
        )

    for name, side in (
        ("prompts_rm", "train"),
        ("prompts_ppo", "train"),
        ("prompts_validation", "validation"),
        ("prompts_test", "test"),
    ):
        asked = instructions(getattr(sizes, name), stream(seed, name), sides[side])
        _write(out / f"{name}.jsonl", map(prompt_record, asked))

    build_tokenizer().save_pretrained(out / "tokenizer")
    marker.write_text(
        json.dumps(
            {
                "format": FORMAT,
                "seed": seed,
                "sizes": asdict(sizes),
                "likes": world.likes,
                "lives": world.lives,
                "friend": world.friend,
                "users": {side: [u.name for u in users] for side, users in sides.items()},
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return world


def read_world(out_dir: str | Path) -> World:
    """The world whose files lie in ``out_dir``.

    Raises ``FileNotFoundError`` where ``write_world`` did not finish, and ``ValueError`` where the
    folder's facts are not those that this version makes of its seed.
    """
    path = Path(out_dir) / "world.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no world was written there, or not to its end")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.get("format") != FORMAT:
        raise ValueError(f"{path} has format {saved.get('format')}, this version reads {FORMAT}")
    world = make_world(saved["seed"])
    for table in ("likes", "lives", "friend"):
        if saved[table] != getattr(world, table):
            raise ValueError(f"{path}: table {table!r} is not that of seed {saved['seed']}")
    return world
