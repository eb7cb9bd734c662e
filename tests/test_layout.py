"""The shape of the tree: one op, one file, one name everywhere, and what the kernels may import."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import fastrlhf_kernels
from fastrlhf_kernels._aot import ops

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "fastrlhf_kernels"


@pytest.mark.parametrize("op", ops())
def test_an_op_has_one_name_everywhere(op: str) -> None:
    module = importlib.import_module(f"fastrlhf_kernels.{op}")
    assert op in fastrlhf_kernels.__all__
    assert getattr(fastrlhf_kernels, op) is getattr(module, op)
    assert callable(getattr(module, f"{op}_ref"))
    for folder, name in (("tests", f"test_{op}.py"), ("bench", f"bench_{op}.py")):
        assert (ROOT / folder / name).is_file(), f"{folder}/{name} is missing"
    backends = set(module.IMPLEMENTATIONS)
    assert {"cpu", "triton"} <= backends, f"{op} has only {backends}"
    assert module.AOT_CONFIGS, f"{op} ships no Triton configuration"


@pytest.mark.parametrize("op", ops())
def test_the_public_function_stands_last(op: str) -> None:
    tree = ast.parse((KERNELS / f"{op}.py").read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-1] == op
    assert functions.index(f"{op}_ref") < functions.index(op)
    assert ast.get_docstring(tree), f"{op}.py opens with its mathematics"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_the_standard_library_alone(path: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_there_is_no_package_named_kernels() -> None:
    """It would shadow Hugging Face's `kernels`, which transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_environment_variables_are_read_in_one_file() -> None:
    readers = [p.name for p in KERNELS.glob("*.py") if "os.environ" in p.read_text()]
    assert readers == ["_env.py"]
