"""Every environment variable that the kernels read, read here, once, at import.

| variable           | values                         | effect                                     |
|--------------------|--------------------------------|--------------------------------------------|
| `FASTRLHF_BACKEND` | `ref`, `cpu`, `triton`, `cuda` | backend of every op where the call names   |
|                    |                                | none                                       |
| `FASTRLHF_CPU_ISA` | `baseline`, `avx2`, `avx512`   | instruction set of the `cpu` backend;      |
|                    |                                | default: the widest that the processor has |
| `FASTRLHF_DEBUG`   | `0`, `1`                       | `1`: check the values of labels, sizes and |
|                    |                                | offsets on a GPU too; each check waits for |
|                    |                                | the GPU                                    |
| `TRITON_INTERPRET` | `0`, `1`                       | Triton's own: `1` runs kernels in Python,  |
|                    |                                | on CPU tensors; set it before the import   |
"""

from __future__ import annotations

import os

__all__ = ["BACKEND", "CPU_ISA", "DEBUG", "INTERPRET"]


def _choice(name: str, choices: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "")
    if value == "":
        return None
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


BACKEND = _choice("FASTRLHF_BACKEND", ("ref", "cpu", "triton", "cuda"))
CPU_ISA = _choice("FASTRLHF_CPU_ISA", ("baseline", "avx2", "avx512"))
DEBUG = _choice("FASTRLHF_DEBUG", ("0", "1")) == "1"
INTERPRET = _choice("TRITON_INTERPRET", ("0", "1")) == "1"
