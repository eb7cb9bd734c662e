"""Matrix products of a decode step: y = x @ weight.T + bias, several weights at once.

A step multiplies few rows with all weights of the model, and takes as long as reading those takes.
On a CPU a run makes copies in a layout that is read end to end: as much memory again as the weights
take, freed when the run is over. fp32 goes by our own panels (fastrlhf_kernels/_decode_step.py),
which beat oneDNN's blocks (bench/NOTES.md) and give a row the same bits however many there are;
bf16 by oneDNN's blocks, where torch offers them. Products that share their input are one product of
the weights one below the other.

Elsewhere nothing is copied: the parameters themselves are read, so that a step captured in a CUDA
graph sees weights that were updated in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastrlhf_kernels._backends import BACKENDS, choose
from fastrlhf_kernels._decode_step import Panels


def packs(x: Tensor) -> bool:
    """Whether there is a faster layout for tensors like this one."""
    if x.device.type != "cpu":
        return False
    if x.dtype == torch.float32:
        return choose("decode products", (x,), None, BACKENDS) == "cpu"
    return (
        x.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Product:
    """x (B, in) -> x @ weight.T + bias (B, out), for modules that share their input."""

    def __init__(self, modules: Sequence[nn.Module], *, packed: bool, rows: int) -> None:
        """modules: nn.Linear or Conv1D, all with a bias or none; rows: B, for which it is tuned."""
        self.modules = modules
        self.panels: Panels | None = None
        self.blocks: Tensor | None = None
        self.bias: Tensor | None = None
        if packed:
            weight = torch.cat([_weight(m) for m in modules])
            if modules[0].bias is not None:
                self.bias = torch.cat([m.bias for m in modules])  # type: ignore[misc]
            if weight.dtype == torch.float32:
                self.panels = Panels(weight, self.bias)
            else:
                self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        if self.panels is not None:
            return self.panels(x.contiguous())
        if self.blocks is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")
        if len(self.modules) == 1:
            (m,) = self.modules
            return F.linear(x, _weight(m), m.bias)  # type: ignore[arg-type]
        weights = [_weight(m) for m in self.modules]
        sizes = [weight.shape[0] for weight in weights]
        out = x.new_empty((len(x), sum(sizes)))
        for m, weight, part in zip(self.modules, weights, out.split(sizes, 1), strict=True):
            if m.bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(m.bias, x, weight.t(), out=part)  # type: ignore[arg-type]
        return out

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the product, in the dtype of the residual, which may be overwritten."""
        if self.panels is not None:
            return self.panels(x.contiguous(), residual)
        return residual.add_(self(x))


def _weight(module: nn.Module) -> Tensor:
    """(out, in), without a copy."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight
