"""That the sanitized build, and only it, sees a read and a write past a tensor's end: `make asan`.

The op tests prove something under AddressSanitizer only if it would have spoken.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastrlhf_kernels
from fastrlhf_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "build/asan" in Path(fastrlhf_kernels.__file__).as_posix()

needs_sanitizer = pytest.mark.skipif(not SANITIZED, reason="`make asan` runs it")
ISAS: tuple[str, ...] = _native.cpu.isas() if _native.cpu is not None else ("not built",)


@needs_sanitizer
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [13, 32])  # in a vector's tail, and past the last whole one
@pytest.mark.parametrize("seen", ["READ", "WRITE"])
def test_a_step_past_the_end_ends_the_process(isa: str, n: int, seen: str) -> None:
    program = f"""
import torch
from fastrlhf_kernels import _native
_native.cpu.set_isa({isa!r})
x, y = torch.zeros({n}), torch.zeros({n})
short = torch.zeros({n} - 1)
_native.cpu.test_math(x.data_ptr(), y.data_ptr(), {n}, 0)
print(y.sum().item(), flush=True)
if {seen!r} == "READ":
    x = short
else:
    y = short
_native.cpu.test_math(x.data_ptr(), y.data_ptr(), {n}, 0)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == n, done.stderr  # the right call went through
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert f"{seen} of size" in done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("thread", "FASTRLHF_SANITIZE must be address, got 'thread'"),
        ("address", "FASTRLHF_SANITIZE: not in place of the normal build; see `make asan`"),
    ],
)
def test_the_normal_build_is_not_overwritten(value: str, message: str) -> None:
    before = (ROOT / "kernels/fastrlhf_kernels/_build_info.json").read_bytes()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT,
        env={"FASTRLHF_SANITIZE": value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == message
    assert (ROOT / "kernels/fastrlhf_kernels/_build_info.json").read_bytes() == before
