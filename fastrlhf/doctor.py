"""`fastrlhf doctor`: what is installed, which kernels are active, and why others are not.

Every op runs once on a tiny input on every backend that it has here, and its values are compared
with those of `ref`: "yes" in the table means that it ran and agreed. `--kernels` compiles the
Triton and CUDA kernels ahead of time and lists their registers and shared memory, which needs no
GPU; `--ops gae whiten` does it for these ops alone.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrlhf_kernels as kernels
from fastrlhf.config import require
from fastrlhf.errors import UserError
from fastrlhf.runlog import progress
from fastrlhf.toml_source import did_you_mean
from fastrlhf_kernels import BackendUnavailable, _aot, _env, _native, _triton, use_backend
from fastrlhf_kernels._aot import Compiled
from fastrlhf_kernels._backends import BACKENDS
from fastrlhf_kernels._triton import AotConfig

# What a run uses; the last two are optional.
PACKAGES = (
    "fastrlhf",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "tensorboard",
    "flash-attn",
    "wandb",
)
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
# fp32 sums of a few terms in another order; a wrong kernel is off by far more.
RTOL, ATOL = 1e-4, 1e-5


@dataclass(slots=True)
class DoctorConfig:
    """What to look at."""

    kernels: bool = False
    """Also compile the Triton and CUDA kernels ahead of time, for every target GPU, and list their
    registers and shared memory: some minutes; no GPU is needed."""

    ops: tuple[str, ...] = ()
    """Compile the kernels of these ops alone, such as `--ops gae whiten`; implies --kernels."""

    def __post_init__(self) -> None:
        valid = _aot.modules()
        for op in self.ops:
            hint = did_you_mean(op, valid)
            require(op in valid, "ops", f"no op '{op}'{hint}; valid: {', '.join(valid)}")


def run(config: DoctorConfig) -> None:
    """Print the report.

    Raises:
        UserError: a kernel disagrees with its reference, spills registers or needs more shared
            memory than there is, or `--kernels` in the interpreter.
    """
    compiles = config.kernels or bool(config.ops)
    if compiles and _env.INTERPRET:
        raise UserError("--kernels: TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    print_table("packages", _packages())
    print_table("machine", _machine())
    print_table("build", _build())
    print_table("backends", _backends())
    outcomes = probe_ops()
    head = ("op", *BACKENDS)
    print_table("ops", [head, *((op, *row.values()) for op, row in outcomes.items())])
    print("yes: ran here and agrees with ref; none: the op has no such backend; -: not on this")
    print("machine, for the reason above.")
    unfit = _report_kernels(config.ops or tuple(_aot.modules())) if compiles else []
    wrong = [
        f"{op} on {backend}"
        for op, row in outcomes.items()
        for backend, outcome in row.items()
        if outcome == "WRONG"
    ]
    if wrong:
        raise UserError(f"kernels disagree with their reference: {', '.join(wrong)}")
    if unfit:
        raise UserError(f"kernels spill or do not fit: {', '.join(unfit)}")


def print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Print the rows under a title, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"  {'  '.join(cells)}".rstrip())
    print()


def probe_ops() -> dict[str, dict[str, str]]:
    """Run every op on every backend.

    Returns:
        For each op, backend -> "yes", "none" (the op has no such backend), "-" (the backend is not
        available here) or "WRONG" (it ran, and its values are not those of `ref`).
    """
    here = {backend for backend in BACKENDS if _missing(backend) is None}
    return {
        op: {backend: _probe(probe, backend) if backend in here else "-" for backend in BACKENDS}
        for op, probe in PROBES.items()
    }


def _probe(probe: Callable[[Inputs, str], Any], backend: str) -> str:
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    with torch.no_grad(), warnings.catch_warnings():
        # Triton's interpreter computes with NumPy, which warns of an inf - inf that is not used.
        warnings.simplefilter("ignore", RuntimeWarning)
        wanted = list(_tensors(probe(Inputs("cpu"), "ref")))
        try:
            found = list(_tensors(probe(Inputs("cuda" if on_gpu else "cpu"), backend)))
        except BackendUnavailable:
            return "none"
    close = len(found) == len(wanted) and all(
        torch.allclose(a.cpu().double(), b.double(), rtol=RTOL, atol=ATOL)
        for a, b in zip(found, wanted, strict=True)
    )
    return "yes" if close else "WRONG"


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tensor, tuple or dict, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for key in sorted(output):
            yield from _tensors(output[key])
    else:
        for item in output:
            yield from _tensors(item)


class Inputs:
    """Small fixed inputs, the same on every device. B = 3, T = 5, H = 8, V = 11."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.mask = self.integers([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
        self.labels = self.integers([3, -100, 10])

    def floats(self, *shape: int, seed: int) -> Tensor:
        """Normal numbers; another seed gives others."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def integers(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor of these integers."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def tokens(self, seed: int) -> Tensor:
        """(B, T), as log-probs, rewards or values."""
        return self.floats(3, 5, seed=seed)


def _appended(x: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """Return the caches after `append_kv`, which writes them in place."""
    caches = x.floats(3, 2, 2, 8, seed=2), x.floats(3, 2, 2, 8, seed=3)
    k, v, slots = x.floats(3, 2, 8, seed=0), x.floats(3, 2, 8, seed=1), x.integers([4, -1, 0])
    kernels.append_kv(k, v, *caches, slots, backend=backend)
    return caches


PROBES: dict[str, Callable[[Inputs, str], Any]] = {
    "logprobs_from_logits": lambda x, backend: kernels.logprobs_from_logits(
        x.floats(3, 11, seed=0), x.labels, return_entropy=True, backend=backend
    ),
    "linear_logprobs": lambda x, backend: kernels.linear_logprobs(
        x.floats(3, 8, seed=0), x.floats(11, 8, seed=1), x.labels, backend=backend
    ),
    "linear_cross_entropy": lambda x, backend: kernels.linear_cross_entropy(
        x.floats(3, 8, seed=0), x.floats(11, 8, seed=1), x.labels, backend=backend
    ),
    "linear_ppo_loss": lambda x, backend: kernels.linear_ppo_loss(
        x.floats(3, 8, seed=0), x.floats(11, 8, seed=1), x.labels, x.floats(3, seed=2),
        x.floats(3, seed=3), entropy_coef=0.1, backend=backend,
    )[0],
    "kl_penalty": lambda x, backend: kernels.kl_penalty(
        x.tokens(0), x.tokens(1), estimator="k3", backend=backend
    ),
    "kl_divergence": lambda x, backend: kernels.kl_divergence(
        x.floats(3, 11, seed=0), x.floats(3, 11, seed=1), backend=backend
    ),
    "shape_rewards": lambda x, backend: kernels.shape_rewards(
        x.floats(3, seed=0), x.tokens(1), x.mask, beta=0.02, backend=backend
    ),
    "gae": lambda x, backend: kernels.gae(x.tokens(0), x.tokens(1), x.mask, backend=backend),
    "gae_varlen": lambda x, backend: kernels.gae_varlen(
        x.floats(7, seed=0),
        x.floats(7, seed=1),
        x.integers([0, 3, 7], torch.int32),
        backend=backend,
    ),
    "whiten": lambda x, backend: kernels.whiten(x.tokens(0), x.mask, backend=backend),
    "rollout_advantages": lambda x, backend: kernels.rollout_advantages(
        x.tokens(0), x.tokens(1), x.tokens(2), x.floats(3, seed=3), x.mask, beta=0.02,
        backend=backend,
    ),
    "policy_loss": lambda x, backend: kernels.policy_loss(
        x.tokens(0), x.tokens(1), x.tokens(2), x.mask, backend=backend
    ),
    "value_loss": lambda x, backend: kernels.value_loss(
        x.tokens(0), x.tokens(1), x.tokens(2), x.mask, backend=backend
    ),
    "ranking_loss": lambda x, backend: kernels.ranking_loss(
        x.floats(7, seed=0),
        x.integers([1, 2, 2, 3, 2, 1, 1]),
        x.integers([4, 3]),
        backend=backend,
    ),
    "append_kv": _appended,
    "decode_attention": lambda x, backend: kernels.decode_attention(
        x.floats(2, 4, 8, seed=0), x.floats(3, 2, 2, 8, seed=1), x.floats(3, 2, 2, 8, seed=2),
        x.integers([[2, 0], [1, 0]], torch.int32), x.integers([3, 2], torch.int32),
        backend=backend,
    ),
    # Only one token is left to draw, so that the answer is the same for any generator.
    "sample": lambda x, backend: kernels.sample(
        x.floats(3, 11, seed=0), x.integers([1, 2, 3]), x.integers([0, 5, 9]), top_k=1,
        backend=backend,
    ),
}  # fmt: skip


def _missing(backend: str) -> str | None:
    """Return why a backend cannot run here, in the kernels' own words, or None."""
    try:
        with use_backend(backend):
            return None
    except BackendUnavailable as error:
        return str(error).removeprefix(f"backend {backend!r} is not available: ")


def _packages() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _whose_threads() -> str:
    """Whether C++ kernels share torch's threads, which is faster beside matrix products."""
    if _native.cpu is None:
        return ""
    return (
        ", torch's for our kernels too" if _native.cpu.borrows_threads() else ", our kernels' own"
    )


def _machine() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("processor", _processor()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors{_whose_threads()}"),
    ]
    for name, tool in (("C++ compiler", os.environ.get("CXX", "c++")), ("nvcc", "nvcc")):
        found = shutil.which(tool)
        rows.append((name, _first_version_line(found) if found else f"no '{tool}' on the path"))
    if not torch.cuda.is_available():
        rows.append(("CUDA", f"torch finds no GPU (torch is built for {_torch_build()})"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        capability = f"sm_{properties.major}{properties.minor}"
        rows.append((f"CUDA {index}", f"{properties.name}, {capability}, {gib:.0f} GiB"))
    return rows


def _torch_build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else "CPU only"


def _processor() -> str:
    """Return the processor's name and those of its instruction sets that matter here."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    flags = [flag for flag in CPU_FLAGS if flag in fields.get("flags", "").split()]
    name = fields.get("model name") or platform.machine()
    return f"{name} ({', '.join(flags) or 'none of ' + ', '.join(CPU_FLAGS)})"


def _first_version_line(tool: str) -> str:
    """Return what a compiler calls itself: the line of `--version` that has a number in it."""
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{tool}: does not run ({type(error).__name__})"
    lines = [line for line in done.stdout.splitlines() if any(c.isdigit() for c in line)]
    release = [line for line in lines if "release" in line] or lines or ["no version"]
    return f"{release[0].strip()} ({tool})"


def _backends() -> list[tuple[str, ...]]:
    """Return each backend with what it runs or the reason against it, and how one is chosen."""
    rows: list[tuple[str, ...]] = []
    for backend in BACKENDS:
        reason = _missing(backend)
        what = "available"
        if backend == "cpu" and _native.cpu is not None:
            what += f", runs {_native.cpu.isa()}; has {', '.join(_native.cpu.isas())}"
        rows.append((backend, what if reason is None else f"no: {reason}"))
    asked = _env.BACKEND
    for device, first in (("CPU", "cpu"), ("GPU", "triton")):
        if asked is not None:
            chosen = f"{asked}, since FASTRLHF_BACKEND={asked}"
        elif _missing(first) is None:
            chosen = f"{first}, and ref for an op without it"
        else:
            chosen = f"ref, since {first} is not available"
        rows.append((f"{device} tensors", chosen))
    return rows


def _build() -> list[tuple[str, ...]]:
    """Return what the build of the extensions found, from the note that it left."""
    note = Path(kernels.__file__).parent / "_build_info.json"
    if not note.exists():
        return [("extensions", "not built: this copy of fastrlhf_kernels was never installed")]
    rows: list[tuple[str, ...]] = []
    for extension, found in json.loads(note.read_text(encoding="utf-8")).items():
        facts = (f"{name} {_plain(value)}" for name, value in found.items() if name != "built")
        rows.append((extension, "; ".join(["built" if found["built"] else "not built", *facts])))
    return rows


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _report_kernels(ops: tuple[str, ...]) -> list[str]:
    """Compile the ops' kernels for every target and print what each needs.

    Returns:
        The kernels that spill registers or need more shared memory than their target has.
    """
    steps, missing = _compilations(ops)
    found: list[Compiled] = []
    with progress("compile", len(steps), unit="kernel") as bar:
        for step in steps:
            found += step()
            bar.advance()
    print()
    rows: list[tuple[str, ...]] = [
        ("op", "kernel", "target", "registers", "spilled", "shared memory")
    ]
    rows += [
        (
            kernel.op,
            kernel.config,
            kernel.target,
            "?" if kernel.registers is None else str(kernel.registers),
            "?" if kernel.spilled_bytes is None else f"{kernel.spilled_bytes} B",
            f"{kernel.shared_bytes} of {kernel.shared_limit} B",
        )
        for kernel in found
    ]
    print_table("kernels, compiled ahead of time", rows)
    for reason in missing:
        print(reason)
    return [
        f"{kernel.config} for {kernel.target}"
        for kernel in found
        if (kernel.spilled_bytes or 0) > 0 or kernel.shared_bytes > kernel.shared_limit
    ]


def _compilations(ops: tuple[str, ...]) -> tuple[list[Callable[[], list[Compiled]]], list[str]]:
    """Return the compilations that can be done here, and a line for each kind that cannot."""
    steps: list[Callable[[], list[Compiled]]] = []
    missing = []
    if _triton.tl is None:
        missing.append(f"Triton kernels are not compiled: {_triton.missing}")
    sources = set(_aot.cuda_ops())
    if not sources:
        missing.append("CUDA kernels are not compiled: this is the installed package, without csrc")
    elif _aot.nvcc() is None:
        missing.append("CUDA kernels are not compiled: there is no nvcc on the path")
        sources = set()
    for op in ops:
        if _triton.tl is not None:
            for config, target in itertools.product(_aot.configs(op), _aot.TARGETS):
                steps.append(partial(_compile_triton, op, config, target))
        if op in sources:
            for target in _aot.CUDA_TARGETS:
                steps.append(partial(_aot.compile_cuda, op, target))
    return steps, missing


def _compile_triton(op: str, config: AotConfig, target: str) -> list[Compiled]:
    return [_aot.compile_config(op, config, target)]
