"""Matrix products of a decode step: y = x @ weight.T + bias, several weights at once.

A step multiplies few rows with all weights of the model, and takes as long as reading those takes.
On a CPU oneDNN reads weights in blocks two to three times as fast as in rows (32 rows, 2 cores), so
a run makes copies in that layout where torch offers it: as much memory again as the weights take,
freed when the run is over. Products that share their input are one product of the weights one below
the other.

Elsewhere nothing is copied: the parameters themselves are read, so that a step captured in a CUDA
graph sees weights that were updated in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def packs(x: Tensor) -> bool:
    """Whether oneDNN's layout is to be had for tensors like this one."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32


class Product:
    """x (B, in) -> x @ weight.T + bias (B, out), for modules that share their input."""

    def __init__(self, modules: Sequence[nn.Module], *, packed: bool, rows: int) -> None:
        """modules: nn.Linear or Conv1D, all with a bias or none; rows: B, for which it is tuned."""
        self.modules = modules
        self.packed = None
        self.bias: Tensor | None = None
        if packed:
            weight = torch.cat([_weight(m) for m in modules])
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            if modules[0].bias is not None:
                self.bias = torch.cat([m.bias for m in modules])  # type: ignore[misc]

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
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
        if self.packed is not None and residual.dtype == x.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self.packed, self.bias, "add"
            )
        return residual.add_(self(x))


def _weight(module: nn.Module) -> Tensor:
    """(out, in), without a copy."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight
