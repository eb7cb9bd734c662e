"""Compiles kernels ahead of time, for GPUs that this machine need not have.

    python -m fastrlhf_kernels._aot gae kl_penalty    # all ops where none is named

prints a JSON line for every configuration in the modules' `AOT_CONFIGS` and every target: registers
a thread, bytes spilled, bytes of shared memory, and the target's limit. TRITON_INTERPRET must not
be set: in the interpreter there is nothing to compile. `compile_cuda` is the same for csrc/*.cu,
by nvcc. `fastrlhf doctor --kernels` prints both as a table.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ._triton import AotConfig

# Target -> (backend, architecture, warp size, shared memory a block may have, in bytes).
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}

# The same for nvcc; the limit is that of static shared memory, the same on all.
CUDA_TARGETS = {"sm_80": "80", "sm_90a": "90a"}
CUDA_SHARED_LIMIT = 48 * 1024
NVCC_FLAGS = ("-std=c++17", "-O3", "-DFASTRLHF_ISA=cuda")  # setup.py's, of the device code
INTERNAL = ("_decode_step_triton",)  # modules whose kernels belong to no public op
CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a kernel needs on a target; None where the target's tools do not say."""

    op: str
    config: str
    target: str
    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    shared_limit: int


def compile_config(op: str, config: AotConfig, target: str) -> Compiled:
    """Compiles down to machine code; raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size, shared_limit = TARGETS[target]
    names = config.kernel.arg_names
    signature = {n: config.signature.get(n, "constexpr") for n in names}
    unknown = (set(config.signature) | set(config.constants)) - set(names)
    absent = [n for n in names if n not in config.signature and n not in config.constants]
    if unknown or absent:
        raise ValueError(f"{config.name}: unknown arguments {sorted(unknown)}, missing {absent}")
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,  # this and the next as `launch` has them
    }
    if backend == "cuda" and config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    compiled = triton.compile(
        ASTSource(config.kernel, signature, dict(config.constants), attrs),
        target=GPUTarget(backend, arch, warp_size),
        options=options,
    )
    measure = _nvidia_usage if backend == "cuda" else _amd_usage
    registers, spilled = measure(compiled.asm)
    return Compiled(
        op, config.name, target, registers, spilled, int(compiled.metadata.shared), shared_limit
    )


def _nvidia_usage(asm: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Registers and spilled bytes, from the report of Triton's own ptxas."""
    import triton.backends.nvidia as nvidia

    ptx = asm["ptx"]
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch is not None, "PTX without a target"
    bin_dir = pathlib.Path(nvidia.__file__).parent / "bin"
    blackwell = arch[1].startswith(("sm_10", "sm_12"))
    ptxas = bin_dir / ("ptxas-blackwell" if blackwell else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={arch[1]}", str(source), "-o", f"{folder}/out"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return (
        int(registers[1]) if registers else None,
        int(spills[1]) + int(spills[2]) if spills else None,
    )


def _amd_usage(asm: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Vector registers, and bytes of scratch memory a thread, from the assembly's metadata."""
    text = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return int(registers[1]) if registers else None, int(scratch[1]) if scratch else None


def nvcc() -> str | None:
    """The path of nvcc, on PATH or where its installer puts it; None if it is not there."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_ops() -> list[str]:
    """The ops that have a csrc/<op>.cu; none where only the installed package is here."""
    return sorted(p.stem for p in CSRC.glob("*.cu"))


def compile_cuda(op: str, target: str) -> list[Compiled]:
    """Compiles csrc/<op>.cu down to machine code; a `Compiled` for each of its kernels.

    Raises:
        RuntimeError: nvcc refuses it; the message is nvcc's.
    """
    compiler = nvcc()
    assert compiler is not None, "no nvcc"
    arch = CUDA_TARGETS[target]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(compiler, *NVCC_FLAGS, "-Xptxas", "-v", "-cubin"),
            *("-gencode", f"arch=compute_{arch},code=sm_{arch}"),
            *("-o", f"{folder}/kernel.cubin", str(CSRC / f"{op}.cu")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{op}.cu does not compile for {target}:\n{done.stderr}")
    return _ptxas_report(op, target, done.stderr)


def _ptxas_report(op: str, target: str, report: str) -> list[Compiled]:
    """What `ptxas -v` says of each kernel, ordered by the kernels' names."""
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Compiled(
                op,
                _kernel_name(symbol),
                target,
                int(registers[1]) if registers else None,
                int(spills[1]) + int(spills[2]) if spills else None,
                int(shared[1]) if shared else 0,
                CUDA_SHARED_LIMIT,
            )
        )
    return sorted(found, key=lambda kernel: kernel.config)


def _kernel_name(symbol: str) -> str:
    """A kernel's name without namespaces and parameters; the symbol where c++filt is missing."""
    if not symbol.startswith("_Z") or shutil.which("c++filt") is None:
        return symbol
    command = ["c++filt", "--no-params", symbol]
    plain = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name, bracket, arguments = plain.partition("<")
    return name.rsplit("::", 1)[-1] + bracket + arguments


def ops() -> list[str]:
    """The public ops: every module of the package without an underscore."""
    folder = pathlib.Path(__file__).parent
    return sorted(p.stem for p in folder.glob("*.py") if p.stem[0] != "_")


def modules() -> list[str]:
    """Whatever may have kernels to compile: the ops and INTERNAL."""
    return [*ops(), *INTERNAL]


def configs(op: str) -> tuple[AotConfig, ...]:
    """The configurations in which an op's Triton kernels ship."""
    return tuple(getattr(importlib.import_module(f"{__package__}.{op}"), "AOT_CONFIGS", ()))


def compile_op(op: str) -> Iterator[Compiled]:
    """Every configuration of an op for every target."""
    for config in configs(op):
        for target in TARGETS:
            yield compile_config(op, config, target)


def main() -> None:
    for op in sys.argv[1:] or modules():
        for compiled in compile_op(op):
            print(json.dumps(dataclasses.asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
