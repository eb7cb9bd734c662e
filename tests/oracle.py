"""What the op tests share: which backends to run, and when a result is right.

The rule: the error against an fp64 oracle is at most twice that of the plain PyTorch reference in
the same dtype, plus a few units in the last place. Nothing here is loosened to pass.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import _linear, _native, _triton, available_backends

# Units in the last place, of the oracle's value, allowed on top of twice the reference's error.
ULPS = {torch.float64: 4.0, torch.float32: 4.0, torch.float16: 0.51, torch.bfloat16: 0.51}
# Triton's interpreter truncates what it stores in bf16, where a GPU rounds: one unit, not half.
INTERPRETED_BF16_ULPS = 1.01

# Under these names tests hand what they measured to errors_table.py, in their `user_properties`.
MEASURED = "fastrlhf_measured"  # dict(op, dtype, what, backend, error, own)
COMPARED = "fastrlhf_compared"  # dict(op, backend, count, share)


class Backend(NamedTuple):
    """A backend under test, and the device its tensors live on."""

    name: str
    device: str
    isa: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"


def backends_for(op: str) -> list[pytest.param]:
    """Parameters for every backend of an op: ref, cpu with each instruction set, triton, cuda."""
    module = importlib.import_module(f"fastrlhf_kernels.{op}")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    params = [pytest.param(Backend("ref", gpu), id="ref")]
    for name in getattr(module, "IMPLEMENTATIONS", {}):
        if name not in available_backends():
            why = {
                "cpu": f"C++ extension not built: {_native.cpu_missing}",
                "cuda": "no GPU, or the CUDA extension is not built",
                "triton": str(_triton.missing),
            }[name]
            params.append(
                pytest.param(Backend(name, gpu), id=name, marks=pytest.mark.skip(reason=why))
            )
        elif name == "cpu":
            for isa in _native.cpu.isas():
                params.append(pytest.param(Backend("cpu", "cpu", isa), id=f"cpu-{isa}"))
        else:
            params.append(pytest.param(Backend(name, gpu), id=name))
    return params


@contextlib.contextmanager
def instruction_set(isa: str | None) -> Iterator[None]:
    """The CPU backend on one instruction set."""
    if isa is None:
        yield
        return
    before = _native.cpu.isa()
    _native.cpu.set_isa(isa)
    try:
        yield
    finally:
        _native.cpu.set_isa(before)


def reference_of_head(
    reference: Callable[..., Any], backend: Backend, hidden: Tensor, weight: Tensor
) -> Callable[..., Any]:
    """The plain PyTorch result that an op of the output head is measured against.

    The references multiply in fp32. On a CPU with AMX a product of bf16 operands is rounded to
    bf16, by the ops as by torch: there it is torch's own product that the reference goes on from.
    """
    if backend.name == "ref" or not _linear.bf16_products(hidden, weight):
        return reference

    def of_rounded_product(hidden: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Any:
        logits = hidden @ weight.T
        return reference(logits, torch.eye(logits.shape[-1]), *args, **settings)  # exact from here

    return of_rounded_product


class Comparisons:
    """Counts what `assert_accurate` compares, and the largest share of a bound that was used."""

    def __init__(self) -> None:
        self.count, self.share = 0, 0.0

    def add(self, share: float) -> None:
        self.count += 1
        self.share = max(self.share, share)


_comparisons: Comparisons | None = None


@contextlib.contextmanager
def counting() -> Iterator[Comparisons]:
    """Counts the comparisons of a block."""
    global _comparisons
    before, _comparisons = _comparisons, Comparisons()
    try:
        yield _comparisons
    finally:
        _comparisons = before


def assert_accurate(
    actual: Tensor,
    reference: Tensor,
    oracle: Tensor,
    *,
    interpreted: bool = False,
    terms: float | Tensor = 0.0,
) -> None:
    """Holds `actual` to the rule at the top of this file.

    Args:
        actual: the result under test.
        reference: the plain PyTorch result, of the same dtype.
        oracle: the fp64 result. NaN and infinities must stand in the same places in `actual`.
        interpreted: `actual` comes from Triton's interpreter.
        terms: for the sum of terms that may cancel, the sum of their sizes, whose units in the last
            place are then what is allowed.
    """
    actual, reference, oracle = (x.detach().cpu() for x in (actual, reference, oracle))
    assert actual.dtype == reference.dtype, (actual.dtype, reference.dtype)
    assert actual.shape == reference.shape == oracle.shape
    assert oracle.dtype == torch.float64
    finite = oracle.isfinite()
    same = (actual.double() == oracle) | (actual.isnan() & oracle.isnan())
    assert bool((same | finite).all()), "NaN or infinity differs from the oracle"
    if not bool(finite.any()):
        return
    own = (reference.double() - oracle)[finite].abs().max()
    info = torch.finfo(actual.dtype)
    ulps = ULPS[actual.dtype]
    if interpreted and actual.dtype == torch.bfloat16:
        ulps = INTERPRETED_BF16_ULPS
    bound = 2.0 * own + ulps * info.eps * oracle.abs().clamp(min=terms) + info.tiny
    error = (actual.double() - oracle).abs()
    if _comparisons is not None:
        _comparisons.add(float((error / bound)[finite].max()))
    worst = (error - bound).nan_to_num(nan=torch.inf, posinf=torch.inf)[finite].max()
    assert float(worst) <= 0.0, (
        f"error {float(error[finite].max()):.3g} is past the bound by {float(worst):.3g}; "
        f"the reference's own error is {float(own):.3g}"
    )


def assert_same_bits(x: Tensor, y: Tensor) -> None:
    """Equal, NaN with NaN, to the last bit."""
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    equal = (x == y) | (x.isnan() & y.isnan())
    assert bool(equal.all()), f"{int((~equal).sum())} of {x.numel()} elements differ"
