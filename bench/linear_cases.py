"""What the benchmarks of the linear heads share: inputs, and bare products as ceilings.

The ceilings are torch.mm into preallocated outputs, by tiles of 4096 columns and all rows, whose
logits are dense. Of whole products and tiles of 512 to 4096 columns and 256 to 2048 rows that is
the fastest on the CPU of bench/NOTES.md, or within noise of it: whole products into (N, 50257) are
a fifth slower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import DEVICE
from torch import Tensor

COLUMNS = 4096
DISTINCT = 256  # rows, over and over: in fp64 all of the largest case do not fit into 80 GB
WIDE = (2048, 512, 50257, torch.float32)  # on a CPU; in bf16 it takes minutes

Shape = tuple[int, int, int]  # N, H, V


def cases(*, cpu: list[Shape], gpu: list[Shape]) -> list[tuple[int, int, int, torch.dtype]]:
    """What to measure here: on a CPU small shapes in both dtypes, and WIDE."""
    if DEVICE == "cuda":
        return [(*shape, torch.bfloat16) for shape in gpu]
    return [(*shape, dtype) for shape in cpu for dtype in (torch.float32, torch.bfloat16)] + [WIDE]


def distinct(N: int) -> int:
    """How many of N rows differ; the others repeat them, with all that belongs to a row."""
    return DISTINCT if N % DISTINCT == 0 else N


def repeated(rows: Tensor, N: int) -> Tensor:
    """N rows made of these."""
    return rows.repeat(N // len(rows), *[1] * (rows.ndim - 1))


def case(N: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), labels (N,)."""
    options = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    hidden = torch.randn(distinct(N), H, **options).to(dtype)
    weight = (torch.randn(V, H, **options) * H**-0.5).to(dtype)
    labels = torch.randint(0, V, (distinct(N),), **options)
    return repeated(hidden, N), weight, repeated(labels, N)


def exact(
    step: Callable[..., tuple[Tensor, ...]],
    hidden: Tensor,
    weight: Tensor,
    *data: Tensor,
    mean: bool = False,
) -> tuple[Tensor, ...]:
    """step(hidden, weight, *data) in fp64, from the rows that differ.

    What it gives are values a row, or with `mean` the mean of such, then the gradients of hidden
    and weight.
    """
    N = len(hidden)
    n = distinct(N)
    for x in (hidden, *data):
        assert torch.equal(repeated(x.detach()[:n], N), x.detach()), "rows that do not repeat"
    rows = hidden.detach()[:n].double().requires_grad_()
    wide = weight.detach().double().requires_grad_()
    value, of_hidden, of_weight = step(rows, wide, *(x.detach()[:n] for x in data))
    if mean:
        return value.detach(), repeated(of_hidden * (n / N), N), of_weight
    return repeated(value.detach(), N), repeated(of_hidden, N), of_weight * (N / n)


def products(hidden: Tensor, weight: Tensor, kinds: str) -> Callable[[], None]:
    """The bare products: z the logits, w the weight's gradient, h that of hidden."""
    hidden, weight = hidden.detach(), weight.detach()
    N, V = hidden.shape[0], weight.shape[0]
    logits = torch.empty(N * min(V, COLUMNS), dtype=hidden.dtype, device=hidden.device)
    logits.normal_()
    dw, dh = torch.empty_like(weight), torch.empty_like(hidden)

    def run() -> None:
        for kind in kinds:
            for v0 in range(0, V, COLUMNS):
                w = weight[v0 : v0 + COLUMNS]
                z = logits[: N * w.shape[0]].view(N, -1)
                if kind == "z":
                    torch.mm(hidden, w.T, out=z)
                elif kind == "w":
                    torch.mm(z.T, hidden, out=dw[v0 : v0 + COLUMNS])
                else:
                    torch.addmm(dh, z, w, beta=0.0 if v0 == 0 else 1.0, out=dh)

    return run
