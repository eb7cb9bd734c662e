"""Measure one seed's models: what the claims are judged by.

Answers are judged by the hidden rule, which no labeler or model has seen, on prompts of users that
no stage has seen. ``arrays.npz`` holds one number a prompt, document or quiz, so that claims pool
seeds over independent units; ``results.json`` the rest.

    gold/NAME                       per test prompt: the hidden rule's score, mean of samples
    task/, constraint/, invented/, rude/NAME   its parts, likewise
    score/NAME                      per test prompt: the reward model's score, mean of samples
    wins/NAME                       per test prompt: share of wins against SFT, a tie counts half
    loss/NAME, tokens               per held-out document: summed loss in nats, tokens
    probe/NAME                      per quiz: probability of the right last answer
    right/RM/SET, pairs/RM/SET      per validation prompt: pairs ordered rightly, pairs decided
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastrlhf import world
from fastrlhf.batching import Example
from fastrlhf.demo.miniature import SeedRun
from fastrlhf.demo.writers import (
    MAX_RESPONSE,
    Answer,
    answers,
    instructions_of,
    read_jsonl,
)
from fastrlhf.encoding import (
    completion_ids,
    demonstration_examples,
    document_examples,
    text_prompt_ids,
)
from fastrlhf.metrics import example_losses, reward_scores
from fastrlhf.models import LanguageModel, load_language_model, load_scalar_model, parameter_count
from fastrlhf.ranked import pair_outcomes, ranked_groups
from fastrlhf.records import read_comparisons, read_demonstrations, read_documents
from fastrlhf.runlog import progress
from fastrlhf.tokenizers import load_tokenizer

SAMPLES = 4  # responses to each test prompt
SHOWN = 12  # test prompts whose answers the report shows side by side
SHOWN_MODELS = ("base", "sft", "ppo", "ppo-ptx")
TEXT_MODELS = ("base", "sft", "start", "ppo", "ppo-ptx")  # the long demo adds its variants

Arrays = dict[str, np.ndarray]


def examine(run: SeedRun) -> Path:
    """Measure everything and write arrays.npz and results.json."""
    made = world.read_world(run.data)
    policies = run.policies()
    tokenizer = load_tokenizer(policies["base"])
    texts = [
        *TEXT_MODELS,
        *(name for name in policies if name.startswith(("ppo-beta", "ppo-gamma"))),
    ]
    arrays: Arrays = {}
    total = len(policies) + 1 + len(texts)
    with progress("examination", total, "model") as bar:
        shown = judge_answers(run, made, tokenizer, policies, arrays, bar.advance)
        for name in texts:
            read_texts(run, tokenizer, load_language_model(policies[name]), name, arrays)
            bar.advance()
    if run.full:
        long_sft(run, tokenizer, arrays)
    results = {
        "seed": run.seed,
        "parameters": {
            name: parameter_count(load_language_model(path)) for name, path in policies.items()
        },
        "reward_models": reward_models(run, made, tokenizer, arrays),
        "flop": {stage.name: flop for stage in sorted(run.out.iterdir()) if (flop := _flop(stage))},
        "shown": shown,
    }
    with (run.out / "arrays.npz.partial").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    (run.out / "arrays.npz.partial").replace(run.out / "arrays.npz")
    path = run.out / "results.json"
    staging = path.with_suffix(".partial")
    staging.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    staging.replace(path)
    return path


def judge_answers(
    run: SeedRun,
    made: world.World,
    tokenizer: PreTrainedTokenizerBase,
    policies: Mapping[str, Path],
    arrays: Arrays,
    advance: Any,
) -> list[dict[str, Any]]:
    """Judge samples of every policy; returns a few prompts with their answers."""
    asked = instructions_of(read_jsonl(run.data / "prompts_test.jsonl"))
    with_answer = [world.has_answer(made, instruction) for instruction in asked]
    arrays["has_answer"] = np.array(with_answer)
    arrays["constrained"] = np.array([i.constraint is not None for i in asked])
    reward = load_scalar_model(run.model("rm"))
    chat = text_prompt_ids(tokenizer, [world.chat_prompt(instruction) for instruction in asked])
    judged: dict[str, np.ndarray] = {}
    first: dict[str, list[Answer]] = {}
    for name, path in [*policies.items(), ("prompted", policies["base"])]:
        model = load_language_model(path)
        form = world.chat_prompt
        if name == "prompted":
            form = world.careful_prompt
        elif name.endswith("base"):
            form = world.plain_prompt
        prompts = [form(instruction) for instruction in asked]
        verdicts: list[list[world.Verdict]] = []
        scores = np.zeros(len(asked))
        for sample in range(SAMPLES):
            # Other draws for every model: equal ones would tie their answers together.
            drawn = answers(model, tokenizer, prompts, ("examine", run.seed, name, sample))
            first.setdefault(name, drawn)
            said = completion_ids(tokenizer, [" ".join(a.words) for a in drawn], MAX_RESPONSE)
            whole = [p + a for p, a in zip(chat, said, strict=True)]
            scores += reward_scores(reward, whole, tokenizer.pad_token_id).double().numpy()
            verdicts.append(
                [
                    world.judge(made, instruction, answer.words, answer.ended)
                    for instruction, answer in zip(asked, drawn, strict=True)
                ]
            )
        judged[name] = np.array([[v.score for v in row] for row in verdicts], dtype=np.float64)
        arrays[f"score/{name}"] = scores / SAMPLES
        arrays[f"gold/{name}"] = judged[name].mean(0)
        for habit in ("task", "constraint", "invented", "rude"):
            found = [[getattr(v, habit) for v in row] for row in verdicts]
            arrays[f"{habit}/{name}"] = np.array(found, dtype=np.float64).mean(0)
        advance()
    for name, gold in judged.items():
        if name != "sft":
            arrays[f"wins/{name}"] = win_rates(gold, judged["sft"])
    # Every kind of task, in the order of the file: no picking.
    chosen = _spread([i.task for i in asked], SHOWN)
    return [
        {
            "prompt": world.plain_prompt(asked[i]),
            "right": " ".join(world.right_answer(made, asked[i])),
            "answers": {
                name: {
                    "text": " ".join(first[name][i].words),
                    "score": float(judged[name][0, i]),
                }
                for name in SHOWN_MODELS
            },
        }
        for i in chosen
    ]


def win_rates(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(n,) share of wins of (S, n) scores over (S', n) scores, all samples paired, ties a half."""
    return ((np.sign(mine[:, None] - theirs[None, :]) + 1.0) / 2.0).mean((0, 1))


def read_texts(
    run: SeedRun,
    tokenizer: PreTrainedTokenizerBase,
    model: LanguageModel,
    name: str,
    arrays: Arrays,
) -> None:
    """Loss on held-out documents, and the probability of right answers to held-out quizzes."""
    pad_id = tokenizer.pad_token_id
    documents = read_documents(run.data / "pretrain_heldout.jsonl")
    losses, tokens = example_losses(
        model, document_examples(tokenizer, documents, model.context), pad_id
    )
    arrays[f"loss/{name}"], arrays["tokens"] = losses, tokens
    arrays["kind"] = np.array([document.kind for document in documents])
    quizzes = read_jsonl(run.data / "probe.jsonl")
    prompts = text_prompt_ids(tokenizer, [quiz["prompt"] for quiz in quizzes])
    wanted = tokenizer([quiz["answer"] for quiz in quizzes], add_special_tokens=False)["input_ids"]
    examples = [Example((*p, *a), len(p)) for p, a in zip(prompts, wanted, strict=True)]
    arrays[f"probe/{name}"] = np.exp(-example_losses(model, examples, pad_id)[0])
    arrays["probe_task"] = np.array([quiz["task"] for quiz in quizzes])


def long_sft(run: SeedRun, tokenizer: PreTrainedTokenizerBase, arrays: Arrays) -> None:
    """The long SFT's best epoch by validation loss and its last one: loss and reward score.

    sft-16/loss/EPOCH and sft-16/tokens per validation demonstration; sft-16/score/EPOCH per test
    prompt, mean of samples; EPOCH is "best" or "last".
    """
    rows = [r for r in read_jsonl(run.out / "sft-16" / "metrics.jsonl") if "validation_loss" in r]
    best = int(np.argmin([row["validation_loss"] for row in rows])) + 1
    items = read_demonstrations(run.data / "demonstrations_validation.jsonl")
    examples = demonstration_examples(tokenizer, items, MAX_RESPONSE)
    asked = instructions_of(read_jsonl(run.data / "prompts_test.jsonl"))
    prompts = [world.chat_prompt(instruction) for instruction in asked]
    chat = text_prompt_ids(tokenizer, prompts)
    reward = load_scalar_model(run.model("rm"))
    pad_id = tokenizer.pad_token_id
    for label, epoch in (("best", best), ("last", len(rows))):
        model = load_language_model(run.out / "sft-16" / "epochs" / f"epoch-{epoch:02d}")
        losses, tokens = example_losses(model, examples, pad_id)
        arrays[f"sft-16/loss/{label}"], arrays["sft-16/tokens"] = losses, tokens
        scores = np.zeros(len(asked))
        for sample in range(SAMPLES):
            drawn = answers(model, tokenizer, prompts, ("sft-16", run.seed, label, sample))
            said = completion_ids(tokenizer, [" ".join(a.words) for a in drawn], MAX_RESPONSE)
            whole = [p + a for p, a in zip(chat, said, strict=True)]
            scores += reward_scores(reward, whole, pad_id).double().numpy()
        arrays[f"sft-16/score/{label}"] = scores / SAMPLES


def reward_models(
    run: SeedRun, made: world.World, tokenizer: PreTrainedTokenizerBase, arrays: Arrays
) -> dict[str, Any]:
    """Accuracy of the reward models, agreement of the labelers, mean score of demonstrations."""
    pad_id = tokenizer.pad_token_id
    main = load_scalar_model(run.model("rm"))
    sets = {"own": "validation", "others": "heldout", "rule": "gold"}
    for label, file in sets.items():
        groups = ranked_groups(
            tokenizer, read_comparisons(run.data / f"comparisons_{file}.jsonl"), MAX_RESPONSE
        )
        flat = [sequence for group in groups for sequence in group.sequences]
        for name in ("rm", "rm-kwise", "rm-shuffled"):
            model = main if name == "rm" else load_scalar_model(run.model(name))
            scores, place = reward_scores(model, flat, pad_id), 0
            right, pairs = [], []
            for group in groups:
                outcomes = pair_outcomes(scores[place : place + len(group.ranks)], group.ranks)
                place += len(group.ranks)
                right.append(sum(outcomes))
                pairs.append(len(outcomes))
            arrays[f"right/{name}/{label}"] = np.array(right, dtype=np.float64)
            arrays[f"pairs/{name}/{label}"] = np.array(pairs, dtype=np.float64)
    records = read_jsonl(run.data / "comparisons_validation.jsonl")
    pool = [
        (
            instruction,
            [(tuple(c.split()), e) for c, e in zip(r["completions"], r["ended"], strict=True)],
        )
        for r, instruction in zip(records, instructions_of(records), strict=True)
    ]
    labelers = world.world_labelers(run.seed)
    agreement = world.agreement(made, labelers, pool, world.stream(run.seed, "agreement"))
    means = {}
    for file in ("demonstrations", "demonstrations_validation"):
        items = read_demonstrations(run.data / f"{file}.jsonl")
        examples = demonstration_examples(tokenizer, items, MAX_RESPONSE)
        means[file] = float(reward_scores(main, [e.tokens for e in examples], pad_id).mean())
    return {
        "agreement": agreement.rate,
        "agreement_pairs": agreement.pairs,
        "prompts": len(records),
        "mean_k": float(np.mean([len(r["ranks"]) for r in records])),
        "mean_score": means,
    }


def _flop(stage: Path) -> float | None:
    """Work of a stage, from the last line of its log."""
    log = stage / "metrics.jsonl"
    return float(read_jsonl(log)[-1]["flop"]) if log.is_file() else None


def _spread(kinds: Sequence[str], n: int) -> list[int]:
    """The first prompts of each kind in turn, n in all, in the order of the file."""
    seen: dict[str, int] = {}
    order = []
    for index, kind in enumerate(kinds):
        order.append((seen.get(kind, 0), index))
        seen[kind] = seen.get(kind, 0) + 1
    return sorted(index for _, index in sorted(order)[:n])
