"""The matrix products with weights that an iteration of PPO cannot avoid: which, and how long.

An iteration's products, in their order: sampling (each prompt once, then as many rows as are alive
at each step), one pass of the reference, of the value and of the reward model, forward and backward
(two more products each) of policy and value model; of the policy's and the reference's heads only
rows of responses. Each layer of each model has weights of its own, as in the iteration, where a
product seldom finds them in the cache; outputs are made beforehand.

`Timer` times them in a process of its own, so that they can be timed between the iterations of a
trainer, while the machine is as fast as it is then, without a trace in the trainer's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYERS = 5
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
Lengths = Sequence[tuple[int, int]]  # of prompts and of their responses


class Product(NamedTuple):
    """(rows, inner) times (inner, columns)."""

    rows: int
    inner: int
    columns: int
    weight: str | None
    """Which weight is the second operand, if one is."""

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns


def blocks(model: str, rows: int, layers: int) -> list[Product]:
    """The products of all decoder blocks, forward."""
    h, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {"qkv": (h, 3 * h), "out": (h, h), "gate, up": (h, 2 * f), "down": (f, h)}
    return [
        Product(rows, *shape, f"{model} {layer} {name}")
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


def head(model: str, rows: int) -> list[Product]:
    """The product with the output embedding."""
    return [Product(rows, CONFIG["hidden_size"], CONFIG["vocab_size"], f"{model} head")]


def with_backward(products: Sequence[Product]) -> list[Product]:
    """And after them, from the last on, those for the gradients of input and weight."""
    found = list(products)
    for rows, inner, columns, weight in reversed(products):
        found.append(Product(rows, columns, inner, f"{weight} turned"))
        found.append(Product(inner, rows, columns, None))
    return found


def needed(lengths: Lengths, layers: int = LAYERS) -> dict[str, list[Product]]:
    """The products of an iteration with these prompts and responses, by phase."""
    prompts, responses = (sum(each) for each in zip(*lengths, strict=True))
    sampling = blocks("policy", prompts, layers) + head("policy", len(lengths))
    for step in range(1, max(n for _, n in lengths)):
        alive = sum(n > step for _, n in lengths)
        sampling += blocks("policy", alive, layers) + head("policy", alive)
    # Of a sequence's last token only the reward model needs a hidden state.
    read, rewarded = prompts + responses - len(lengths), prompts + responses
    policy = blocks("policy", read, layers) + head("policy", responses)
    return {
        "sample": sampling,
        "reference": blocks("reference", read, layers) + head("reference", responses),
        "value": blocks("value", read, layers),
        "reward": blocks("reward", rewarded, layers),
        "update policy": with_backward(policy),
        "update value": with_backward(blocks("value", read, layers)),
    }


def operations(phases: dict[str, list[Product]]) -> int:
    """Multiplications and additions of all."""
    return sum(p.operations for products in phases.values() for p in products)


class Operands:
    """Matrices to multiply, and to multiply into, each made once."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Tensor] = {}

    def get(self, what: str | None, rows: int, columns: int) -> Tensor:
        """The matrix of that name and size."""
        key = what, rows, columns
        if key not in self.made:
            self.made[key] = torch.randn(rows, columns)
        return self.made[key]

    def of(self, p: Product) -> tuple[Tensor, Tensor, Tensor]:
        """Both operands and the output of a product."""
        weight = p.weight or "output's gradient"
        if turned := weight.endswith(" turned"):  # the weight itself, read the other way
            b = self.get(weight.removesuffix(" turned"), p.columns, p.inner).t()
        else:
            b = self.get(weight, p.inner, p.columns)
        if p.weight is None:
            a = self.get("input", p.rows, p.inner)
        else:
            a = self.get("gradient" if turned else "input", p.rows, p.inner)
        return a, b, self.get("output", p.rows, p.columns)


def seconds_of(phases: dict[str, list[Product]], operands: Operands) -> dict[str, float]:
    """How long each phase's products take, one after the other."""
    for phase in phases.values():
        for p in set(phase):
            torch.mm(*operands.of(p)[:2], out=operands.of(p)[2])
    found = {}
    for name, phase in phases.items():
        ready = [operands.of(p) for p in phase]
        began = time.perf_counter()
        for a, b, out in ready:
            torch.mm(a, b, out=out)
        found[name] = time.perf_counter() - began
    return found


class Timer:
    """Times products in a process of its own, begun by the first call, which sleeps in between."""

    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Timer:
        return self

    def __call__(self, lengths: Lengths) -> dict[str, float]:
        """Seconds of each phase of an iteration with these lengths."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(lengths) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the process that times bare products has ended")
        found: dict[str, float] = json.loads(line)
        return found

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.communicate()


def main() -> None:
    """Answers a line of lengths with a line of seconds."""
    for line in sys.stdin:
        print(json.dumps(seconds_of(needed(json.loads(line)), Operands())), flush=True)


if __name__ == "__main__":
    main()
