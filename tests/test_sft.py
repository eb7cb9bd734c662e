"""Supervised fine-tuning: the loss, the mix of text, and the choice of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_fixtures import (
    assert_same_bits,
    read_lines,
    sft_config,
    tiny_model,
    weights,
    write_lines,
)

from fastrlhf import sft
from fastrlhf.batching import batch_indices, collate
from fastrlhf.encoding import Recipe, demonstration_examples
from fastrlhf.errors import UserError
from fastrlhf.generation import generate
from fastrlhf.metrics import example_losses, mean_loss, reward_scores
from fastrlhf.models import load_language_model, load_scalar_model
from fastrlhf.records import read_demonstrations
from fastrlhf.tokenizers import load_tokenizer
from fastrlhf.training import OptimizerConfig


def lines_with(out: Path, key: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(out / "metrics.jsonl") if key in line]


def test_the_first_loss_is_that_of_the_first_batch(data: Path, base: Path, tmp_path: Path) -> None:
    sft.run(sft_config(data, base, tmp_path / "run", residual_dropout=0.0, max_tokens=100))
    model, tokenizer = load_language_model(base).eval(), load_tokenizer(base)
    examples = demonstration_examples(
        tokenizer, read_demonstrations(data / "demonstrations.jsonl"), 9
    )
    first = batch_indices([1] * len(examples), 16, 0, 0)[0]
    input_ids, labels = collate([examples[i] for i in first], tokenizer.pad_token_id)
    mask = (torch.arange(input_ids.shape[1]) < (labels != -100).sum(1)[:, None] + 99).long()
    wanted = model.model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    found = lines_with(tmp_path / "run", "loss")
    assert found[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[0]["lr"] == pytest.approx(1e-3)
    assert found[-1]["epoch"] == 2.0


def test_demonstrations_are_learned(data: Path, base: Path, tmp_path: Path) -> None:
    optim = OptimizerConfig(lr=1e-2)
    sft.run(sft_config(data, base, tmp_path / "run", epochs=10, optim=optim, residual_dropout=0.0))
    losses = [line["loss"] for line in lines_with(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 1.0
    validation = [x["validation_loss"] for x in lines_with(tmp_path / "run", "validation_loss")]
    assert len(validation) == 10
    assert validation[-1] < validation[0]
    tokenizer = load_tokenizer(base)
    held = demonstration_examples(
        tokenizer, read_demonstrations(data / "demonstrations_validation.jsonl"), 9
    )
    model = load_language_model(tmp_path / "run" / "model")
    found = mean_loss(model, held, tokenizer.pad_token_id)
    assert found == pytest.approx(validation[-1], rel=1e-5)


def test_dropout_acts_in_training_and_not_in_the_saved_model(
    data: Path, base: Path, tmp_path: Path
) -> None:
    for p in (0.0, 0.2):
        sft.run(sft_config(data, base, tmp_path / str(p), residual_dropout=p, epochs=1))
    without, with_it = (
        [x["loss"] for x in lines_with(tmp_path / str(p), "loss")] for p in (0.0, 0.2)
    )
    assert without[0] != with_it[0]
    model = load_language_model(tmp_path / "0.2" / "model").train()
    ids, labels = torch.tensor([[1, 5, 9]]), torch.tensor([[1, 5, 9]])
    assert torch.equal(model(ids, labels), model(ids, labels))


def test_the_mix_adds_its_share_of_pretraining_text(data: Path, base: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 1, "residual_dropout": 0.0, "batch_size": 24}
    for share in (0.0, 0.25):
        out = tmp_path / str(share)
        mix = {"pretrain_mix": share, "pretrain_documents": Path("pretrain.jsonl")}
        sft.run(sft_config(data, base, out, **changes, **mix))
    plain, mixed = (lines_with(tmp_path / str(share), "loss") for share in (0.0, 0.25))
    # 24 demonstrations and 8 documents a step: a quarter of the sequences.
    model, tokenizer = load_language_model(base), load_tokenizer(base)
    demonstrations = demonstration_examples(
        tokenizer, read_demonstrations(data / "demonstrations.jsonl"), 9
    )
    documents = sft.document_examples(
        tokenizer, sft.read_documents(data / "pretrain.jsonl"), model.context
    )
    batch = [demonstrations[i] for i in batch_indices([1] * 48, 24, 0, 0)[0]]
    batch += [documents[i] for i in sft.cyclic_indices(len(documents), 8, 0, 1)]
    sums, counts = example_losses(model, batch, tokenizer.pad_token_id)
    assert mixed[0]["loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    assert plain[0]["loss"] == pytest.approx(sums[:24].sum() / counts[:24].sum(), rel=1e-5)


def test_the_best_epoch_by_validation_loss_becomes_the_model(
    data: Path, base: Path, tmp_path: Path
) -> None:
    # A learning rate that overfits within the first epochs.
    out = tmp_path / "run"
    optim = OptimizerConfig(lr=0.05, schedule="constant")
    sft.run(sft_config(data, base, out, epochs=6, select="loss", keep_epochs=True, optim=optim))
    measured = [line["validation_loss"] for line in lines_with(out, "validation_loss")]
    best = int(np.argmin(measured)) + 1
    assert best < 6, measured
    assert_same_bits(out / "model", out / "epochs" / f"epoch-{best:02d}")
    assert not torch.equal(
        weights(out / "model")["lm_head.weight"],
        weights(out / "epochs" / "epoch-06")["lm_head.weight"],
    )


def test_the_best_epoch_by_reward_becomes_the_model(
    data: Path, base: Path, judge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sft.run(
        sft_config(
            data, base, out, epochs=4, select="reward", reward_model=judge, keep_epochs=True,
            optim=OptimizerConfig(lr=0.02, schedule="constant"),
        )
    )  # fmt: skip
    scores = [line["reward_score"] for line in lines_with(out, "reward_score")]
    assert len(set(scores)) == 4
    best = int(np.argmax(scores)) + 1
    assert_same_bits(out / "model", out / "epochs" / f"epoch-{best:02d}")
    # The score is the reward model's mean on samples for the validation prompts.
    tokenizer = load_tokenizer(base)
    examples = demonstration_examples(
        tokenizer, read_demonstrations(data / "demonstrations_validation.jsonl"), 9
    )
    prompts = [list(e.tokens[: e.start]) for e in examples]
    answers = generate(
        load_language_model(out / "epochs" / "epoch-02"),
        prompts,
        max_new_tokens=9,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seeds=range(len(prompts)),
    )
    whole = [
        p + t[:n]
        for p, t, n in zip(prompts, answers.tokens.tolist(), answers.lengths.tolist(), strict=True)
    ]
    mean = reward_scores(load_scalar_model(judge), whole, tokenizer.pad_token_id).mean()
    assert scores[1] == pytest.approx(mean.item(), rel=1e-5)


def test_validation_may_be_held_out_of_the_file_by_user(
    data: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = Recipe(heldout=0.4, split_seed=1)
    sft.run(sft_config(data, base, out, validation=None, recipe=recipe, epochs=1, batch_size=4))
    tokenizer = load_tokenizer(base)
    path = data / "demonstrations.jsonl"
    train, held = recipe.apply(read_demonstrations(path), tokenizer, path, 99)
    assert train
    assert held
    assert len(lines_with(out, "loss")) == len(train) // 4
    found = mean_loss(
        load_language_model(out / "model"),
        demonstration_examples(tokenizer, held, 9),
        tokenizer.pad_token_id,
    )
    assert lines_with(out, "validation_loss")[-1]["validation_loss"] == pytest.approx(found)


def test_what_cannot_work_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    for changes, field in (
        ({"epochs": 0}, "epochs"),
        ({"pretrain_mix": 1.0}, "pretrain_mix"),
        ({"pretrain_mix": 0.1}, "pretrain_documents"),
        ({"select": "reward"}, "reward_model"),
    ):
        with pytest.raises(UserError, match=f"field '{field}'"):
            sft_config(data, base, tmp_path / "run", **changes)
    with pytest.raises(UserError, match="field 'select': loss needs validation demonstrations"):
        sft.run(sft_config(data, base, tmp_path / "a", validation=None, select="loss"))
    email = [{"prompt": "anna likes", "completion": "a@b.org"}]
    write_lines(tmp_path / "private.jsonl", email)
    with pytest.raises(UserError, match=r"private\.jsonl: no demonstration is left to train on"):
        sft.run(
            sft_config(
                data, base, tmp_path / "b", demonstrations=tmp_path / "private.jsonl",
                recipe=Recipe(drop_personal_data=True),
            )
        )  # fmt: skip


def test_gpt2_models_are_trained_too(data: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(kind="gpt2", tie_embeddings=True)
    model.save(tmp_path / "gpt2", tokenizer)
    optim = OptimizerConfig(lr=1e-2)
    sft.run(sft_config(data, tmp_path / "gpt2", tmp_path / "run", epochs=4, optim=optim))
    losses = [line["loss"] for line in lines_with(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 0.3
