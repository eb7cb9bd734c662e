"""The Triton kernel of sample, whose module has the specification: a program a row.

top-k and top-p keep a prefix of the tokens in order of size, ties by id: all above a threshold and
the first few equal to it. The threshold is found by bisection over the 32 bits of an fp32, each
step reading the row once; nothing is sorted.
"""

from __future__ import annotations

from torch import Tensor

from ._logit_row import exponent, load_z, scan_row
from ._logprob_rows import BLOCK_V, NUM_WARPS
from ._triton import (
    AotConfig,
    exp_nonpositive,
    jit,
    launch,
    log1p,
    on_device,
    philox_uniforms,
    tl,
)

SAMPLE_TILE = 1024  # part of the specification: another width draws other tokens


@jit()
def _keys(z):
    """fp32 as integers in the same order, both zeros alike."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit()
def _mass(z, m, t):
    """exp((z - m) / t)."""
    return exp_nonpositive(exponent(z, m, t, False))


@jit()
def _above(x, V, bound, m, t, BLOCK_V: tl.constexpr):
    """How many keys of the row are above `bound`, and their mass in fp64."""
    lane = tl.arange(0, BLOCK_V)
    count = 0
    mass = tl.full([], 0.0, tl.float64)
    for i in range(tl.cdiv(V, BLOCK_V)):
        z = load_z(x, x, 0, i * BLOCK_V + lane, V, None, 1.0, True, False, False)
        inside = _keys(z) > bound
        count += tl.sum(tl.where(inside, 1, 0), 0)
        mass += tl.sum(tl.where(inside, _mass(z, m, t), 0.0), 0).to(tl.float64)
    return count, mass


@jit()
def _prefix(x, V, k, limit, m, t, BLOCK_V: tl.constexpr):
    """(threshold, ties, mass): what is above the threshold, and the first `ties` equal to it.

    The longest prefix of the sorted logits in which every token has fewer than k before it and less
    than `limit` of mass. Bisection over the keys: `high` is always in the prefix, `low` never.
    """
    low = tl.full([], -2139095041, tl.int64)  # the key of -inf
    high = _keys(m).to(tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        count, mass = _above(x, V, middle, m, t, BLOCK_V)
        goes_on = (count < k) & (mass < limit)
        high = tl.where(goes_on, middle, high)
        low = tl.where(goes_on, low, middle)
    count, mass = _above(x, V, high, m, t, BLOCK_V)
    bits = high.to(tl.int32)
    z = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    # In fp64, as the specification has it: to fp32, five times 0.2, which is rounded up, is 1.
    e = _mass(z, m, t).to(tl.float64)
    by_mass = tl.ceil((limit - mass) / tl.where(e > 0.0, e, 1.0))
    ties = tl.minimum(k - count, tl.where((e > 0.0) & (by_mass < V), by_mass, V * 1.0).to(tl.int32))
    ties = tl.maximum(ties, tl.where(count == 0, 1, 0))
    return high, ties, mass + ties.to(tl.float64) * e


@jit()
def _tile_masses(
    x, V, tile, ties, threshold, least_mass, m, t,
    FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(logits, kept masses) of a tile, and how many equals of the threshold are left after it."""
    z = load_z(x, x, 0, tile * TILE + tl.arange(0, TILE), V, None, 1.0, True, False, False)
    e = _mass(z, m, t)
    if FILTER:
        keys = _keys(z)
        equal = tl.where(keys == threshold, 1, 0)
        early = tl.cumsum(equal, 0) <= ties
        e = tl.where(((keys > threshold) | ((equal > 0) & early)) & (e >= least_mass), e, 0.0)
        ties -= tl.sum(equal, 0)
    return z, e, ties


@jit(any_value=("V", "logits_stride", "top_k"))
def _sample_kernel(
    logits, seeds, positions, temperatures, top_ks, top_ps, min_ps,  # pointers
    tokens, logprobs, sampled,  # pointers
    V, logits_stride,  # size, stride
    temperature, top_k, top_p, min_p,  # constants, where ROWS is not set
    ROWS: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    if ROWS:
        temperature = tl.load(temperatures + row)
        top_k = tl.load(top_ks + row).to(tl.int32)
        top_p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
    greedy = temperature == 0.0
    t = tl.where(greedy, 1.0, temperature)
    m, rest, moment = float("-inf"), 0.0, 0.0
    m, rest, moment = scan_row(
        x, x, 0, V, m, rest, moment, t, None, 1.0, False, False, False, False, BLOCK_V
    )
    bad = (m == float("-inf")) | (rest != rest)
    m = tl.where(bad, 0.0, m)

    FILTER: tl.constexpr = HAS_K or HAS_P or HAS_MIN_P
    threshold = tl.full([], -2139095041, tl.int64)
    ties = tl.zeros([], tl.int32) + V
    kept_mass = (1.0 + rest).to(tl.float64)
    if HAS_K:
        k = tl.where(top_k == 0, V, tl.minimum(top_k, V))
        infinite = tl.full([], float("inf"), tl.float64)
        threshold, ties, kept_mass = _prefix(x, V, k, infinite, m, t, BLOCK_V)
    if HAS_P:
        limit = kept_mass * (tl.full([], 0.0, tl.float32) + top_p).to(tl.float64)
        limit = tl.where(top_p == 1.0, float("inf"), limit)
        high, p_ties, _ = _prefix(x, V, V, limit, m, t, BLOCK_V)
        same = tl.where(high == threshold, tl.minimum(ties, p_ties), ties)
        ties = tl.where(high > threshold, p_ties, same)
        threshold = tl.maximum(threshold, high)

    # Masses of the tiles; the rest of the kept mass without one instance of the maximum.
    lane = tl.arange(0, TILE)
    n_tiles = tl.cdiv(V, TILE)
    left = ties
    total = 0.0
    kept_rest = 0.0
    tops = 0.0
    first_top = V
    for i in range(n_tiles):
        z, e, left = _tile_masses(x, V, i, left, threshold, min_p, m, t, FILTER, TILE)
        is_top = (z == m) & (e > 0.0)
        total += tl.sum(e, 0)
        kept_rest += tl.sum(tl.where(is_top, 0.0, e), 0)
        tops += tl.sum(tl.where(is_top, 1.0, 0.0), 0)
        first_top = tl.minimum(first_top, tl.min(tl.where(is_top, i * TILE + lane, V), 0))
    kept_rest += tops - 1.0

    u0, u1 = philox_uniforms(tl.load(seeds + row), tl.load(positions + row))
    aim = u0 * total
    left = ties
    chosen = 0
    chosen_left = ties
    mass = 0.0
    for i in range(n_tiles):
        before = left
        z, e, left = _tile_masses(x, V, i, left, threshold, min_p, m, t, FILTER, TILE)
        s = tl.sum(e, 0)
        take = (s > 0.0) & ((mass <= aim) | (i == 0))
        chosen = tl.where(take, i, chosen)
        chosen_left = tl.where(take, before, chosen_left)
        mass += s
    z, e, left = _tile_masses(x, V, chosen, chosen_left, threshold, min_p, m, t, FILTER, TILE)
    past = (tl.cumsum(e, 0) > u1 * tl.sum(e, 0)) & (e > 0.0)
    first = tl.min(tl.where(past, lane, TILE), 0)
    last = tl.max(tl.where(e > 0.0, lane, 0), 0)
    token = chosen * TILE + tl.minimum(first, last)
    token = tl.where(greedy, first_top, token)
    token = tl.where(bad, 0, token)

    z = tl.load(x + token).to(tl.float32)
    logprob = tl.where(bad, float("nan"), tl.div_rn(z - m, t) - log1p(rest))
    after = logprob
    if FILTER:
        after = tl.where(bad, float("nan"), tl.div_rn(z - m, t) - log1p(kept_rest))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)
    tl.store(sampled + row, tl.where(greedy & (bad == 0), 0.0, after))


_TYPES = {
    "logits": "*fp32", "seeds": "*i64", "positions": "*i64", "tokens": "*i64",
    "logprobs": "*fp32", "sampled": "*fp32", "V": "i32", "logits_stride": "i32",
    "temperature": "fp32", "top_k": "i32", "top_p": "fp32", "min_p": "fp32",
}  # fmt: skip
_SETTINGS = {"temperatures": "*fp32", "top_ks": "*i64", "top_ps": "*fp32", "min_ps": "*fp32"}
_FLAGS = {"HAS_K": False, "HAS_P": False, "HAS_MIN_P": False}
_BLOCKS = {"BLOCK_V": BLOCK_V, "TILE": SAMPLE_TILE}

AOT_CONFIGS = [
    AotConfig(
        "no filters",
        _sample_kernel,
        _TYPES,
        _FLAGS | _BLOCKS | {"ROWS": False} | dict.fromkeys(_SETTINGS),
        num_warps=NUM_WARPS,
    ),
    AotConfig(
        "all filters, settings a row, bf16",
        _sample_kernel,
        _TYPES | _SETTINGS | {"logits": "*bf16"},
        dict.fromkeys(_FLAGS, True) | _BLOCKS | {"ROWS": True},
        num_warps=NUM_WARPS,
    ),
]


def launch_sample(
    logits: Tensor,  # (B, V), dense along V, B > 0
    seeds: Tensor | None,
    positions: Tensor | None,
    rows: tuple[Tensor | None, ...],  # temperatures, top_ks, top_ps, min_ps: all or none
    tokens: Tensor,
    logprobs: Tensor,
    sampled: Tensor,
    numbers: tuple[float, int, float, float],  # in place of `rows`
    *,
    has_k: bool,
    has_p: bool,
    has_min_p: bool,
) -> None:
    """Draws into tokens, logprobs and sampled."""
    B, V = logits.shape
    with on_device(logits):
        launch(_sample_kernel, (B,))(
            logits, seeds, positions, *rows,
            tokens, logprobs, sampled,
            V, logits.stride(0),
            *numbers,
            ROWS=rows[0] is not None, HAS_K=has_k, HAS_P=has_p, HAS_MIN_P=has_min_p,
            BLOCK_V=BLOCK_V, TILE=SAMPLE_TILE, num_warps=NUM_WARPS,
        )  # fmt: skip
