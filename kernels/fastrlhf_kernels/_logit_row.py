"""A row of logits on a GPU: the Triton functions that several kernels share.

The mathematics is that of _logprob_rows.py, whose two kernels use them all; sample and
kl_divergence read their rows by the same ones, hence the same bits. csrc/logprob_row.h is the same
for a CPU.
"""

from __future__ import annotations

from ._triton import exp_nonpositive, jit, tanh, tl


@jit()
def make_z(
    z, bias, bias_start, columns, V, scale, cap,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """z in fp32 of what was read at `columns`.

    The layout of a tile, and with it the order of its sums, follows from the widest load, so none
    may be wider than a row's: `bias_start`, which the compiler does not know to be 0, keeps the
    bias' as narrow.
    """
    z = z.to(tl.float32)
    if HAS_BIAS:
        if MASKED:
            z += tl.load(bias + bias_start + columns, mask=columns < V, other=0.0)
        else:
            z += tl.load(bias + bias_start + columns)
    if scale is not None:
        z *= scale
    if HAS_CAP:
        z = cap * tanh(z * tl.div_rn(1.0, cap))
    return z


@jit()
def load_z(
    x, bias, bias_start, columns, V, scale, cap, some,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """z at `columns`; -inf past V, and everywhere where `some` is false."""
    inside = (columns < V) & some
    z = tl.load(x + columns, mask=inside, other=0.0)
    z = make_z(z, bias, bias_start, columns, V, scale, cap, True, HAS_BIAS, HAS_CAP)
    return tl.where(inside, z, float("-inf"))


@jit()
def exponent(z, m, t, UNIT: tl.constexpr):
    """(z - m) / t for z <= m, at least -150, where exp is 0 in fp32; NaN where z or m is NaN.

    UNIT says that t is 1. The maximum is subtracted before scaling: folded into the scaled load, a
    large offset would cost digits.
    """
    u = z - m
    if not UNIT:
        # By the reciprocal, and once more for what that leaves: a division has a slow path, for
        # which registers are kept. Finite throughout, so that nothing is inf - inf.
        inverse = tl.minimum(tl.div_rn(1.0, t), 3.0e38)
        d = tl.maximum(u, -3.0e38, propagate_nan=tl.PropagateNan.ALL)
        u = tl.maximum(d * inverse, -150.0, propagate_nan=tl.PropagateNan.ALL)
        u = tl.fma(tl.fma(-u, t, d), inverse, u)
        u = tl.where(z == float("-inf"), -150.0, u)
    return tl.maximum(u, -150.0, propagate_nan=tl.PropagateNan.ALL)


@jit()
def tile_state(z, t, MOMENT: tl.constexpr, UNIT: tl.constexpr):
    """(max, rest, moment) of a tile."""
    m = tl.max(z, 0)  # of what is no NaN
    u = exponent(z, tl.where(m == float("-inf"), 0.0, m), t, UNIT)
    e = exp_nonpositive(u)
    total = tl.sum(e, 0)
    rest = total - 1.0
    if total < 3.0:
        # Few terms beside the maximum: they are summed without it, or their digits would be lost.
        top = u == 0.0
        rest = tl.sum(tl.where(top, 0.0, e), 0) + (tl.sum(tl.where(top, 1.0, 0.0), 0) - 1.0)
    rest = tl.where((m == float("-inf")) & (total == total), 0.0, rest)
    moment = 0.0
    if MOMENT:
        moment = tl.sum(e * u, 0) * t
    return m, rest, moment


@jit()
def combine(m1, rest1, moment1, m2, rest2, moment2, t, UNIT: tl.constexpr):
    """The state of two tiles together."""
    m = tl.maximum(m1, m2)
    low = tl.minimum(m1, m2)
    left = m1 >= m2
    rest = tl.where(left, rest1, rest2)
    moved = 1.0 + tl.where(left, rest2, rest1)
    empty = low == float("-inf")  # the tile adds nothing
    u = exponent(tl.where(empty, 0.0, low), tl.where(empty, 0.0, m), t, UNIT)
    e = tl.where(empty, 0.0, exp_nonpositive(u))
    moment = tl.where(left, moment1, moment2)
    moment += e * (tl.where(left, moment2, moment1) + moved * (u * t))
    return m, rest + moved * e, moment


@jit()
def scan_row(
    x, bias, bias_start, V, m, rest, moment, t, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, MOMENT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of a row with V more columns behind it."""
    lane = tl.arange(0, BLOCK_V)
    whole = V // BLOCK_V
    for i in range(whole):
        z = tl.load(x + i * BLOCK_V + lane)
        z = make_z(z, bias, bias_start, i * BLOCK_V + lane, V, scale, cap, False, HAS_BIAS, HAS_CAP)
        m2, rest2, moment2 = tile_state(z, t, MOMENT, UNIT)
        m, rest, moment = combine(m, rest, moment, m2, rest2, moment2, t, UNIT)
    for i in range(whole, tl.cdiv(V, BLOCK_V)):
        z = load_z(x, bias, bias_start, i * BLOCK_V + lane, V, scale, cap, True, HAS_BIAS, HAS_CAP)
        m2, rest2, moment2 = tile_state(z, t, MOMENT, UNIT)
        m, rest, moment = combine(m, rest, moment, m2, rest2, moment2, t, UNIT)
    return m, rest, moment


@jit()
def row_offset(row, inner, outer_stride, inner_stride):
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@jit()
def gradient_terms(
    x, bias, bias_start, columns, inside, inverse, m, temperature, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """z of x, dz/dx over the temperature, u = (z - m) / temperature, and exp(u)."""
    z = x.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + bias_start + columns, mask=inside, other=0.0)
    slope = inverse
    if scale is not None:
        z *= scale
        slope *= scale
    if HAS_CAP:
        # d tanh(a) = 4 q / (1 + q)^2 with q = exp(-2|a|), without cancellation
        q = tl.exp(-2.0 * tl.abs(z * tl.div_rn(1.0, cap)))
        slope = slope * 4.0 * q / ((1.0 + q) * (1.0 + q))
        z = cap * tanh(z * tl.div_rn(1.0, cap))
    u = exponent(z, m, temperature, UNIT)
    return z, slope, u, exp_nonpositive(u)
