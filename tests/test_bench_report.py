"""bench/report.py: the README's table from files of results; bench/common.py: which are ours."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import common
import pytest
import report

from fastrlhf_kernels import _aot
from fastrlhf_kernels._backends import BACKENDS


def row(variant: str, median: float, error: float | None = 1e-6, **changes: Any) -> dict[str, Any]:
    """A row as bench/common.py writes it; 8 MB moved."""
    return {
        "op": "gae",
        "variant": variant,
        "device": "cpu",
        "shape": "B=4 T=8",
        "dtype": "float32",
        "median_s": median,
        "iqr_s": median / 10,
        "rounds": 15,
        "gb_per_s": 8e-3 / median,
        "tflop_per_s": None,
        "share_of_copy": 0.25,
        "peak_bytes": 0,
        "max_error": error,
    } | changes


def record(*benchmarks: list[dict[str, Any]], day: str = "2026-01-02", **commit: Any) -> str:
    return json.dumps(
        {
            "machine_info": {
                "cpu": {"brand_raw": "A processor", "count": 2},
                "torch": "2.13.0",
                "threads": 1,
                "isa": "avx512",
            },
            "commit_info": {"id": "0123456789", "dirty": False} | commit,
            "datetime": f"{day}T10:00:00",
            "benchmarks": [{"extra_info": {"rows": rows}} for rows in benchmarks],
        }
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "results" / "box").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return tmp_path


def run(tree: Path, *flags: str) -> int:
    arguments = ["--results", str(tree / "results"), "--readme", str(tree / "README.md")]
    return report.main([*arguments, *flags])


def table(tree: Path) -> list[str]:
    """The lines of the README, the table of targets left out."""
    assert run(tree) == 0
    lines = (tree / "README.md").read_text().splitlines()
    first = lines.index("| target | wanted | measured | met |")
    return lines[:first] + lines[first + lines[first:].index("") + 1 :]


def test_table(tree: Path) -> None:
    plain = [row("cpu", 1e-3), row("loop", 46e-3), row("compiled", 0.7e-3)]
    product = {"op": "linear", "shape": "N=2", "gb_per_s": None, "tflop_per_s": 0.2}
    head = [
        row("cpu", 0.5, **product),
        row("PyTorch", 0.55, **product),
        row("bare product", 0.4, None, **product),
    ]
    (tree / "results" / "box" / "a.json").write_text(record(plain, head, []))
    assert table(tree) == [
        "before",
        "",
        report.BEGIN,
        "",
        "`box`: A processor, processors: 2; torch 2.13.0; threads: 1; avx512; commit 0123456; "
        "2026-01-02.",
        "",
        "| op | shape | dtype | ours | speed | of ceiling | time of others over ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| **gae** | B=4 T=8 | float32 | cpu 1 ms | 8.0 GB/s | 25% of a copy | **compiled 0.70**; "
        "loop 46 |",
        "| linear | N=2 | float32 | cpu 500 ms | 0.200 TFLOP/s | 80% of bare product | "
        "PyTorch 1.10 |",
        "",
        report.END,
        "",
        "after",
    ]


def test_parts_of_a_comparison_are_one_line(tree: Path) -> None:
    """Ratios are of the rounds that were shared; our time is the median of ours."""
    first = [row("cpu", 1e-3), row("PyTorch", 2e-3)]
    second = [row("cpu", 2e-3), row("TRL", 3e-3), row("two copies", 1e-3, None)]
    scaling = [row("cpu, T=8", 1e-3), row("cpu, T=16", 2e-3)]
    folder = tree / "results" / "box"
    (folder / "b.json").write_text(record(first, day="2026-01-05", dirty=True))
    (folder / "a.json").write_text(record(second, scaling))
    lines = table(tree)
    assert lines[4].endswith("; commit 0123456, 0123456 with changes; 2026-01-02 to 2026-01-05.")
    assert lines[8] == (
        "| gae | B=4 T=8 | float32 | cpu 1.5 ms | 5.3 GB/s | 50% of two copies | TRL 1.50; "
        "PyTorch 2.00 |"
    )
    assert lines[9] == ""


def test_what_could_not_be_timed_is_said(tree: Path) -> None:
    absent = row("TRL", 1.0) | {"median_s": None, "note": "not installed"}
    wrong = row("cpu", 1.0) | {"median_s": None, "note": "WRONG: off by 0.5"}
    folder = tree / "results" / "box"
    (folder / "a.json").write_text(record([row("cpu", 1e-3), absent, row("loop", 46e-3)]))
    (folder / "b.json").write_text(record([wrong | {"op": "whiten"}]))
    lines = table(tree)
    assert lines[8].endswith("| loop 46; TRL: not installed |")
    assert lines[9] == "| **whiten** | B=4 T=8 | float32 | cpu **WRONG: off by 0.5** |  |  |  |"


def test_targets_stand_ahead(tree: Path) -> None:
    (tree / "results" / "box" / "a.json").write_text(record([row("cpu", 1e-3)]))
    assert run(tree) == 0
    text = (tree / "README.md").read_text()
    assert "| gae against verl's loop | at least 15 | not yet measured |  |" in text


def test_check(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tree / "README.md").read_text()
    assert run(tree, "--check") == 1
    assert "out of date; run python bench/report.py" in capsys.readouterr().err
    assert (tree / "README.md").read_text() == before
    assert run(tree) == 0
    assert report.NONE in (tree / "README.md").read_text()
    assert run(tree, "--check") == 0
    (tree / "results" / "box" / "a.json").write_text(record([row("cpu", 1e-3)]))
    assert run(tree, "--check") == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("{", "cannot be read as JSON"), ("[]", "no pytest-benchmark record: machine_info, ")],
)
def test_a_file_that_is_wrong_is_named(
    tree: Path, text: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tree / "results" / "box" / "bad.json"
    path.write_text(text)
    before = (tree / "README.md").read_text()
    assert run(tree) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {wanted}")
    assert len(error.splitlines()) == 1
    assert (tree / "README.md").read_text() == before


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}"])
def test_markers_that_are_missing(
    tree: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "README.md").write_text(text)
    assert run(tree) == 2
    assert capsys.readouterr().err.startswith("error: README: wanted once <!--")
    assert (tree / "README.md").read_text() == text


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        report.main(["--help"])
    assert left.value.code == 0
    assert "--check" in capsys.readouterr().out


def test_the_readme_is_up_to_date() -> None:
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("op", _aot.ops())
def test_benchmarks_ask_only_for_backends_that_an_op_has(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU machine, most of all, where `cuda` is there and most ops do not have it."""
    has = importlib.import_module(f"fastrlhf_kernels.{op}").IMPLEMENTATIONS
    monkeypatch.setattr(common, "available_backends", lambda: BACKENDS)
    monkeypatch.setattr(common, "DEVICE", "cuda")
    assert common.ours(op) == [name for name in ("triton", "cuda") if name in has]
    monkeypatch.setattr(common, "DEVICE", "cpu")
    assert common.ours(op) == ["cpu"]
