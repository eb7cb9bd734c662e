"""Times iterations of PPO-ptx, phase by phase, on a GPT-2 with random weights.

    python bench/ppo_iteration.py                                    # 124M parameters
    python bench/ppo_iteration.py --width 64 --layers 2 --heads 2 --vocabulary 500 --batch 8

The trainer itself runs (`fastrlhf ppo`, all of it: sampling, scoring, both updates with the
pretraining loss mixed in); the first iteration warms up, the others are timed. Random models hardly
ever end a response, so that every one has its full length. Prints and writes, for each phase,
seconds an iteration (median), and the peak of torch's allocator above the weights on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import DEVICE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastrlhf import ppo, rollout
from fastrlhf.models import LanguageModel, scalar_from_language_model
from fastrlhf.world import build_tokenizer

# Phase -> the function that it is; `sample`, `score` and `reward` are inside of collect.
PHASES: dict[str, tuple[ModuleType, str]] = {
    "collect": (ppo, "collect"),
    "collect: sample": (rollout, "generate"),
    "collect: log-probs, values": (rollout, "token_values"),
    "collect: score": (rollout, "reward_scores"),
    "update policy, with ptx": (ppo, "_update_policy"),
    "update value": (ppo, "_update_value"),
}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[..., Any], seconds: list[tuple[float, float]]) -> Callable[..., Any]:
    """The function, with the start and the length of each call appended to `seconds`."""

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        result = call(*args, **kwargs)
        synchronize()
        seconds.append((began, time.perf_counter() - began))
        return result

    return run


def write_run(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[int],
    documents: Sequence[int] = (),
) -> None:
    """Models, and prompts and documents of these lengths in tokens, of random words."""
    wrapped = LanguageModel(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", flush=True)
    wrapped.save(folder / "policy", tokenizer)
    scalar_from_language_model(folder / "policy").save(folder / "reward", tokenizer)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    draw = random.Random(0)
    # One word, one token, and a token before the first.
    for name, field, lengths in (("prompts", "prompt", prompts), ("documents", "text", documents)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i, length in enumerate(lengths):
                text = " ".join(draw.choices(words, k=length - 1))
                user = {"user": f"{i}"} if field == "prompt" else {}
                file.write(json.dumps({field: text, **user}) + "\n")


def run_phases(config: ppo.PPOConfig, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Runs `fastrlhf ppo`; seconds of each iteration, and of its phases in it.

    between: called before each iteration, and not counted.
    """
    calls: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pauses: list[tuple[float, float]] = []
    whole = [getattr(module, name) for module, name in PHASES.values()]
    try:
        for (phase, (module, name)), call in zip(PHASES.items(), whole, strict=True):
            setattr(module, name, timed(call, calls[phase]))
        collect, pause = ppo.collect, timed(between, pauses)

        def after_a_pause(*args: Any) -> Any:
            pause()
            return collect(*args)

        ppo.collect = after_a_pause
        began = time.perf_counter()
        ppo.run(config)
        seconds = time.perf_counter() - began
    finally:
        for (module, name), call in zip(PHASES.values(), whole, strict=True):
            setattr(module, name, call)
    # An iteration is from the start of a collection to the pause before the next, and the last to
    # its last update.
    starts = [start for start, _ in calls["collect"]]
    last, length = calls["update value"][-1]
    ends = [*(start for start, _ in pauses[1:]), last + length]
    return {
        "the whole run": seconds,
        "iterations": [
            {"seconds": end - start}
            | {
                phase: sum(t for began, t in those if start <= began < end)
                for phase, those in calls.items()
            }
            for start, end in zip(starts, ends, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768, help="hidden size")
    parser.add_argument("--layers", type=int, default=12, help="decoder blocks")
    parser.add_argument("--heads", type=int, default=12, help="attention heads")
    parser.add_argument("--vocabulary", type=int, default=50257, help="tokens")
    parser.add_argument("--prompt", type=int, default=64, help="tokens a prompt, at most")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens a response")
    parser.add_argument("--batch", type=int, default=64, help="episodes an iteration")
    parser.add_argument("--iterations", type=int, default=3, help="timed, after the first")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    parser.add_argument(
        "--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="algorithms that repeat their bits, on a GPU",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=max(options.vocabulary, len(tokenizer)),
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            n_positions=options.prompt + options.new_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_run(
            folder,
            model,
            tokenizer,
            [options.prompt] * options.batch,
            [options.prompt + options.new_tokens] * options.batch,
        )
        config = ppo.PPOConfig(
            out=folder / "run",
            data=folder,
            model=folder / "policy",
            reward_model=folder / "reward",
            pretrain_documents=Path("documents.jsonl"),
            ptx_ratio=1.0,
            iterations=1 + options.iterations,
            batch_size=options.batch,
            minibatch_size=options.batch,
            max_response=options.new_tokens,
            precision=options.precision,
            deterministic=options.deterministic,
            save_every=0,
            samples=0,
            tensorboard=False,
        )
        timings = run_phases(config)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    first, *others = timings["iterations"]
    found: dict[str, float] = {
        "iteration": statistics.median(i["seconds"] for i in others),
        "first iteration": first["seconds"],
        "the whole run": timings["the whole run"],
    }
    found |= {phase: statistics.median(i[phase] for i in others) for phase in PHASES}
    tokens = options.batch * options.new_tokens
    print(f"{DEVICE}, {options.batch} episodes of {options.prompt} + {options.new_tokens} tokens")
    for name, seconds in found.items():
        print(f"{name:28} {seconds:9.3f} s")
    print(f"{'new tokens a second':28} {tokens / found['collect: sample']:9.0f} while sampling")
    record: dict[str, Any] = {
        "seconds": found,
        "last": json.loads(lines[-1]),
        "torch": torch.__version__,
    }
    record["settings"] = {k: v for k, v in vars(options).items() if k != "json"}
    if DEVICE == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(f"{'peak of the allocator':28} {record['peak_bytes'] / 2**30:9.2f} GiB")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
