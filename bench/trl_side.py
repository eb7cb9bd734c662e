"""TRL's trainers on the cases of bench_ppo.py and bench_sft.py, in an environment with TRL.

    python bench/trl_side.py ppo CASE.json RESULT.json      # with trl 1.12, the last that has PPO
    python bench/trl_side.py sft CASE.json RESULT.json

beside.py starts it; it needs trl and what trl brings, and nothing of this project. CASE names a
model's folder and says what is trained; RESULT gets seconds and bytes.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import resident
import torch
import transformers
import trl

Calls = list[tuple[float, float]]  # start and length, in seconds


def timed(call: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    """The function, with start and length of each call noted."""

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        calls.append((began, time.perf_counter() - began))
        return result

    return run


def ppo(case: dict[str, Any]) -> dict[str, Any]:
    """Iterations of PPOTrainer: when each phase began and how long it took."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(case["model"], padding_side="left")
    before = resident.resident()
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
        for _ in range(2)
    )
    reward, value = (
        transformers.AutoModelForSequenceClassification.from_pretrained(
            case["model"], num_labels=1, dtype=torch.float32
        )
        for _ in range(2)
    )
    models = (policy, reference, reward, value)
    weights = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
    calls: dict[str, Calls] = {}
    for phase, name in (("sample", "batch_generation"), ("scalars", "get_reward")):
        calls[phase] = []
        setattr(ppo_trainer, name, timed(getattr(ppo_trainer, name), calls[phase]))
    # `forward` is the reference's pass when nothing requires gradients, else the updates'.
    calls["log-probs"] = []
    forward, noted = ppo_trainer.forward, timed(ppo_trainer.forward, calls["log-probs"])
    ppo_trainer.forward = lambda *a: (forward if torch.is_grad_enabled() else noted)(*a)
    prompts = datasets.Dataset.from_dict({"input_ids": case["prompts"]})
    size = len(case["prompts"])
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            total_episodes=size * case["iterations"],
            per_device_train_batch_size=size,
            local_rollout_forward_batch_size=size,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            response_length=case["new_tokens"],
            temperature=1.0,
            stop_token="eos",
            learning_rate=case["lr"],
            kl_coef=0.02,
            num_sample_generations=0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            fp16=False,
            seed=case["seed"],
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts.select(range(1)),
        )
        trainer.add_callback(stop := _Notes())
        resident.reset_peak()
        trainer.train()
    starts = [began for began, _ in calls["sample"]]
    ends = [*starts[1:], stop.last_step]
    return {
        "versions": _versions(),
        "weights_bytes": weights,
        "peak_bytes": resident.peak() - before - weights,
        "iterations": [
            {"seconds": end - start}
            | {
                phase: sum(length for began, length in those if start <= began < end)
                for phase, those in calls.items()
            }
            for start, end in zip(starts, ends, strict=True)
        ],
    }


class _Notes(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    @property
    def last_step(self) -> float:
        return self.steps[-1]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter())


def sft(case: dict[str, Any]) -> dict[str, Any]:
    """Steps of SFTTrainer, with the loss that the case names: seconds of each."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(case["model"])
    before = resident.resident()
    model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    row = {"input_ids": case["tokens"], "labels": case["labels"]}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            loss_type=case["loss_type"],
            max_steps=case["steps"],
            per_device_train_batch_size=case["batch"],
            max_length=None,
            learning_rate=case["lr"],
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            fp16=False,
            seed=case["seed"],
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([row] * (case["batch"] * case["steps"])),
        )
        trainer.add_callback(notes := _Notes())
        resident.reset_peak()
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    steps = notes.steps
    return {
        "versions": _versions(),
        "weights_bytes": weights,
        "peak_bytes": resident.peak() - before - weights,
        "losses": losses,
        "seconds": [b - a for a, b in itertools.pairwise(steps)],
    }


def _versions() -> dict[str, str]:
    return {m.__name__: m.__version__ for m in (torch, transformers, trl)}


def main() -> None:
    what, case, result = sys.argv[1:]
    found = {"ppo": ppo, "sft": sft}[what](json.loads(Path(case).read_text()))
    Path(result).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
