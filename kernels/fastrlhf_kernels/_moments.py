"""Count, mean and sum of squares about the mean, of the valid entries of a tensor.

Moments are three fp64 numbers (n, mean, m2). Parts merge without loss (Chan, Golub and LeVeque
1983): with n and mean those of all parts together,

    m2 = sum over parts of m2_p + n_p (mean_p - mean)^2

so that tiles, and the ranks of a process group, are summed apart, and a large offset of the entries
costs no digits. Each part is shifted by one of its own entries first: equal entries then have an m2
of exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl


def moments_ref(x: Tensor, valid: Tensor) -> Tensor:
    """(3,) fp64: the moments of x where `valid`, zeros where nothing is."""
    n = valid.sum()
    if x.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=x.device)
    wide = torch.where(valid, x.detach(), 0.0).double()
    shift = torch.where(valid, wide, -torch.inf).amax()
    shift = torch.where(n > 0, shift, 0.0)
    shifted = torch.where(valid, wide - shift, 0.0)
    mean = shifted.sum() / n.clamp(min=1)
    m2 = torch.where(valid, shifted - mean, 0.0).square().sum()
    return torch.stack([n.double(), shift + mean, m2])


def merge_ref(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, m2) of (P, 3) moments together."""
    n, means, m2 = parts.unbind(-1)
    shift = means.take(n.argmax())
    total = n.sum()
    mean = shift + (n * (means - shift)).sum() / total.clamp(min=1)
    between = torch.where(n > 0, n * (means - mean).square(), 0.0)
    return total, mean, (m2 + between).sum()


@jit()
def tile_moments(x, valid):
    """(n, mean, m2) in fp64 of a tile of fp32 numbers where `valid`; x is 0 elsewhere."""
    n = tl.sum(valid.to(tl.int32)).to(tl.float64)
    shift = tl.max(tl.where(valid, x, float("-inf")))
    shift = tl.where(n > 0.0, shift, 0.0)
    shifted = tl.where(valid, x - shift, 0.0)
    centre = tl.sum(shifted) / tl.maximum(n, 1.0).to(tl.float32)
    centred = tl.where(valid, shifted - centre, 0.0)
    # The mean of the rounded differences is not 0 to the last bit: take it into the mean.
    rest = tl.sum(centred) / tl.maximum(n, 1.0)
    wide = centred.to(tl.float64)  # the square of 1e20 is no number of fp32, nor that of 1e-24
    m2 = tl.sum(wide * wide) - n * rest * rest
    return n, shift.to(tl.float64) + centre + rest, tl.where(m2 < 0.0, 0.0, m2)


@jit()
def merge_moments(parts, P, stride, BLOCK_TILES: tl.constexpr):
    """(n, mean, m2) of P parts together; `parts` points to the first, `stride` numbers apart."""
    lane = tl.arange(0, BLOCK_TILES)
    # Any finite number near the means will do for a shift; parts without entries have mean 0.
    count = tl.zeros((BLOCK_TILES,), tl.float64)
    highest = tl.full((BLOCK_TILES,), float("-inf"), tl.float64)
    for first in range(0, P, BLOCK_TILES):
        p = first + lane
        n = tl.load(parts + p * stride, mask=p < P, other=0.0)
        mean = tl.load(parts + p * stride + 1, mask=p < P, other=0.0)
        count += n
        highest = tl.where((n > 0.0) & (mean > highest), mean, highest)
    total = tl.sum(count)
    shift = tl.max(highest)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    weighted = tl.zeros((BLOCK_TILES,), tl.float64)
    for first in range(0, P, BLOCK_TILES):
        p = first + lane
        n = tl.load(parts + p * stride, mask=p < P, other=0.0)
        mean = tl.load(parts + p * stride + 1, mask=p < P, other=0.0)
        weighted += tl.where(n > 0.0, n * (mean - shift), 0.0)
    mean_of_all = shift + tl.sum(weighted) / tl.maximum(total, 1.0)
    squares = tl.zeros((BLOCK_TILES,), tl.float64)
    for first in range(0, P, BLOCK_TILES):
        p = first + lane
        n = tl.load(parts + p * stride, mask=p < P, other=0.0)
        mean = tl.load(parts + p * stride + 1, mask=p < P, other=0.0)
        m2 = tl.load(parts + p * stride + 2, mask=p < P, other=0.0)
        gap = mean - mean_of_all
        squares += tl.where(n > 0.0, m2 + n * gap * gap, 0.0)
    return total, mean_of_all, tl.sum(squares)
