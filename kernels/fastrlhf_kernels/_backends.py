"""Which implementation an op runs: `ref`, `cpu`, `triton` or `cuda`.

The first of these that is given decides:

1. the call's `backend=` argument;
2. the innermost `use_backend(...)`, which holds for the whole process, all threads;
3. `FASTRLHF_BACKEND`, read once at import;
4. the device of the op's first tensor: `cpu` for CPU tensors, `triton` for GPU tensors.

A backend that is asked for (1 to 3) and missing raises `BackendUnavailable`. In case 4 a missing
backend falls back to `ref`, with one warning a process.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _env, _native, _triton

__all__ = ["BACKENDS", "BackendUnavailable", "available_backends", "choose", "use_backend"]

BACKENDS = ("ref", "cpu", "triton", "cuda")

# A plain global, not a context variable: torch.compile guards on it and so stays in one graph.
_override: str | None = None
_warned = False


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and this machine, build or op does not have it."""


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs every op in the block on `backend`, unless the call names another.

    Holds for the whole process, other threads included. `use_backend` nests.

    Raises:
        ValueError: `backend` is not one of ref, cpu, triton, cuda.
        BackendUnavailable: it is, and is not available here.
    """
    global _override
    _require(backend)
    previous, _override = _override, backend
    try:
        yield
    finally:
        _override = previous


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine with this build, `ref` first."""
    return tuple(name for name in BACKENDS if _MISSING[name] is None)


def choose(
    op: str, tensors: tuple[Tensor, ...], backend: str | None, implementations: Container[str]
) -> str:
    """The backend on which `op` runs for these tensors.

    Args:
        op: name of the op, for messages.
        tensors: the op's floating tensors; the first one's device decides. triton and cuda do not
            compute in fp64: asked for, they raise; not asked for, fp64 runs on `ref`.
        backend: the call's own argument.
        implementations: the backends which the op has, beside `ref`.

    Raises:
        BackendUnavailable: the backend asked for is not there, or the op does not have it.
        ValueError: there is no such backend, or it does not take these tensors.
    """
    asked = backend or _override or _env.BACKEND
    if (
        (asked is None or asked == "cpu")
        and _MISSING["cpu"] is None
        and tensors[0].is_cpu
        and "cpu" in implementations
    ):
        return "cpu"  # the common case on a CPU, first; what follows would say the same
    if asked is not None:
        _require(asked)
        if asked != "ref" and asked not in implementations:
            raise BackendUnavailable(f"{op} has no {asked!r} backend")
        refusal = _refusal(asked, tensors)
        if refusal is not None:
            raise ValueError(f"{op}: {refusal}")
        return asked
    wanted = "cpu" if tensors[0].device.type == "cpu" else "triton"
    why = _MISSING[wanted] or _refusal(wanted, tensors)
    if why is None and wanted not in implementations:
        why = f"{op} has no {wanted!r} backend"
    if why is None:
        return wanted
    _warn_fallback(why)
    return "ref"


def _why_missing(backend: str) -> str | None:
    """Why `backend` cannot run here and how to get it; None if it can."""
    again = "and run `pip install -e .` again"
    if backend == "cpu" and _native.cpu is None:
        return f"the C++ extension is not built ({_native.cpu_missing}); install a compiler {again}"
    if backend == "triton":
        return _triton.missing
    if backend == "cuda" and _native.cuda is None:
        return f"the CUDA extension is not built ({_native.cuda_missing}); install nvcc {again}"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


_MISSING = {backend: _why_missing(backend) for backend in BACKENDS}


def _require(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    why = _MISSING[backend]
    if why is not None:
        raise BackendUnavailable(f"backend {backend!r} is not available: {why}")


def _refusal(backend: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why an available backend does not take these tensors; None if it does."""
    device = tensors[0].device
    if backend == "cpu" and device.type != "cpu":
        return f"backend 'cpu' takes CPU tensors, got {device}"
    if backend == "cuda" and device.type != "cuda":
        return f"backend 'cuda' takes CUDA tensors, got {device}"
    if backend == "triton" and device.type == "cpu" and not _env.INTERPRET:
        return (
            f"backend 'triton' takes GPU tensors, got {device} "
            "(CPU tensors need TRITON_INTERPRET=1, set before the import)"
        )
    if backend in ("triton", "cuda") and any(x.dtype == torch.float64 for x in tensors):
        return f"backend {backend!r} does not compute in fp64; 'ref' does, and 'cpu'"
    return None


def _warn_fallback(why: str) -> None:
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"fastrlhf_kernels runs on its PyTorch reference, which is slow: {why}. "
        "Said once; name backend='ref' to say that this is what you want.",
        RuntimeWarning,
        stacklevel=4,
    )
