"""The miniature's people and files: users, labels, agreement, tokenizer, the written folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastrlhf.world import (
    VOCABULARY,
    Habits,
    Instruction,
    Labeler,
    World,
    WorldSizes,
    agreement,
    build_tokenizer,
    chat_prompt,
    demonstration,
    instructions,
    judge,
    label,
    make_world,
    mixed_pool,
    rank,
    rate,
    read_world,
    split_users,
    stream,
    world_labelers,
    write_answer,
    write_world,
)
from fastrlhf.world.judge import GOLD_WEIGHTS
from fastrlhf.world.people import DEMONSTRATION
from fastrlhf.world.tasks import (
    CAREFUL_WEB,
    MAX_ANSWER,
    WEB,
)
from fastrlhf.world.vocabulary import (
    CHAT,
    TASKS,
)

SMALL = WorldSizes(
    pretrain=3_000,
    pretrain_heldout=300,
    probe=100,
    demonstrations=200,
    demonstrations_validation=60,
    prompts_rm=200,
    prompts_ppo=200,
    prompts_validation=80,
    prompts_test=80,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(out, 0, SMALL)
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the tokenizer


def test_tokenizer_round_trip_after_saving(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(VOCABULARY)
    texts = [row["text"] for row in lines(folder / "pretrain.jsonl")]
    for row in lines(folder / "demonstrations.jsonl"):
        texts += [row["prompt"], row["completion"], f"{row['prompt']} {row['completion']}"]
    for row in lines(folder / "probe.jsonl"):
        texts += [row["prompt"], row["answer"]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert ids[0] == 1
        assert len(ids) == 1 + len(text.split()) <= tokenizer.model_max_length - 1
        assert [VOCABULARY[i] for i in ids[1:]] == text.split()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_tokenizer_refuses_foreign_words_and_applies_the_chat_format() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(Exception, match="vocabulary"):  # tokenizers raises a bare Exception
        tokenizer("anna likes pizza")
    instruction = Instruction("reverse", ("tea", "figs"), "thanks")
    asked = [{"role": "user", "content": "reverse tea figs thanks"}]
    templated = tokenizer.apply_chat_template(asked, tokenize=False)
    assert templated == f"<bos> {chat_prompt(instruction)}"
    answered = [*asked, {"role": "assistant", "content": "figs tea thanks"}]
    ids = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=False)
    prompt_ids = tokenizer(chat_prompt(instruction))["input_ids"]
    answer_ids = tokenizer("figs tea thanks", add_special_tokens=False)["input_ids"]
    assert ids == [*prompt_ids, *answer_ids, tokenizer.eos_token_id]


# --- people


def test_users_have_tastes_and_one_side_each() -> None:
    sides = split_users(0)
    names = {side: {user.name for user in users} for side, users in sides.items()}
    assert {side: len(users) for side, users in names.items()} == {
        "train": 280,
        "validation": 60,
        "test": 60,
    }
    assert len(names["train"] | names["validation"] | names["test"]) == 400
    assert split_users(0) == sides
    assert split_users(1) != sides
    user = sides["train"][0]
    asked = instructions(2_000, stream(0, "taste"), [user])
    weights = np.diff([0.0, *user.task_sums]) / user.task_sums[-1]
    for task, share in zip(TASKS, weights, strict=True):
        assert abs(np.mean([i.task == task for i in asked]) - share) < 0.055  # five deviations
    assert {i.user for i in asked} == {user.name}
    with pytest.raises(ValueError, match="users"):
        instructions(1, stream(0, "x"), [])


def test_demonstrations_are_worth_more_than_the_web(world: World) -> None:
    rng = np.random.default_rng(1)
    asked = instructions(1_500, rng, split_users(0)["train"])

    def worth(write) -> float:
        return float(np.mean([judge(world, i, write(i), True).score for i in asked]))

    web = worth(lambda i: write_answer(world, i, WEB, rng))
    careful = worth(lambda i: write_answer(world, i, CAREFUL_WEB, rng))
    labelers = worth(lambda i: demonstration(world, i, rng))
    assert web + 0.3 < careful < labelers - 0.2 < 2.8


def test_labelers(world: World) -> None:
    labelers = world_labelers(0)
    assert [labeler.held_out for labeler in labelers] == [False] * 5 + [True] * 5
    many = np.array([who.weights for seed in range(60) for who in world_labelers(seed)])
    gold = np.array(GOLD_WEIGHTS)
    assert np.allclose(many.mean(0) / gold, 1.0, atol=0.05)
    assert np.allclose(many.std(0) / np.abs(gold), 0.25, atol=0.03)


def exact_labeler() -> Labeler:
    return Labeler("exact", GOLD_WEIGHTS, length_taste=0.0, noise=0.0, held_out=False)


def test_ratings_and_ranks_by_hand(world: World) -> None:
    instruction = Instruction("reverse", ("tea", "figs"), "thanks")
    answers = ["figs tea thanks", "figs tea", "tea figs", "well figs tea thanks", "fool tea figs"]
    outputs = [(tuple(a.split()), True) for a in answers]
    rng = np.random.default_rng(0)
    assert rate(world, exact_labeler(), instruction, outputs, rng) == [6, 5, 3, 6, 2]
    assert rank(world, exact_labeler(), instruction, outputs, rng) == [1, 2, 3, 1, 4]
    wordy = Labeler("wordy", GOLD_WEIGHTS, length_taste=0.5, noise=0.0, held_out=False)
    assert wordy.opinion(world, instruction, answers[0].split(), True) == pytest.approx(2.5)
    assert wordy.opinion(world, instruction, answers[1].split(), False) == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_ranks_follow_ratings_and_copies_tie(seed: int) -> None:
    world = make_world(0)
    ((instruction, outputs),) = mixed_pool(
        world, 1, np.random.default_rng(seed), split_users(0)["test"]
    )
    labeler = world_labelers(seed)[seed % 10]
    doubled = [*outputs, *outputs]
    ratings = rate(world, labeler, instruction, doubled, np.random.default_rng(seed))
    ranks = rank(world, labeler, instruction, doubled, np.random.default_rng(seed))
    assert all(1 <= rating <= 7 for rating in ratings)
    assert ratings[: len(outputs)] == ratings[len(outputs) :]
    assert min(ranks) == 1
    assert set(ranks) == set(range(1, max(ranks) + 1))
    for i, one in enumerate(ratings):
        for j, other in enumerate(ratings):
            assert (one > other) == (ranks[i] < ranks[j])


@pytest.mark.parametrize("habits", [(WEB, CAREFUL_WEB, DEMONSTRATION), (DEMONSTRATION,)])
def test_labelers_agree_as_people_did(habits: tuple[Habits, ...]) -> None:
    noisy, ceiling = [], []
    for seed in (0, 1, 2):
        world = make_world(seed)
        pool = mixed_pool(
            world, 100, stream(seed, "pool"), split_users(seed)["test"], habits=habits
        )
        assert all(4 <= len(outputs) <= 9 for _, outputs in pool)
        labelers = world_labelers(seed)
        noisy.append(agreement(world, labelers, pool, stream(seed, "noise")).rate)
        ceiling.append(agreement(world, labelers, pool, stream(seed, "noise"), noise=0.0).rate)
    assert 0.70 <= np.mean(noisy) <= 0.76, noisy
    assert min(ceiling) > 0.97, ceiling


def test_agreement_of_labelers_who_only_toss_coins_is_a_half() -> None:
    world = make_world(0)
    pool = mixed_pool(world, 80, stream(0, "pool"), split_users(0)["test"])
    deaf = [Labeler(f"{i}", (0.0,) * 5, 0.0, 2.0, False) for i in range(6)]
    result = agreement(world, deaf, pool, stream(0, "noise"))
    assert abs(result.rate - 0.5) < 0.02
    with pytest.raises(ValueError, match="decided"):
        agreement(world, deaf, pool, stream(0, "noise"), noise=0.0)


def comparison_record(answers: list[str], ended: list[bool] | None = None) -> dict:
    instruction = Instruction("sort", ("tea", "figs"), None, "user-009")
    return {
        "prompt": chat_prompt(instruction),
        "user": "user-009",
        "instruction": instruction.to_dict(),
        "completions": answers,
        "ended": [True] * len(answers) if ended is None else ended,
    }


def test_label_drops_copies_and_keeps_k_in_bounds(world: World) -> None:
    different = ["figs tea", "tea figs", "fool figs tea", "well", "tea", "figs", "so", "is", "jam"]
    records = [
        comparison_record(["figs tea"] * 6),  # one different output: dropped
        comparison_record(["figs tea", "tea figs", "well", "figs tea", "well"]),  # three: dropped
        comparison_record(["figs tea", "tea figs", "well", "figs tea", "fool"]),  # four
        comparison_record(["tea", "tea", "figs", "is"], [True, False, True, True]),  # four too
        comparison_record([*different, "milk", "salt"]),  # eleven: the first nine
    ]
    exact = [exact_labeler()]
    four, ends, nine = label(world, records, exact, seed=0)
    stern = [Labeler("stern", (2.0, 1.0, -1.0, -1.0, -2.0), 0.0, 0.0, False)]
    (unended,) = label(world, records[3:4], stern, seed=0)
    assert four["completions"] == ["figs tea", "tea figs", "well", "fool"]
    assert four["ranks"] == [1, 2, 2, 3]
    assert ends["ended"] == [True, False, True, True]
    assert unended["ranks"] == [1, 2, 1, 1]
    assert nine["completions"] == different
    assert {(r["user"], r["labeler"]) for r in (four, ends, nine)} == {("user-009", "exact")}
    people = world_labelers(0)[:5]
    once, again = (list(label(world, records * 20, people, seed=4)) for _ in range(2))
    assert once == again != list(label(world, records * 20, people, seed=5))
    assert {r["labeler"] for r in once} == {who.name for who in people}
    with pytest.raises(ValueError, match="differ in length"):
        list(label(world, [comparison_record(["tea"] * 4, [True])], exact, seed=0))


# --- the written folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_seed_fixes_every_byte(folder: Path, tmp_path: Path) -> None:
    first = digests(folder)
    write_world(tmp_path, 1, SMALL)
    other = digests(tmp_path)
    data = [name for name in first if name.endswith(".jsonl")]
    assert len(data) == 9
    assert all(first[name] != other[name] for name in data)
    write_world(tmp_path, 0, SMALL)
    assert digests(tmp_path) == first


def test_written_sizes_sides_and_fields(folder: Path) -> None:
    rows = {path.stem: lines(path) for path in folder.glob("*.jsonl")}
    for name, read in rows.items():
        assert len(read) == getattr(SMALL, name)
    users = json.loads((folder / "world.json").read_text())["users"]
    sides = {
        "demonstrations": "train",
        "prompts_rm": "train",
        "prompts_ppo": "train",
        "demonstrations_validation": "validation",
        "prompts_validation": "validation",
        "prompts_test": "test",
    }
    for name, side in sides.items():
        for row in rows[name]:
            instruction = Instruction.from_dict(row["instruction"])
            assert row["prompt"] == chat_prompt(instruction)
            assert row["user"] == instruction.user
            assert row["user"] in users[side]
            assert len(row["prompt"].split()) + 1 <= 12
    for name in ("pretrain", "pretrain_heldout"):
        assert all(CHAT not in row["text"].split() for row in rows[name])
    for row in rows["demonstrations"]:
        assert 1 <= len(row["completion"].split()) <= MAX_ANSWER


def test_a_world_reads_back_or_says_why_not(folder: Path, tmp_path: Path) -> None:
    assert read_world(folder) == make_world(0)
    with pytest.raises(FileNotFoundError, match=r"world\.json"):
        read_world(tmp_path)
    saved = json.loads((folder / "world.json").read_text())
    saved["likes"] = dict.fromkeys(saved["likes"], "tea")
    (tmp_path / "world.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="'likes'"):
        read_world(tmp_path)
    with pytest.raises(ValueError, match="prompts_rm"):
        WorldSizes(prompts_rm=0)
