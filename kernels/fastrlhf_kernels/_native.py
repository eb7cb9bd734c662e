"""The compiled extensions `_cpu` and `_cuda`, either of which may be absent, and how to call them.

An extension knows nothing of torch: an op hands over `x.data_ptr()`, sizes, strides in elements and
a dtype tag, and keeps the tensors alive during the call. Errors come back as exceptions.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _env

# The tags of csrc/common.h; `test_native.py` holds them against the extension's own table.
DTYPE_TAGS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_local = threading.local()


def nthreads() -> int:
    """Threads for a call; torch's number is read each time, so that set_num_threads is obeyed."""
    return 1 if getattr(_local, "alone", False) else torch.get_num_threads()


@contextlib.contextmanager
def alone(wanted: bool) -> Iterator[None]:
    """If `wanted`, calls of this Python thread start no others in the block.

    For short work between matrix products: after one torch's threads spin for milliseconds, and
    where cores are few ours then wait for them.
    """
    before = getattr(_local, "alone", False)
    _local.alone = wanted or before
    try:
        yield
    finally:
        _local.alone = before


def _load(name: str) -> tuple[Any, str]:
    """The extension and "", or None and why it is not there, in the words of the build's record."""
    try:
        return importlib.import_module(f"{__package__}.{name}"), ""
    except ImportError as error:
        record = pathlib.Path(__file__).with_name("_build_info.json")
        part = json.loads(record.read_text())[name[1:]] if record.exists() else {}
        return None, part.get("reason", str(error))


# `Any`, not `ModuleType | None`: an op's cpu implementation runs only where `choose` found `cpu`.
cpu: Any
cuda: Any
cpu, cpu_missing = _load("_cpu")
cuda, cuda_missing = _load("_cuda")

if _env.CPU_ISA is not None and isinstance(cpu, ModuleType):
    cpu.set_isa(_env.CPU_ISA)  # a ValueError that lists the sets, if this processor lacks it


def pointer(x: Tensor | None) -> int | None:
    """The address of the first element, None for an absent tensor."""
    return None if x is None else x.data_ptr()


def with_unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is dense in memory, else a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def call(op: str, like: Tensor, *args: Any) -> None:
    """Calls an extension's entry: `_cpu`'s with the threads, `_cuda`'s with the device and stream.

    `like` is one of the op's tensors, and says which. The other arguments are as the C declaration
    in csrc/ has them; every tensor whose pointer is among them must outlive the call.
    """
    if like.is_cuda:
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(cuda, op)(*args, like.device.index, stream)
    else:
        getattr(cpu, op)(*args, nthreads())


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` itself if it is contiguous and of that dtype, else a copy that is."""
    if x.dtype is not dtype:  # Tensor.to costs a microsecond where it has nothing to do
        x = x.to(dtype)
    return x.contiguous()
