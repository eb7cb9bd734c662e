"""What the trainer's tests share: a tiny world, tiny checkpoints of each stage, and helpers.

Everything is real: models are trained by the stages themselves, for a few steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf import pretrain, reward, sft
from fastrlhf.models import LanguageModel, ModelShape, new_language_model
from fastrlhf.ppo import PPOConfig
from fastrlhf.pretrain import PretrainConfig
from fastrlhf.reward import RewardConfig
from fastrlhf.sft import SFTConfig
from fastrlhf.training import OptimizerConfig
from fastrlhf.world import WorldSizes, build_tokenizer, write_world

CONTEXT = 48
MAX_RESPONSE = 9
TINY = ModelShape(width=16, layers=1, heads=2, mlp=32, context=CONTEXT)
SIZES = WorldSizes(
    pretrain=300,
    pretrain_heldout=20,
    probe=5,
    demonstrations=48,
    demonstrations_validation=12,
    prompts_rm=40,
    prompts_ppo=40,
    prompts_validation=12,
    prompts_test=12,
    users=20,
)
FAST: dict[str, Any] = {"precision": "fp32", "tensorboard": False}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder."""
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: Path, two: Path) -> None:
    """Two Hugging Face folders hold the same weights, bit for bit."""
    left, right = weights(one), weights(two)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def tiny_model(seed: int = 0, **shape: Any) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """A random language model over the world's vocabulary, in evaluation mode."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    options = {"width": 16, "layers": 2, "heads": 2, "mlp": 32, "context": CONTEXT} | shape
    return new_language_model(ModelShape(**options), tokenizer).eval(), tokenizer


def flat(model: torch.nn.Module) -> Tensor:
    """All parameters in one vector, copied."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def pretrain_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    defaults: dict[str, Any] = {
        "tokenizer": Path("tokenizer"),
        "documents": Path("pretrain.jsonl"),
        "heldout": Path("pretrain_heldout.jsonl"),
        "model": TINY,
        "steps": 6,
        "batch_size": 16,
        "eval_every": 3,
    }
    return PretrainConfig(**(defaults | FAST | changes), data=data, out=out)


def sft_config(data: Path, model: Path, out: Path, **changes: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "validation": Path("demonstrations_validation.jsonl"),
        "epochs": 2,
        "batch_size": 16,
        "max_response": MAX_RESPONSE,
        "optim": OptimizerConfig(lr=1e-3),
    }
    return SFTConfig(**(defaults | FAST | changes), data=data, model=model, out=out)


def rm_config(data: Path, model: Path, out: Path, **changes: Any) -> RewardConfig:
    defaults: dict[str, Any] = {
        "batch_size": 8,
        "max_response": MAX_RESPONSE,
        "optim": OptimizerConfig(lr=1e-3),
    }
    return RewardConfig(**(defaults | FAST | changes), data=data, model=model, out=out)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's files, and rankings in which the shorter answer is the better one."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=0, sizes=SIZES)
    answers = [line["completion"] for line in read_lines(folder / "demonstrations.jsonl")]
    comparisons = []
    for index, line in enumerate(read_lines(folder / "prompts_rm.jsonl")):
        texts = [answers[(index + k) % len(answers)] for k in range(2 + index % 4)]
        ranks = [len(text.split()) for text in texts]
        if len(set(ranks)) == 1:
            texts[0], ranks[0] = " ".join([texts[0]] * 2), ranks[0] * 2
        comparisons.append(
            {"prompt": line["prompt"], "user": line["user"], "completions": texts, "ranks": ranks}
        )
    write_lines(folder / "comparisons.jsonl", comparisons)
    return folder


@pytest.fixture(scope="session")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model after a few steps of pretraining."""
    return pretrain.run(pretrain_config(data, tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def start(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT model."""
    return sft.run(sft_config(data, base, tmp_path_factory.mktemp("sft")))


@pytest.fixture(scope="session")
def judge(data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model."""
    return reward.run(rm_config(data, start, tmp_path_factory.mktemp("rm")))


def ppo_config(data: Path, model: Path, judge: Path, out: Path, **changes: Any) -> PPOConfig:
    optim = OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant")
    defaults: dict[str, Any] = {
        "prompts": Path("prompts_ppo.jsonl"),
        "pretrain_documents": Path("pretrain.jsonl"),
        "ptx_coef": 0.0,
        "ptx_ratio": 1.0,
        "iterations": 2,
        "batch_size": 8,
        "minibatch_size": 8,
        "max_response": MAX_RESPONSE,
        "ema": 0.0,
        "optim": optim,
        "value_optim": optim,
    }
    return PPOConfig(
        **(defaults | FAST | changes), data=data, model=model, reward_model=judge, out=out
    )
