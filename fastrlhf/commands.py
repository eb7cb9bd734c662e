"""The commands of `fastrlhf`, as data: name, module, config class, one line of help.

A command's name is also the name of its table in a TOML config. Nothing is imported here, so that
`fastrlhf --help` needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives. `module` offers the class `config` and `run(config)`."""

    module: str
    config: str
    summary: str
    resumable: bool = False


COMMANDS: dict[str, Command] = {
    "pretrain": Command(
        "fastrlhf.pretrain", "PretrainConfig", "train a language model on plain text", True
    ),
    "sft": Command(
        "fastrlhf.sft", "SFTConfig", "fine-tune a language model on demonstrations", True
    ),
    "rm": Command(
        "fastrlhf.reward", "RewardConfig", "train a reward model on ranked completions", True
    ),
    "ppo": Command(
        "fastrlhf.ppo", "PPOConfig", "train a policy against the reward model (PPO, PPO-ptx)", True
    ),
    "pipeline": Command(
        "fastrlhf.pipeline", "PipelineConfig", "run the stages of one config in order", True
    ),
    "generate": Command(
        "fastrlhf.generate_cli", "GenerateConfig", "sample completions for a file of prompts"
    ),
    "eval": Command(
        "fastrlhf.evaluate", "EvalConfig", "score and compare models on held-out prompts"
    ),
    "report": Command("fastrlhf.report", "ReportConfig", "make one HTML page of a run"),
    "demo": Command(
        "fastrlhf.demo.command", "DemoConfig", "all stages on a miniature task, with a report", True
    ),
    "bench": Command("fastrlhf.bench_cli", "BenchConfig", "time the kernels beside their peers"),
    "doctor": Command("fastrlhf.doctor", "DoctorConfig", "show which kernels are active and why"),
}
