"""One plain call of every op: no backend's error is more than twice the reference's own.

The result and the gradient, in fp32 and bf16, against the reference in fp64 on the same numbers.
The op's own tests hold the elementwise rule, with oracles written independently and with awkward
inputs; this one measures, for the table at the end of the run, and holds the largest error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors_table import compared_lines, measured_lines
from op_cases import Call, call_of, floating, with_gradients
from oracle import (
    INTERPRETED_BF16_ULPS,
    MEASURED,
    ULPS,
    Backend,
    backends_for,
    instruction_set,
    reference_of_head,
)
from torch import Tensor

from fastrlhf_kernels._aot import ops


def cases() -> list[pytest.param]:
    return [
        pytest.param(op, *param.values, id=f"{op}-{param.id}", marks=param.marks)
        for op in ops()
        for param in backends_for(op)
        if param.id != "ref"
    ]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Over all results or gradients of a call."""
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).abs().max()) for x, y in pairs)


def plain_torch(call: Call, backend: Backend) -> Callable[..., Any]:
    """What a backend's error is measured against."""
    if "weight" not in call.arguments:
        return call.reference

    def of_head(hidden: Tensor, weight: Tensor, **others: Any) -> Any:
        return call.reference(hidden=hidden, weight=weight, **others)

    operands = (call.arguments["hidden"], call.arguments["weight"])
    return reference_of_head(of_head, backend, *operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "backend"), cases())
def test_no_backend_is_worse_than_twice_the_reference(
    request: pytest.FixtureRequest, op: str, backend: Backend, dtype: torch.dtype
) -> None:
    call = call_of(op, dtype, backend.device)
    with instruction_set(backend.isa):
        found = with_gradients(lambda **a: call(backend.name, **a), call, call.arguments)
    own = with_gradients(plain_torch(call, backend), call, call.arguments)
    exact = with_gradients(call.reference, call, floating(call.arguments, torch.float64))
    for what, ours, theirs, oracle in zip(("result", "gradient"), found, own, exact, strict=True):
        if not oracle:
            continue
        error, reference = largest_error(ours, oracle), largest_error(theirs, oracle)
        bf16 = ours[0].dtype == torch.bfloat16
        ulps = INTERPRETED_BF16_ULPS if bf16 and backend.interpreted else ULPS[ours[0].dtype]
        unit = torch.finfo(ours[0].dtype).eps * max(float(y.abs().max()) for y in oracle)
        row = {
            "op": op,
            "dtype": str(dtype).removeprefix("torch."),
            "what": what,
            "backend": backend.label,
            "error": error,
            "own": reference,
        }
        request.node.user_properties.append((MEASURED, row))
        assert error <= 2.0 * reference + ulps * unit, row


def test_lines_of_the_tables() -> None:
    row = {"op": "gae", "dtype": "float32", "what": "result", "backend": "cpu-avx2"}
    rows = [
        row | {"error": 2e-7, "own": 1e-7},
        row | {"what": "gradient", "error": 1e-7, "own": 0.0},
        row | {"backend": "triton", "error": 1e-7, "own": 1e-7},
    ]
    assert measured_lines(rows) == [
        "op   dtype    of        reference  cpu-avx2       triton",
        "gae  float32  result    1.0e-07    2.0e-07 x2.00  1.0e-07 x1.00",
        "gae  float32  gradient  0.0e+00    1.0e-07 x-",
    ]
    counts = [
        {"op": "gae", "backend": "cpu-avx2", "count": 3, "share": 0.5},
        {"op": "gae", "backend": "cpu-avx2", "count": 4, "share": 0.25},
        {"op": "whiten", "backend": "triton", "count": 2, "share": 1.0},
    ]
    assert compared_lines(counts) == [
        "op      comparisons  cpu-avx2  triton",
        "gae     7            0.50",
        "whiten  2                      1.00",
    ]
