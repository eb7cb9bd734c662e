"""Times the kernels' constants on a GPU, for the comments that say why they are what they are.

    python bench/sweep.py [NAME ...] [--json FILE]     NAME: a sweep of SWEEPS, by default all

A line gives the median of some rounds with the L2 cache flushed before each, and the rate from the
bytes or operations that the call must move or do. On a CPU, --tiny only shows that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from common import DEVICE, L2_FLUSH_BYTES, time_once

from fastrlhf_kernels import (
    _linear,
    _linear_losses,
    _logprob_rows,
    _losses,
    decode_attention,
    gae,
    kl_divergence,
    linear_cross_entropy,
    linear_logprobs,
    logprobs_from_logits,
    policy_loss,
)

ROUNDS = 7
Settings = dict[tuple[ModuleType, str], Sequence[Any]]


class Sweep(NamedTuple):
    """A call, what it moves or does, and the constants to try in it."""

    call: Callable[[], Any]
    amount: float  # bytes, or operations
    unit: str  # of `amount` over 10^9 (GB) or 10^12 (TFLOP)
    settings: Settings


@contextlib.contextmanager
def constants(values: dict[tuple[ModuleType, str], Any]) -> Iterator[None]:
    """The modules' constants at these values for a block."""
    before = {key: getattr(*key) for key in values}
    for (module, name), value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def module(name: str) -> ModuleType:
    """An op's module; in the package its name is the function."""
    return sys.modules[f"fastrlhf_kernels.{name}"]


def copy(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    x = torch.ones(2**10 if tiny else 2**31, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    yield "2 GiB", Sweep(lambda: y.copy_(x), 2.0 * x.nbytes, "GB", {})


def rows(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    """logprobs_from_logits, each pass alone."""
    blocks = {
        (_logprob_rows, "BLOCK_V"): (4096,) if tiny else (2048, 4096),
        (_logprob_rows, "NUM_WARPS"): (8,) if tiny else (2, 4, 8),
    }
    backward_blocks = {
        (_logprob_rows, "BACKWARD_BLOCK_V"): (2048,) if tiny else (1024, 2048, 4096),
        (_logprob_rows, "BACKWARD_NUM_WARPS"): (8,) if tiny else (4, 8),
    }
    N, V = (4, 300) if tiny else (4096, 151936)
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(N, V, dtype=dtype, device=DEVICE)
        labels = torch.randint(0, V, (N,), device=DEVICE)
        forward = Sweep(
            lambda x=logits, y=labels: logprobs_from_logits(x, y), logits.nbytes, "GB", blocks
        )
        yield f"forward {N} x {V} {dtype}", forward
        leaf = logits.requires_grad_()
        result, ones = logprobs_from_logits(leaf, labels), torch.ones(N, device=DEVICE)

        def backward(result: Any = result, leaf: Any = leaf, ones: Any = ones) -> Any:
            return torch.autograd.grad(result, leaf, ones, retain_graph=True)

        yield (
            f"backward {N} x {V} {dtype}",
            Sweep(backward, 2.0 * logits.nbytes, "GB", backward_blocks),
        )


def kl(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    N, V = (4, 300) if tiny else (4096, 151936)
    p, q = (torch.randn(N, V, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    blocks = {
        (module("kl_divergence"), "BLOCK_V"): (2048,) if tiny else (1024, 2048, 4096),
        (module("kl_divergence"), "NUM_WARPS"): (8,) if tiny else (4, 8),
    }
    yield (
        f"forward {N} x {V} bf16",
        Sweep(lambda: kl_divergence(p, q), 2.0 * p.nbytes, "GB", blocks),
    )


def scans(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    B, T = (4, 300) if tiny else (8192, 2048)
    rewards, values = (torch.randn(B, T, device=DEVICE) for _ in range(2))
    blocks = {
        (module("gae"), "BLOCK_T"): (256,) if tiny else (128, 256, 512),
        (module("gae"), "NUM_WARPS"): (1,) if tiny else (1, 2, 4),
    }
    moved = 4.0 * rewards.nbytes
    yield f"triton {B} x {T}", Sweep(lambda: gae(rewards, values), moved, "GB", blocks)
    if "cuda" in module("_backends").available_backends():
        cuda = Sweep(lambda: gae(rewards, values, backend="cuda"), moved, "GB", {})
        yield f"cuda {B} x {T}", cuda


def small(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    B, T = (4, 300) if tiny else (4096, 2048)
    x = [torch.randn(B, T, device=DEVICE) for _ in range(3)]
    sizes = {(_losses, "BLOCK_N"): (1024,) if tiny else (1024, 2048, 4096)}
    yield f"policy_loss {B} x {T}", Sweep(lambda: policy_loss(*x), 3.0 * x[0].nbytes, "GB", sizes)


def heads(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    N, H, V = (4, 8, 300) if tiny else (8192, 4096, 151936)
    dtype = torch.bfloat16
    hidden = torch.randn(N, H, dtype=dtype, device=DEVICE)
    weight = torch.randn(V, H, dtype=dtype, device=DEVICE) * H**-0.5
    labels = torch.randint(0, V, (N,), device=DEVICE)
    flops = 2.0 * N * H * V
    z = torch.empty(N, V, dtype=dtype, device=DEVICE)
    yield "bare product", Sweep(lambda: torch.mm(hidden, weight.T, out=z), flops, "TFLOP", {})
    sizes = {
        (_linear, "GPU_ROWS"): (2048,) if tiny else (2048, 4096, 8192),
        (_linear, "GPU_COLUMNS"): (4096,) if tiny else (4096, 8192, 16384),
    }
    yield "score", Sweep(lambda: linear_logprobs(hidden, weight, labels), flops, "TFLOP", sizes)
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def both() -> Any:
        return torch.autograd.grad(linear_logprobs(*leaves, labels).sum(), leaves)

    yield "linear_logprobs, both passes", Sweep(both, 4 * flops, "TFLOP", sizes)

    def three() -> Any:
        return torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves)

    chunk = {"cpu": 2**20, "cuda": 2**25}
    chunks = {
        (_linear_losses, "CHUNK_ELEMENTS"): (chunk,)
        if tiny
        else [chunk | {"cuda": 2**power} for power in (27, 28, 29)]
    }
    yield "linear_cross_entropy", Sweep(three, 3 * flops, "TFLOP", chunks)


def decode(tiny: bool) -> Iterator[tuple[str, Sweep]]:
    """decode_attention, a cache of bf16; bytes: the keys and values of all tokens."""
    B, HQ, HKV, D, T = (2, 4, 2, 16, 100) if tiny else (64, 32, 8, 128, 4096)
    page_size = 16
    pages = -(-T // page_size)
    cache = [
        torch.randn(B * pages, page_size, HKV, D, device=DEVICE).to(torch.bfloat16)
        for _ in range(2)
    ]
    tables = torch.randperm(B * pages, device=DEVICE).view(B, pages).to(torch.int32)
    lengths = torch.full((B,), T, dtype=torch.int32, device=DEVICE)
    q = torch.randn(B, HQ, D, device=DEVICE).to(torch.bfloat16)
    splits = {
        (module("_decode_attention_kernel"), "SPLIT"): (128,) if tiny else (128, 256, 512),
    }
    call = lambda: decode_attention(q, *cache, tables, lengths)  # noqa: E731
    moved = 2.0 * cache[0].nbytes
    yield f"{B} x {T} tokens, {HQ} heads on {HKV}, D {D}", Sweep(call, moved, "GB", splits)


SWEEPS = {
    "copy": copy, "rows": rows, "heads": heads, "kl": kl, "scans": scans, "small": small,
    "decode": decode,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--tiny", action="store_true", help="one small setting each")
    parser.add_argument("--json", type=Path, help="where to write all lines")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SWEEPS):
        parser.error(f"no sweep {', '.join(sorted(unknown))}; there are {', '.join(SWEEPS)}")
    gpu = DEVICE == "cuda"
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE) if gpu else None
    found = []
    for name in options.names or SWEEPS:
        for title, sweep in SWEEPS[name](options.tiny):
            for values in itertools.product(*sweep.settings.values()):
                chosen = dict(zip(sweep.settings, values, strict=True))
                line = {"sweep": name, "call": title} | {k[1]: v for k, v in chosen.items()}
                try:
                    with constants(chosen):
                        sweep.call()
                        times = [time_once(sweep.call, flush) for _ in range(ROUNDS)]
                except Exception as error:  # an unusable setting is a result too
                    line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                else:
                    line["median_s"] = statistics.median(times)
                    scale = 1e-9 if sweep.unit == "GB" else 1e-12
                    line[f"{sweep.unit} per s"] = sweep.amount * scale / line["median_s"]
                found.append(line)
                print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                                for k, v in line.items()), flush=True)  # fmt: skip
    if options.json:
        record = {"torch": torch.__version__, "lines": found}
        record["gpu"] = torch.cuda.get_device_name() if gpu else None
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
