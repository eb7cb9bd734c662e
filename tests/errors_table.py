"""The table of errors at the end of a test run: what the suite measured against fp64.

Two sources. tests/test_errors_table.py measures one plain call of every op on every backend, the
result and the gradient, beside the reference's own error. And every `oracle.assert_accurate` in a
test with a `backend` fixture is counted, with the largest share of its bound that was used up.

The numbers travel in the tests' `user_properties`, which pytest-xdist brings to the controller.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from oracle import COMPARED, MEASURED

BACKENDS = ("cpu-baseline", "cpu-avx2", "cpu-avx512", "triton", "cuda")

_measured: list[dict[str, Any]] = []
_compared: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":  # the last of a test's three reports has them all
        for name, value in report.user_properties:
            if name == MEASURED:
                _measured.append(value)
            elif name == COMPARED:
                _compared.append(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("errors against fp64")
        terminalreporter.write_line(
            "Largest error of a plain call, and after x its ratio to the reference's own. The rule "
            "is twice that and 4 ulp of the largest value (bf16: half a unit)."
        )
        for line in measured_lines(_measured):
            terminalreporter.write_line(line)
    if _compared:
        terminalreporter.section("comparisons with fp64 oracles")
        terminalreporter.write_line(
            "Comparisons, and the largest share used of the bound of tests/oracle.py."
        )
        for line in compared_lines(_compared):
            terminalreporter.write_line(line)


def _backends(rows: Iterable[dict[str, Any]]) -> list[str]:
    found = {row["backend"] for row in rows}
    return [name for name in BACKENDS if name in found]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def measured_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each op, dtype, and result or gradient; a column for each backend."""
    backends = _backends(rows)
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row["dtype"], row["what"])
        found.setdefault(key, {})[row["backend"]] = row
    lines = [["op", "dtype", "of", "reference", *backends]]
    for key in sorted(found, key=lambda k: (k[0], k[1] != "float32", k[2] != "result")):
        cells = found[key]
        own = max(cell["own"] for cell in cells.values())
        lines.append([*key, f"{own:.1e}", *(_cell(cells.get(name)) for name in backends)])
    return _aligned(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    # A reference without any error leaves no ratio: its results are exact in the dtype.
    ratio = f"x{row['error'] / row['own']:.2f}" if row["own"] > 0 else "x-"
    return f"{row['error']:.1e} {ratio}"


def compared_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each op: how many comparisons, and the largest share of a bound a backend used."""
    backends = _backends(rows)
    lines = [["op", "comparisons", *backends]]
    for op in sorted({row["op"] for row in rows}):
        mine = [row for row in rows if row["op"] == op]
        shares = {b: [row["share"] for row in mine if row["backend"] == b] for b in backends}
        lines.append(
            [
                op,
                str(sum(row["count"] for row in mine)),
                *(f"{max(shares[b]):.2f}" if shares[b] else "" for b in backends),
            ]
        )
    return _aligned(lines)
