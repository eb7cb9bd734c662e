"""Every shipped Triton configuration and every .cu compiles for every target: no spills, memory
within limits.

Needs no GPU. Triton's compiler runs in a process of its own, since in the interpreter, which the
other tests use, kernels cannot be compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastrlhf_kernels import _aot
from fastrlhf_kernels._aot import TARGETS, configs, modules

ROOT = Path(__file__).resolve().parents[1]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_nvcc = pytest.mark.skipif(_aot.nvcc() is None, reason="no nvcc here")


@needs_triton
@pytest.mark.parametrize("op", [op for op in modules() if configs(op)])
def test_compiles_without_spills(op: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastrlhf_kernels._aot", op],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = [(config.name, target) for config in configs(op) for target in TARGETS]
    assert [(row["config"], row["target"]) for row in found] == wanted
    for row in found:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] is not None, row
        assert row["shared_bytes"] <= row["shared_limit"], row


def test_configuration_names_are_unique() -> None:
    for op in modules():
        names = [config.name for config in configs(op)]
        assert len(names) == len(set(names)), names


@needs_nvcc
@pytest.mark.parametrize("target", _aot.CUDA_TARGETS)
@pytest.mark.parametrize("op", _aot.cuda_ops())
def test_cuda_sources_compile_without_spills(op: str, target: str) -> None:
    found = _aot.compile_cuda(op, target)
    assert len({kernel.config for kernel in found}) == len(found) > 0
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.registers is not None, kernel
        assert kernel.shared_bytes <= kernel.shared_limit, kernel


@needs_nvcc
def test_a_cuda_kernel_that_spills_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 threads of 256 live floats each: there are 128 registers a thread for them."""
    (tmp_path / "greedy.cu").write_text(
        "__global__ void __launch_bounds__(512) greedy(float* x) {\n"
        "  __shared__ float y[1024];\n"
        "  y[threadIdx.x] = x[threadIdx.x];\n"
        "  float a[256];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 256; ++i) a[i] = x[i * 512 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 256; ++i) x[i * 512 + threadIdx.x] = a[255 - i] * y[i];\n"
        "}\n"
    )
    monkeypatch.setattr(_aot, "CSRC", tmp_path)
    (kernel,) = _aot.compile_cuda("greedy", "sm_80")
    assert kernel.config == "greedy"
    assert kernel.spilled_bytes is not None
    assert kernel.spilled_bytes > 0
    assert kernel.shared_bytes == 4096
    (tmp_path / "broken.cu").write_text("__global__ void broken() { nowhere(); }\n")
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile for sm_90a(.|\n)*nowhere"):
        _aot.compile_cuda("broken", "sm_90a")


def test_cuda_sources_compile_with_the_flags_that_ship() -> None:
    """The device's flags of setup.py; what it adds is the host's."""
    setup = (ROOT / "setup.py").read_text()
    shipped = re.search(r'^NVCC_FLAGS = "(.*)"$', setup, re.MULTILINE)
    assert shipped is not None
    flags = re.sub(r"-Xcompiler \S+ ", "", shipped[1])
    assert tuple(flags.split()) == _aot.NVCC_FLAGS
