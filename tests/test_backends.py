"""Which backend an op runs on, and what happens where one is missing."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from fastrlhf_kernels import (
    BackendUnavailable,
    _backends,
    _native,
    available_backends,
    gae,
    use_backend,
)
from fastrlhf_kernels._backends import choose

CPU = (torch.zeros(2),)
ALL = ("cpu", "triton", "cuda")


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has every backend, asked for none, and has not warned yet."""
    monkeypatch.setattr(_backends, "_MISSING", dict.fromkeys(_backends.BACKENDS))
    monkeypatch.setattr(_backends._env, "BACKEND", None)
    monkeypatch.setattr(_backends, "_warned", False)


def test_argument_beats_context_beats_environment_beats_device(
    everything: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose("op", CPU, None, ALL) == "cpu"
    monkeypatch.setattr(_backends._env, "BACKEND", "ref")
    assert choose("op", CPU, None, ALL) == "ref"
    monkeypatch.setattr(_backends._env, "BACKEND", "cpu")
    with use_backend("ref"):
        assert choose("op", CPU, None, ALL) == "ref"
        with use_backend("cpu"):
            assert choose("op", CPU, None, ALL) == "cpu"
            assert choose("op", CPU, "ref", ALL) == "ref"
        assert choose("op", CPU, None, ALL) == "ref"
    assert choose("op", CPU, None, ALL) == "cpu"


def test_context_is_left_after_an_error(everything: None) -> None:
    with pytest.raises(KeyError), use_backend("ref"):
        raise KeyError
    assert choose("op", CPU, None, ALL) == "cpu"


def test_asked_for_and_missing_raises(everything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends._MISSING, "cpu", "there is no compiler")
    message = "backend 'cpu' is not available: there is no compiler"
    with pytest.raises(BackendUnavailable, match=message):
        choose("op", CPU, "cpu", ALL)
    with pytest.raises(BackendUnavailable, match=message), use_backend("cpu"):
        pass
    assert available_backends() == ("ref", "triton", "cuda")
    with pytest.raises(BackendUnavailable, match="op has no 'cuda' backend"):
        choose("op", CPU, "cuda", ("cpu",))
    with pytest.raises(ValueError, match="must be one of ref, cpu, triton, cuda, got 'CPU'"):
        choose("op", CPU, "CPU", ALL)


def test_unasked_fallback_warns_once(everything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends._MISSING, "cpu", "there is no compiler")
    with pytest.warns(RuntimeWarning, match="there is no compiler"):
        assert choose("op", CPU, None, ALL) == "ref"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", CPU, None, ALL) == "ref"


def test_a_backend_refuses_tensors_it_does_not_take(
    everything: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = (torch.zeros(2, device="meta"),)
    with pytest.raises(ValueError, match="op: backend 'cpu' takes CPU tensors, got meta"):
        choose("op", meta, "cpu", ALL)
    with pytest.raises(ValueError, match="op: backend 'cuda' takes CUDA tensors, got cpu"):
        choose("op", CPU, "cuda", ALL)
    with pytest.raises(ValueError, match="op: backend 'triton' does not compute in fp64"):
        choose("op", (torch.zeros(2, device="meta").double(),), "triton", ALL)
    monkeypatch.setattr(_backends._env, "INTERPRET", False)
    with pytest.raises(ValueError, match="op: backend 'triton' takes GPU tensors, got cpu"):
        choose("op", CPU, "triton", ALL)


def test_environment_is_read_at_import() -> None:
    program = (
        "import torch, fastrlhf_kernels as k\n"
        "from fastrlhf_kernels._backends import choose\n"
        "print(choose('op', (torch.zeros(1),), None, ('cpu',)))"
    )

    def run(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            env={"FASTRLHF_BACKEND": value},
            capture_output=True,
            text=True,
        )

    assert run("ref").stdout == "ref\n"
    assert "FASTRLHF_BACKEND must be one of ref, cpu, triton, cuda, got 'gpu'" in run("gpu").stderr


def test_context_reaches_compiled_code() -> None:
    plain = torch.randn(2, 5)
    compiled = torch.compile(lambda x: gae(x, x)[0], fullgraph=True, backend="aot_eager")
    for name in available_backends():
        x = plain.cuda() if name != "cpu" and torch.cuda.is_available() else plain
        with use_backend(name):
            assert torch.equal(compiled(x), gae(x, x)[0])


@pytest.mark.skipif(_native.cpu is None, reason="C++ extension not built")
def test_dtype_tags_are_those_of_the_extension() -> None:
    tags = {str(dtype).removeprefix("torch."): tag for dtype, tag in _native.DTYPE_TAGS.items()}
    assert tags == _native.cpu.DTYPES
