"""Set-up for all tests: Triton's interpreter where there is no GPU, backends, hypothesis.

A test module of an op says `OP = "<op>"`; its tests that take `backend` then run once on every
backend that the op has: ref, cpu with each instruction set, triton (interpreted without a GPU),
cuda. `@pytest.mark.not_on(what, why)` names a backend, "ref on a GPU" or "interpreted", of which
the test says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

from oracle import COMPARED, Backend, backends_for, counting, instruction_set

# The same examples in every run, so that a failure is one of the code. To look for new ones:
# pytest --hypothesis-profile=explore
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("fixed", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("few", max_examples=3, derandomize=True, **_COMMON)  # under a sanitizer
settings.register_profile("explore", max_examples=500, **_COMMON)
settings.load_profile("fixed")


def _called(backend: Backend) -> set[str]:
    """The names under which `not_on` knows a backend."""
    names = {backend.name}
    if backend.interpreted:
        names.add("interpreted")
    if backend.name == "ref" and backend.device == "cuda":
        names.add("ref on a GPU")
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        without = {mark.args[0] for mark in metafunc.definition.iter_markers("not_on")}
        params = [
            param
            for param in backends_for(metafunc.module.OP)
            if not _called(param.values[0]) & without
        ]
        metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with instruction_set(request.param.isa), counting() as found:
        yield request.param
    if found.count and request.param.name != "ref":
        row = {"op": request.module.OP, "backend": request.param.label}
        row |= {"count": found.count, "share": found.share}
        request.node.user_properties.append((COMPARED, row))


pytest_plugins = ["trainer_fixtures", "errors_table"]
