"""The step that the stages share: gradients, schedule, clipping, checkpoints, several processes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from trainer_fixtures import (
    FAST,
    assert_same_bits,
    flat,
    pretrain_config,
    read_lines,
    sft_config,
    tiny_model,
    weights,
)

from fastrlhf import pretrain, sft
from fastrlhf.batching import Example, collate, micro_batches
from fastrlhf.errors import NonFiniteLoss, UserError
from fastrlhf.pretrain import PretrainConfig
from fastrlhf.training import (
    KEEP_CHECKPOINTS,
    OptimizerConfig,
    Session,
    StageConfig,
    accumulate,
    make_optimizer,
    matmul_parameters,
    repeatable,
    replace_folder,
    saved_checkpoints,
    session,
)


def config(out: Path, **changes: Any) -> StageConfig:
    """Some stage's config; what is tested here is what all of them share."""
    return PretrainConfig(**(FAST | changes), out=out, tokenizer=Path("t"), documents=Path("d"))


# --- the optimiser and its schedule


def test_the_cosine_ends_at_its_final_fraction() -> None:
    optim = OptimizerConfig(lr=2.0, final_fraction=0.1)
    values = [optim.lr_at(step, 100) for step in range(101)]
    assert values[0] == 2.0
    assert values[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert values[25] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert values[100] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(values))
    assert optim.lr_at(150, 100) == pytest.approx(0.2)


def test_the_warm_up_of_the_paper_goes_from_a_tenth_over_ten_iterations() -> None:
    optim = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=10, warmup_from=0.1)
    values = [optim.lr_at(step, 500) for step in range(12)]
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


@given(warmup=st.integers(1, 20), total=st.integers(1, 60))
def test_a_warm_up_from_nothing_never_wastes_a_step(warmup: int, total: int) -> None:
    optim = OptimizerConfig(lr=3.0, warmup_steps=warmup)
    for step in range(warmup):
        assert optim.lr_at(step, total) == pytest.approx(3.0 * (step + 1) / warmup)
    assert optim.lr_at(warmup, max(total, warmup + 1)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 0.0}, "lr"),
        ({"eps": 0.0}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_bad_optimisers_name_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"field '{field}'"):
        OptimizerConfig(**changes)


@pytest.mark.parametrize("field", ["seed", "max_tokens", "save_every"])
def test_bad_stages_name_the_field(field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"field '{field}'"):
        config(tmp_path, **{field: -1})


def test_weight_decay_acts_on_matrices_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.2)).step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.9 if p.ndim == 2 else 1.0))


def test_a_step_is_adams_with_the_papers_betas(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    start = float(model.weight.detach())
    with session(config(tmp_path / "run"), "test") as s:
        model, optimizer = s.prepare(model, make_optimizer(model, OptimizerConfig()))
        m = v = 0.0
        weight = start
        for number, (gradient, lr) in enumerate([(0.3, 0.1), (-0.7, 0.05)], start=1):
            model.weight.grad = torch.tensor([[gradient]], device=s.device)
            norm = s.step(number, model, optimizer, lr, 0.0, loss=1.0)
            assert norm == pytest.approx(abs(gradient))
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
            update = m / (1 - 0.9**number) / ((v / (1 - 0.95**number)) ** 0.5 + 1e-8)
            weight -= lr * update
            assert float(model.weight.detach()) == pytest.approx(weight, rel=1e-5)
            assert model.weight.grad is None


# --- gradients


def _examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in (5, 17, 9, 2, 30, 12, 12):
        tokens = torch.randint(3, 160, (n,), generator=generator).tolist()
        examples.append(Example(tuple(tokens), start=min(2, n - 1)))
    return examples


@pytest.mark.parametrize("max_tokens", [1, 30, 40])
def test_micro_batches_add_up_to_the_whole_batch(max_tokens: int, tmp_path: Path) -> None:
    model, _ = tiny_model()
    examples = _examples()
    count = sum(e.targets for e in examples)

    def gradient(limit: int) -> tuple[float, Tensor]:
        with session(config(tmp_path / str(limit)), "test") as s:
            losses = [
                lambda ids=ids, labels=labels: model(ids, labels, loss_normalizer=count)
                for _, ids, labels in micro_batches(examples, limit, 0)
            ]
            assert limit == 10_000 or len(losses) > 2
            model.zero_grad()
            loss = accumulate(s, model, losses)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, found = gradient(max_tokens)
    whole, wanted = gradient(10_000)
    assert loss == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)
    # And both are the mean over tokens of transformers' own losses.
    ids, labels = collate(examples, 0)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(e.tokens)] for e in examples])
    theirs = model.model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    assert whole == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_clipping_scales_the_gradient_and_reports_its_norm(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    moved = {}
    for limit in (0.0, 1.0, 100.0):
        with torch.no_grad():
            model.weight.zero_()
        with session(config(tmp_path / str(limit)), "test") as s:
            sgd = torch.optim.SGD(model.parameters(), lr=0.0)
            bare, optimizer = s.prepare(model, sgd)
            bare.weight.grad = torch.tensor([[3.0, 4.0]], device=s.device)
            assert s.step(1, bare, optimizer, 1.0, limit, loss=1.0) == pytest.approx(5.0)
            moved[limit] = s.unwrap(bare).weight.detach().clone().cpu()
    torch.testing.assert_close(moved[0.0], torch.tensor([[-3.0, -4.0]]))
    torch.testing.assert_close(moved[100.0], moved[0.0])
    torch.testing.assert_close(moved[1.0], torch.tensor([[-0.6, -0.8]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_spoils_nothing(where: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with session(config(tmp_path / "run"), "sft") as s:
        model, optimizer = s.prepare(model, make_optimizer(model, OptimizerConfig()))
        s.restore()
        s.save(6)
        before = flat(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, math.inf if where == "gradient" else 1.0)
        loss = math.nan if where == "loss" else 1.0
        kept = tmp_path / "run" / "checkpoints" / "step-0000006"
        with pytest.raises(NonFiniteLoss, match=rf"sft: step 9: loss .*; last good .*: {kept}"):
            s.step(9, model, optimizer, 0.1, 1.0, loss)
        assert torch.equal(flat(model), before)
    assert saved_checkpoints(kept.parent) == [kept]


def test_a_run_that_diverges_ends_by_name_with_its_checkpoint(data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 8, "save_every": 1, "heldout": None}
    optim = OptimizerConfig(lr=1e30, schedule="constant")
    with pytest.raises(NonFiniteLoss, match=r"pretrain: step [2-8]: .*checkpoints/step-000000\d"):
        pretrain.run(pretrain_config(data, tmp_path / "run", optim=optim, **changes))
    assert saved_checkpoints(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "model").exists()
    model, tokenizer = tiny_model()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    model.save(tmp_path / "nan", tokenizer)
    with pytest.raises(NonFiniteLoss, match=r"step 1: .* none yet"):
        sft.run(sft_config(data, tmp_path / "nan", tmp_path / "sft"))


# --- checkpoints


def _save(out: Path, steps: list[int], value: float, **changes: Any) -> None:
    """Save checkpoints of one number."""
    model = nn.Linear(1, 1, bias=False)
    with session(config(out, **changes), "test") as s:
        model, _ = s.prepare(model, make_optimizer(model, OptimizerConfig()))
        s.restore()
        for step in steps:
            with torch.no_grad():
                model.weight.fill_(value + step)
            s.save(step)


def _restored(out: Path) -> tuple[int, float]:
    model = nn.Linear(1, 1, bias=False)
    with session(config(out, resume=True), "test") as s:
        model, _ = s.prepare(model, make_optimizer(model, OptimizerConfig()))
        return s.restore(), float(s.unwrap(model).weight.detach())


def test_the_last_whole_checkpoint_is_restored(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _save(out, [1, 2, 10], 100.0)
    names = [p.name for p in saved_checkpoints(out / "checkpoints")]
    assert names == ["step-0000002", "step-0000010"]
    assert len(names) == KEEP_CHECKPOINTS
    assert _restored(out) == (10, 110.0)


def test_an_interrupted_checkpoint_does_not_count(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _save(out, [1], 100.0)
    # What a kill while step 2 was written leaves: some of the files under the interim name.
    partial = out / "checkpoints" / "step-0000002.partial"
    partial.mkdir()
    whole = out / "checkpoints" / "step-0000001"
    file = sorted(whole.iterdir())[0]
    (partial / file.name).write_bytes(file.read_bytes()[:20])
    assert saved_checkpoints(out / "checkpoints") == [whole]
    assert _restored(out) == (1, 101.0)
    _save(out, [2], 200.0, resume=True)
    assert _restored(out) == (2, 202.0)
    assert not partial.exists()


def test_nothing_to_resume_is_a_fresh_start(tmp_path: Path) -> None:
    assert _restored(tmp_path / "run")[0] == 0


def test_a_folder_with_a_run_is_not_overwritten(data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _save(out, [1], 0.0)
    with pytest.raises(UserError, match="run: holds a run already; add --resume to go on"):
        Session(config(out), "test")
    # Nor is one whose checkpoints were cleared away to save room.
    finished = tmp_path / "finished"
    shutil.copytree(base, finished / "model")
    with pytest.raises(UserError, match="finished: holds a run already"):
        pretrain.run(pretrain_config(data, finished))
    assert_same_bits(base, finished / "model")


def test_a_finished_run_is_left_as_it_is(data: Path, base: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in base.parent.rglob("*")}
    assert pretrain.run(pretrain_config(data, base.parent, resume=True)) == base
    assert {p: p.stat().st_mtime_ns for p in base.parent.rglob("*")} == before


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replace_folder(target) as staging:
        (staging / "a").write_text("one")

    def run_out_of_room() -> None:
        with replace_folder(target) as staging:
            (staging / "a").write_text("two")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        run_out_of_room()
    assert (target / "a").read_text() == "one"
    with replace_folder(target) as staging:
        assert not list(staging.iterdir())
        (staging / "b").write_text("three")
    assert [p.name for p in target.iterdir()] == ["b"]


def test_checkpoints_are_due_as_asked_and_at_the_end(tmp_path: Path) -> None:
    with session(config(tmp_path / "a", save_every=4), "test") as s:
        assert [n for n in range(1, 11) if s.due(n, 10)] == [4, 8, 10]
    with session(config(tmp_path / "b"), "test") as s:
        assert [n for n in range(1, 11) if s.due(n, 10)] == [10]


def test_a_gpu_repeats_its_bits_in_a_session_alone(tmp_path: Path) -> None:
    def modes() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before, strict = modes(), (True, False, False)
    assert not before[0]
    for deterministic in (True, False):
        changed = config(tmp_path / str(deterministic), deterministic=deterministic)
        with session(changed, "test") as s:
            assert modes() == (strict if deterministic and s.device.type == "cuda" else before)
        assert modes() == before
    with repeatable(torch.device("cuda")):  # which needs none
        assert modes() == strict
    assert modes() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_stages_of_one_process_may_differ_in_precision(tmp_path: Path) -> None:
    for precision, wanted in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        with session(config(tmp_path / "x", precision=precision), "test") as s:
            assert s.accelerator.mixed_precision == wanted


def test_training_in_bf16_comes_near_fp32(data: Path, base: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        sft.run(sft_config(data, base, out, precision=precision, residual_dropout=0.0))
        losses[precision] = [r["loss"] for r in read_lines(out / "metrics.jsonl") if "loss" in r]
        assert {t.dtype for t in weights(out / "model").values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)
    assert losses["bf16"] != losses["fp32"]


# --- accounting


def test_work_is_counted_by_matrices_and_tokens(tmp_path: Path) -> None:
    free, _ = tiny_model(width=16, layers=2, mlp=32)
    tied, _ = tiny_model(width=16, layers=2, mlp=32, tie_embeddings=True)
    vocabulary = free.model.config.vocab_size
    by_hand = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 16 * vocabulary
    assert matmul_parameters(free) == matmul_parameters(tied) == by_hand
    with session(config(tmp_path / "run"), "test") as s:
        s.spend(free, 10, backward=True)
        s.spend(free, 7, backward=False)
        assert s.progress.extra["flop"] == by_hand * (60 + 14)


# --- several processes

_WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from trainer_fixtures import pretrain_config, rm_config
from fastrlhf.errors import UserError
from fastrlhf import ppo, pretrain, reward
from fastrlhf.training import OptimizerConfig
data, out, start, judge = map(Path, sys.argv[2:6])
pretrain.run(pretrain_config(data, out / "base"))
reward.run(rm_config(data, start, out / "rm"))
optim = OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant")
ppo.run(ppo.PPOConfig(
    data=data, out=out / "ppo", model=start, reward_model=judge, prompts=Path("prompts_ppo.jsonl"),
    pretrain_documents=Path("pretrain.jsonl"), ptx_coef=0.5, ptx_ratio=1.0, iterations=2,
    batch_size=8, minibatch_size=8, max_response=9, optim=optim, value_optim=optim,
    precision="fp32", tensorboard=False))
if "WORLD_SIZE" in os.environ:
    for changes in ({"batch_size": 1}, {"batch_size": 2, "minibatch_size": 1}):
        try:
            if len(changes) == 1:
                reward.run(rm_config(data, start, out / "bad", **changes))
            else:
                ppo.run(ppo.PPOConfig(data=data, out=out / "worse", model=start, ptx_coef=0.0,
                    prompts=Path("prompts_ppo.jsonl"), reward_model=judge, **changes))
        except UserError as error:
            print(f"refused: {error}", flush=True)
"""


def test_two_processes_train_as_one_does(
    data: Path, start: Path, judge: Path, tmp_path: Path
) -> None:
    def run(name: str, launcher: list[str]) -> tuple[Path, str]:
        out = tmp_path / name
        (tmp_path / "worker.py").write_text(_WORKER)
        arguments = [Path(__file__).parent, data, out, start, judge]
        done = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "worker.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return out, done.stdout

    one, _ = run("one", [])
    two, said = run("two", ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"])
    for stage in ("base", "rm", "ppo"):
        left, right = weights(one / stage / "model"), weights(two / stage / "model")
        for name, value in left.items():
            # Equal but for the order of sums, which Adam's first steps enlarge.
            torch.testing.assert_close(right[name], value, atol=2e-5, rtol=0, msg=f"{stage} {name}")
        lines = [read_lines(folder / stage / "metrics.jsonl") for folder in (one, two)]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
        for a, b in zip(*lines, strict=True):
            for key in a.keys() & {"loss", "score", "kl", "flop", "heldout_loss", "ptx_loss"}:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), (stage, key)
    # Batches that would leave a process without work, and so the others waiting, are refused.
    assert said.count("refused: a batch of 1 cannot be shared by 2 processes") == 2
    assert said.count("field 'minibatch_size': must be a multiple of the 2 processes, got 1") == 2
