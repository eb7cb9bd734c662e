"""Every shipped Triton configuration compiles for every target: no spills, memory within limits.

Needs no GPU. The compiler runs in a process of its own, since in the interpreter, which the other
tests use, kernels cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from fastrlhf_kernels._aot import TARGETS, ops
from fastrlhf_kernels._triton import AotConfig

pytest.importorskip("triton", reason="triton is not installed")


def configurations(op: str) -> list[AotConfig]:
    return list(getattr(importlib.import_module(f"fastrlhf_kernels.{op}"), "AOT_CONFIGS", ()))


@pytest.mark.parametrize("op", [op for op in ops() if configurations(op)])
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
    wanted = [(config.name, target) for config in configurations(op) for target in TARGETS]
    assert [(row["config"], row["target"]) for row in found] == wanted
    for row in found:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] is not None, row
        assert row["shared_bytes"] <= row["shared_limit"], row


def test_configuration_names_are_unique() -> None:
    for op in ops():
        names = [config.name for config in configurations(op)]
        assert len(names) == len(set(names)), names
