"""The `compare` and `keep` fixtures, and what the results say of the machine."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from common import OURS, Missing, Row, measure, table

import fastrlhf_kernels
from fastrlhf_kernels import _native

_BEGAN = pytest.StashKey[float]()
_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin no benchmark after this many seconds; what is left is reported as skipped",
    )
    parser.addoption(
        "--no-peers", action="store_true", help="leave other packages out; their rows say so"
    )


def pytest_configure(config: pytest.Config) -> None:
    peers.WANTED = not config.getoption("--no-peers")
    config.stash[_BEGAN] = time.monotonic()
    config.stash[_LEFT_OUT] = 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - item.config.stash[_BEGAN] > item.config.getoption("--seconds"):
        item.config.stash[_LEFT_OUT] += 1
        pytest.skip("not measured: the time is over")


@pytest.fixture
def keep(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Prints rows and puts them, and more, into pytest-benchmark's record; fails on a bad one."""

    def run(rows: list[Row], call: Callable[[], Any] = lambda: None, **more: Any) -> None:
        benchmark.extra_info.update(more, rows=[dataclasses.asdict(row) for row in rows])
        with capsys.disabled():
            print("\n" + table(rows))
            for name, facts in more.items():
                print(f"{name}: {json.dumps(facts)}")
        benchmark.pedantic(call, rounds=1)
        wrong = [f"{row.variant}: {row.note}" for row in rows if row.note and row.variant in OURS]
        if wrong:  # only now: the record keeps the row
            pytest.fail(f"{rows[0].op}, {rows[0].shape}: {'; '.join(wrong)}")

    return run


@pytest.fixture
def compare(keep: Callable[..., None]) -> Callable[..., None]:
    """`common.measure`, with its rows kept."""

    def run(op: str, variants: dict[str, Callable[[], Any]], **settings: Any) -> None:
        rows = measure(op, variants, **settings)
        # pytest-benchmark's own figure is that of the first variant that could be timed.
        timed = next((row.variant for row in rows if row.median_s is not None), None)
        first = variants.get(timed or "", Missing(""))
        call = (lambda: None) if isinstance(first, Missing) else first
        synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        keep(rows, lambda: (call(), synchronise()))

    return run


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["left_out"] = config.stash[_LEFT_OUT]  # for want of time


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["backends"] = list(fastrlhf_kernels.available_backends())
    if _native.cpu is not None:
        machine_info["isa"] = _native.cpu.isa()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda
