"""The command line in real processes: exit codes, one-line errors, and no heavy import for help."""

from __future__ import annotations

import inspect
import itertools
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

import pytest

import fastrlhf_kernels as kernels
from fastrlhf.commands import COMMANDS
from fastrlhf_kernels import _aot

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def fastrlhf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return python("-m", "fastrlhf", *arguments)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


STAGE = """
import time
from dataclasses import dataclass
from pathlib import Path
from fastrlhf.errors import NonFiniteLoss, UserError

@dataclass(slots=True)
class Config:
    out: Path = Path("out")
    \"\"\"The folder of the run.\"\"\"

"""


def program(folder: Path, body: str) -> str:
    """Write a program whose command line has one command more, `probe`, made of `body`."""
    (folder / "stage.py").write_text(STAGE + textwrap.dedent(body))
    path = folder / "program.py"
    path.write_text(
        "import sys\nfrom fastrlhf import cli\nfrom fastrlhf.commands import COMMANDS, Command\n"
        "COMMANDS['probe'] = Command('stage', 'Config', 'a probe', True)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    return str(path)


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def test_help_lists_every_command_at_once() -> None:
    # The best of three: the machine may be busy, the imports stay the same.
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        result = fastrlhf("--help")
        times.append(time.perf_counter() - begin)
    assert result.returncode == 0
    assert result.stderr == ""
    for name, command in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert command.summary in result.stdout
    assert min(times) < 0.5


def test_help_imports_neither_torch_nor_tyro() -> None:
    result = python(
        "-c",
        "import sys; from fastrlhf.cli import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'tyro', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)",
    )
    assert result.returncode == 0, result.stderr


def test_no_command_and_unknown_command() -> None:
    assert fastrlhf().returncode == 2
    result = fastrlhf("pretrian")
    assert result.returncode == 2
    assert one_error_line(result).startswith(
        "unknown command 'pretrian' (did you mean 'pretrain'?); valid: pretrain, sft, rm, ppo, "
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise UserError.at('a', 3, 'x', 'bad')", 2, "a:3: field 'x': bad"),
        ("raise UserError('two\\nlines')", 2, "two lines"),
        (
            "raise NonFiniteLoss.at('ppo', 7, 'runs/c-5')",
            3,
            "ppo: the loss is not finite at step 7; the last good checkpoint is runs/c-5",
        ),
        (
            "raise KeyboardInterrupt",
            130,
            "interrupted; the same command with --resume goes on from the last checkpoint",
        ),
        ("open('/dev/null/x', 'w')", 2, "/dev/null/x: Not a directory"),
        ("open('/dev/full', 'w').write('x' * 10**6)", 2, "No space left on device"),
    ],
)
def test_exit_codes(body: str, code: int, message: str, tmp_path: Path) -> None:
    result = python(program(tmp_path, f"def run(config): {body}"), "probe")
    assert result.returncode == code, result.stderr
    assert one_error_line(result) == message


def test_a_command_that_succeeds(tmp_path: Path) -> None:
    result = python(program(tmp_path, "def run(config): print(config.out)"), "probe", "--out", "x")
    assert (result.returncode, result.stdout, result.stderr) == (0, "x\n", "")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    result = python(program(tmp_path, "import nowhere_to_be_found"), "probe")
    assert result.returncode == 2
    assert one_error_line(result) == (
        "'fastrlhf probe' needs the package 'nowhere_to_be_found': pip install 'fastrlhf[train]'"
    )


@pytest.mark.parametrize("body", ["1 / 0", "import fastrlhf.nowhere", "raise OSError(5, 'disk')"])
def test_a_defect_keeps_its_traceback(body: str, tmp_path: Path) -> None:
    result = python(program(tmp_path, f"def run(config): {body}"), "probe")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "stage.py" in result.stderr


def test_help_of_a_command_shows_its_documented_fields(tmp_path: Path) -> None:
    result = python(program(tmp_path, "def run(config): pass"), "probe", "--help")
    assert result.returncode == 0
    assert "--out PATH" in result.stdout
    assert "The folder of the run." in result.stdout


def test_a_misspelt_flag_and_a_bad_config_exit_with_2(tmp_path: Path) -> None:
    path = program(tmp_path, "def run(config): pass")
    result = python(path, "probe", "--outt", "x")
    assert result.returncode == 2
    assert "--outt" in result.stderr
    config = tmp_path / "run.toml"
    config.write_text("[probe]\nouut = 'x'\n")
    result = python(path, "probe", "--config", str(config))
    assert result.returncode == 2
    assert one_error_line(result) == (
        f"{config}:2: field 'ouut': unknown key (did you mean 'out'?); valid keys: out"
    )


def test_a_real_interrupt_exits_with_130(tmp_path: Path) -> None:
    body = "def run(config):\n    print('ready', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, program(tmp_path, body), "probe"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell runs in the background inherits an ignored SIGINT; a user does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in error
    assert len(error.splitlines()) == 1


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    body = "def run(config):\n    print('ready', flush=True)\n    while True: print('more' * 9999)"
    process = subprocess.Popen(
        [sys.executable, program(tmp_path, body), "probe"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_doctor_says_what_is_active() -> None:
    result = fastrlhf("doctor")
    assert result.returncode == 0, result.stderr
    cells = [line.split() for line in result.stdout.splitlines() if line.strip()]
    rows = {first: rest for first, *rest in cells}
    assert rows["python"] == [platform.python_version()]
    assert rows["torch"] == [metadata.version("torch")]
    assert rows["ref"] == ["available"]
    for backend in ("cpu", "triton", "cuda"):
        assert rows[backend][0] in ("available", "available,", "no:")
    # Every public op was run, and none disagrees with its reference.
    functions = {name: getattr(kernels, name) for name in kernels.__all__}
    ops = [
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters
    ]
    for op in set(ops) - {"use_backend"}:
        assert rows[op][0] == "yes", op
        assert set(rows[op]) <= {"yes", "none", "-"}, op


def test_doctor_sees_a_kernel_that_is_wrong() -> None:
    result = python(
        "-c",
        "import sys, fastrlhf_kernels, fastrlhf.cli as cli\n"
        "whiten, calls = fastrlhf_kernels.whiten, []\n"
        "def off(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    return whiten(*args, **kwargs) + (0.01 if len(calls) == 2 else 0.0)\n"
        "fastrlhf_kernels.whiten = off\n"
        "sys.exit(cli.main(['doctor']))",
    )
    assert result.returncode == 2
    assert one_error_line(result) == "kernels disagree with their reference: whiten on ref"


def doctor(*arguments: str, code: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, outside the interpreter, after a line of Python."""
    program = (
        f"import sys, fastrlhf.cli as cli\n{code}\nsys.exit(cli.main({['doctor', *arguments]}))"
    )
    keep = {k: v for k, v in environment().items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**keep, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_doctor_lists_what_kernels_need() -> None:
    pytest.importorskip("triton")
    result = doctor("--ops", "gae")
    assert result.returncode == 0, result.stderr
    table = result.stdout.partition("kernels, compiled ahead of time\n")[2].partition("\n\n")[0]
    head, *rows = table.splitlines()
    assert head.split() == ["op", "kernel", "target", "registers", "spilled", "shared", "memory"]
    for config, target in itertools.product(_aot.configs("gae"), _aot.TARGETS):
        (row,) = [r for r in rows if f" {config.name}  " in r and f" {target} " in r]
        assert re.search(r" \d+ +0 B +\d+ of \d+ B$", row), row
    if _aot.nvcc() is not None and "gae" in _aot.cuda_ops():
        for target in _aot.CUDA_TARGETS:
            assert sum("gae_kernel<float>" in r and f" {target} " in r for r in rows) == 1
    assert "compile" in result.stderr  # how far it is


def test_doctor_says_which_compiler_is_missing() -> None:
    code = (
        "from fastrlhf_kernels import _aot, _triton\n"
        "_aot.nvcc = lambda: None\n"
        "_triton.tl, _triton.missing = None, 'triton is not installed (no module)'"
    )
    result = doctor("--ops", "gae", code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [
        "Triton kernels are not compiled: triton is not installed (no module)",
        "CUDA kernels are not compiled: there is no nvcc on the path",
    ]


def test_doctor_fails_where_a_kernel_spills() -> None:
    code = (
        "from fastrlhf_kernels import _aot\n"
        "_aot.compile_cuda = lambda op, target: []\n"
        "_aot.compile_config = lambda op, config, target: _aot.Compiled(\n"
        "    op, config.name, target, 255, 8 * (target == 'sm_80'), 0, 0)\n"
    )
    result = doctor("--ops", "gae_varlen", code=code)
    assert result.returncode == 2
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: kernels spill or do not fit: ")
    assert message.count("sm_80") == len(_aot.configs("gae_varlen")) == message.count(" for ")


def test_doctor_names_the_valid_ops() -> None:
    result = doctor("--ops", "gae", "whitten")
    assert result.returncode == 2
    assert result.stdout == ""
    assert one_error_line(result) == (
        f"field 'ops': no op 'whitten' (did you mean 'whiten'?); valid: {', '.join(_aot.modules())}"
    )


def test_doctor_refuses_to_compile_in_the_interpreter() -> None:
    result = doctor("--kernels", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert one_error_line(result) == (
        "--kernels: TRITON_INTERPRET=1 leaves nothing to compile; unset it"
    )
