"""What the benchmarks of the linear heads share: inputs, bare products as ceilings, peers.

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

# With too many variants a comparison takes minutes: one beside the ceilings, two beside the others.
PARTS = ["ceilings", "torch", "peers"]


def case(N: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), labels (N,)."""
    options = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    hidden = torch.randn(N, H, **options).to(dtype)
    weight = (torch.randn(V, H, **options) * H**-0.5).to(dtype)
    return hidden, weight, torch.randint(0, V, (N,), **options)


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


def trl_logprobs() -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]] | None:
    """TRL's chunked head: (hidden, weight, labels, whether with entropy)."""
    try:
        from trl.trainer.utils import _ChunkedLogProbFunction
    except ImportError:
        return None

    def call(h: Tensor, w: Tensor, y: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        outputs = ("entropy",) if entropy else ()
        logprobs, found, *_ = _ChunkedLogProbFunction.apply(
            h, w, None, y, 1.0, 32768, None, 1.0, outputs
        )
        return logprobs, found

    return call
