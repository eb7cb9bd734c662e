"""This project's trainers on the cases of bench_ppo.py and bench_sft.py: see trl_side.py.

python bench/our_side.py ppo CASE.json RESULT.json
python bench/our_side.py sft CASE.json RESULT.json
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bare_products
import ppo_iteration
import resident
from safetensors import safe_open

from fastrlhf import ppo, sft
from fastrlhf.training import OptimizerConfig, Session


def weights_bytes(*folders: str) -> int:
    """Bytes of the fp32 weights saved in these folders."""
    total = 0
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    total += 4 * math.prod(file.get_slice(name).get_shape())
    return total


def train_ppo(case: dict[str, Any]) -> dict[str, Any]:
    """Iterations of PPO: seconds of each and of its phases, and the lengths of its episodes.

    With `bare` in the case, also the seconds of each iteration's bare products, timed right after.
    """
    lengths: list[list[tuple[int, int]]] = []
    bare: list[dict[str, float]] = []
    collect = ppo.collect

    def noting(*args: Any) -> Any:
        rollout = collect(*args)
        lengths.append([(e.start, e.targets) for e in rollout.episodes])
        return rollout

    ppo.collect = noting
    weights = weights_bytes(*[case["model"]] * 2, *[case["reward_model"]] * 2)
    before = resident.resident()
    with tempfile.TemporaryDirectory() as folder, bare_products.Timer() as products:

        def time_products() -> None:
            if case.get("bare") and lengths:
                bare.append(products(lengths[-1]))

        optim = {"lr": case["lr"], "schedule": "constant"}
        config = ppo.PPOConfig(
            out=Path(folder) / "run",
            data=Path(case["data"]),
            model=Path(case["model"]),
            reward_model=Path(case["reward_model"]),
            pretrain_documents=Path("documents.jsonl") if case["ptx_ratio"] else None,
            ptx_coef=27.8 if case["ptx_ratio"] else 0.0,
            ptx_ratio=case["ptx_ratio"],
            iterations=case["iterations"],
            batch_size=len(case["prompts"]),
            minibatch_size=len(case["prompts"]),
            max_response=case["new_tokens"],
            ema=0.0,
            optim=OptimizerConfig(**optim),
            value_optim=OptimizerConfig(**optim),
            precision="fp32",
            save_every=0,
            samples=0,
            tensorboard=False,
            seed=case["seed"],
        )
        resident.reset_peak()
        try:
            found = ppo_iteration.run_phases(config, time_products)
            time_products()
        finally:
            ppo.collect = collect
    return found | {
        "weights_bytes": weights,
        "peak_bytes": resident.peak() - before - weights,
        "lengths": lengths,
        "bare": bare,
    }


def train_sft(case: dict[str, Any]) -> dict[str, Any]:
    """Steps of supervised fine-tuning: seconds and loss of each."""
    ends: list[float] = []
    step = Session.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        ends.append(time.perf_counter())
        return result

    Session.step = noting  # type: ignore[method-assign]
    weights = weights_bytes(case["model"])
    before = resident.resident()
    with tempfile.TemporaryDirectory() as folder:
        config = sft.SFTConfig(
            out=Path(folder) / "run",
            data=Path(case["data"]),
            model=Path(case["model"]),
            epochs=1,
            batch_size=case["batch"],
            residual_dropout=0.0,
            optim=OptimizerConfig(lr=case["lr"], schedule="constant"),
            precision="fp32",
            save_every=0,
            tensorboard=False,
            seed=case["seed"],
        )
        resident.reset_peak()
        sft.run(config)
        lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return {
        "weights_bytes": weights,
        "peak_bytes": resident.peak() - before - weights,
        "losses": [line["loss"] for line in map(json.loads, lines) if "loss" in line],
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
    }


def main() -> None:
    what, case, result = sys.argv[1:]
    found = {"ppo": train_ppo, "sft": train_sft}[what](json.loads(Path(case).read_text()))
    Path(result).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
