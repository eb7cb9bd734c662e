"""bench/gpu.sh: wrong arguments, what was done before, and every section's code without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("build", "doctor", "tests", "sanitizer", "bench", "ppo", "sweep", "demo")


def run(*arguments: str | Path, root: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """The script, with this interpreter; what it starts is no part of this test run."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(
        [str(root / "bench" / "gpu.sh"), *map(str, arguments)],
        env=env | {"PYTHON": sys.executable} | changes,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def assert_refused(done: subprocess.CompletedProcess, *named: str) -> None:
    """Exit code 2 and one line that names what was wrong."""
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("bench/gpu.sh: ")
    assert all(name in line for name in named), line


def test_the_folder_must_be_named() -> None:
    assert_refused(run(), "OUTDIR is missing")
    assert_refused(run("--dry-run"), "OUTDIR is missing")


@pytest.mark.parametrize("seconds", ["x", "0", "-3", "1.5", None])
def test_seconds_must_be_a_number(seconds: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [] if seconds is None else [seconds, out]
    assert_refused(run("--seconds", *given), "--seconds wants a number", f"'{seconds or ''}'")
    assert not out.exists()


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    for option in ("--dryrun", "-n"):
        assert_refused(run(option, tmp_path / "out"), f"unknown option {option}")
    assert not list(tmp_path.iterdir())


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    done = run("--dry-run", tmp_path, "doctor", "benches")
    assert_refused(done, "no section 'benches'", *SECTIONS)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--dry-run", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("bench/gpu.sh: cannot write to ")


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    assert_refused(run("--dry-run", tmp_path, PYTHON="no-such-python"), "no no-such-python")


def test_help_is_the_head_of_the_script() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--dry-run OUTDIR" in done.stdout
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [name for name in listed if name in SECTIONS] == list(SECTIONS)


def test_what_was_done_before_is_not_done_again(tmp_path: Path) -> None:
    for name in SECTIONS:
        if name != "doctor":
            (tmp_path / f"{name}.ok").touch()
    done = run("--dry-run", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [x for x in said if x.endswith("done before")] == [
        f"== {name}: done before" for name in SECTIONS if name != "doctor"
    ]
    assert [x for x in said if "(at most " in x] == ["== doctor (at most 60 s)"]
    assert {p.name for p in tmp_path.glob("*.log")} == {"doctor.log"}
    assert (tmp_path / "doctor.ok").exists()
    again = run("--dry-run", tmp_path)
    assert again.returncode == 0
    assert again.stdout.splitlines() == [f"== {name}: done before" for name in SECTIONS]
    # Asked for by name, a section is run whether it was done before or not.
    assert "== doctor: ok" in run("--dry-run", tmp_path, "doctor").stdout


def test_a_section_that_fails_is_named_and_not_ticked_off(tmp_path: Path) -> None:
    (tmp_path / "demo.ok").touch()
    done = run("--dry-run", tmp_path, "demo", PYTHON="false")
    assert done.returncode == 1
    assert "== demo: FAILED with 1" in done.stdout
    assert done.stdout.splitlines()[-1] == "not done: demo"
    assert not (tmp_path / "demo.ok").exists()
    assert "FAILED" in (tmp_path / "demo.log").read_text()


def test_no_section_begins_when_the_time_is_over(tmp_path: Path) -> None:
    done = run("--dry-run", "--seconds", "5", tmp_path, "doctor", "demo")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "== doctor: not begun, the time is over",
        "== demo: not begun, the time is over",
        "not done: doctor demo",
    ]


@pytest.mark.slow
def test_every_section_runs_without_a_gpu(tmp_path: Path) -> None:
    """On a copy of the tree: to build in place would replace the extensions that others use."""
    root, out = tmp_path / "tree", tmp_path / "out"
    root.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    made = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "results")
    for name in ("bench", "configs", "csrc", "fastrlhf", "kernels", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=made)
    done = run("--dry-run", out, root=root, FASTRLHF_SKIP_NATIVE="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for name in SECTIONS:
        assert (out / f"{name}.ok").exists(), name
        assert (out / f"{name}.log").read_text().strip(), name
    (results,) = (out / "bench").glob("*/shape_rewards.json")
    assert json.loads(results.read_text())["benchmarks"]
    for name in ("ppo", "sweep"):
        assert json.loads((out / f"{name}.json").read_text()), name
    assert (out / "tests.xml").stat().st_size > 0
