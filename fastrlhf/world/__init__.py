"""The miniature world: data for InstructGPT in miniature, made from one seed, nothing downloaded.

A language of 163 words in which users ask for facts and for small tasks on lists, web authors
answer badly, labelers demonstrate and rank, and a hidden rule says what an answer is truly worth.
Start with ``write_world``; read ``tasks`` for what is asked and ``judge`` for the rule.
"""

from fastrlhf.world.corpus import Document, ProbeItem, documents, probe_items
from fastrlhf.world.dice import Dice, stream
from fastrlhf.world.facts import World, make_world
from fastrlhf.world.judge import Verdict, judge
from fastrlhf.world.people import (
    Agreement,
    Labeler,
    User,
    agreement,
    demonstration,
    instructions,
    label,
    make_labelers,
    make_users,
    mixed_pool,
    rank,
    rate,
)
from fastrlhf.world.tasks import (
    Habits,
    Instruction,
    careful_prompt,
    chat_prompt,
    has_answer,
    plain_prompt,
    prompt_words,
    right_answer,
    write_answer,
)
from fastrlhf.world.tokenizer import build_tokenizer
from fastrlhf.world.vocabulary import VOCABULARY, split_words
from fastrlhf.world.writer import (
    WorldSizes,
    prompt_record,
    read_world,
    split_users,
    world_labelers,
    write_world,
)

__all__ = [
    "VOCABULARY",
    "Agreement",
    "Dice",
    "Document",
    "Habits",
    "Instruction",
    "Labeler",
    "ProbeItem",
    "User",
    "Verdict",
    "World",
    "WorldSizes",
    "agreement",
    "build_tokenizer",
    "careful_prompt",
    "chat_prompt",
    "demonstration",
    "documents",
    "has_answer",
    "instructions",
    "judge",
    "label",
    "make_labelers",
    "make_users",
    "make_world",
    "mixed_pool",
    "plain_prompt",
    "probe_items",
    "prompt_record",
    "prompt_words",
    "rank",
    "rate",
    "read_world",
    "right_answer",
    "split_users",
    "split_words",
    "stream",
    "world_labelers",
    "write_answer",
    "write_world",
]
