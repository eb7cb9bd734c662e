"""Samples a token a row from logits, with temperature, top-k, top-p and min-p, reproducibly.

Filters, in this order, each on what the one before has left; ties go to the lower id:

    temperature  z = logits / temperature
    top_k        the k largest logits, exactly k; 0 keeps all
    top_p        the fewest tokens, largest first, whose renormalised probability reaches top_p
    min_p        tokens of probability at least min_p times the largest one

The token is drawn by inverse CDF in two steps. The vocabulary is cut into tiles of SAMPLE_TILE
tokens, in order; mass e_j = exp((logit_j - max) / temperature) of a kept token, 0 of another.

    tile   the first whose cumulative mass over tiles exceeds u0 * (mass of all tiles)
    token  the first whose cumulative mass within the tile exceeds u1 * (mass of the tile)

each clamped to the last tile or token of positive mass. Masses are summed in fp64 (in fp32 by the
GPU kernel), so that the order of summing hardly matters. u0 and u1 are x0 / 2^32 and x1 / 2^32,
rounded to the arithmetic's dtype, where (x0, x1, x2, x3) = Philox4x32-10 with counter (position low
word, position high word, 0, 0) and key (seed low word, seed high word). Every backend draws the
same u0 and u1; picks, and what top-p keeps, may differ where rounding moves a cumulative mass
across its bound.

Shapes: logits (B, V); seeds, positions (B,) int64; settings a number or one a row (B,); results
(B,). Dtypes: logits fp32, bf16, fp16 or fp64; arithmetic and log-probs are fp32, or fp64 for fp64
logits; tokens int64. No gradient.

Promises:
- logprobs are those of logprobs_from_logits, to the bit: log softmax(logits / temperature) before
  the filters. sampled_logprobs are log-probs of the distribution sampled from, after them.
- temperature 0 is greedy: the largest logit, the lower id on a tie. Its logprobs are under
  temperature 1, its sampled_logprobs are 0.
- A token of probability 0 is never drawn. A row of nothing but -inf, or with a NaN or a +inf, gives
  token 0 and NaN log-probs, and harms no other row.
- A row's draw depends on its own logits, seed, position and settings alone.

Source: Salmon et al. 2011 (Philox); Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen
et al. 2024 (min-p).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._backends import choose
from ._checks import (
    check_device,
    check_dims,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_values,
    compute_dtype,
)
from ._library import register
from ._native import pointer, with_unit_stride
from ._sample_kernel import AOT_CONFIGS as AOT_CONFIGS
from ._sample_kernel import SAMPLE_TILE, launch_sample
from .logprobs_from_logits import logprobs_from_logits_ref


class SampleOutput(NamedTuple):
    """What `sample` drew, and its log-probs, in nats."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) under softmax(logits / temperature), before the filters
    sampled_logprobs: Tensor  # (B,) under the distribution sampled from


def philox_ref(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words of Philox4x32-10, each (B,) int64 in [0, 2^32)."""
    word = 0xFFFFFFFF
    c0, c1 = positions & word, (positions >> 32) & word
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seeds & word, (seeds >> 32) & word
    for _ in range(10):
        # The products wrap in int64, which leaves both of their 32-bit words right.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = ((b >> 32) & word) ^ c1 ^ k0, b & word
        c2, c3 = ((a >> 32) & word) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1


def sample_ref(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> SampleOutput:
    """The specification; arguments as in `sample`."""
    logits = logits.detach()
    B, V = logits.shape
    z = logits.to(compute_dtype(logits))
    t = _per_row(temperature, z, z.dtype)
    k = _per_row(top_k, z, torch.int64)
    p = _per_row(top_p, z, z.dtype)
    q = _per_row(min_p, z, z.dtype)

    top = z.amax(-1, keepdim=True)
    bad = ~top.isfinite()
    z = torch.where(bad, 0.0, z)
    top = torch.where(bad, 0.0, top)
    greedy = t == 0
    t = torch.where(greedy, 1.0, t)
    mass = ((z - top) / t).exp()

    order = z.sort(dim=-1, descending=True, stable=True).indices
    sorted_mass = mass.gather(-1, order)
    place = torch.arange(V, device=z.device)
    kept = (k == 0) | (place < k)
    sorted_mass = torch.where(kept, sorted_mass, 0.0)
    wide = sorted_mass.double()
    before = wide.cumsum(-1) - wide
    kept &= (p == 1) | (place == 0) | (before < p.double() * wide.sum(-1, keepdim=True))
    kept &= sorted_mass >= q * sorted_mass[:, :1]
    kept &= ~greedy | (place == 0)
    mass = torch.where(torch.zeros_like(kept).scatter(-1, order, kept), mass, 0.0)

    tiles = torch.nn.functional.pad(mass.double(), (0, -V % SAMPLE_TILE))
    tiles = tiles.view(B, -(-V // SAMPLE_TILE), SAMPLE_TILE)
    x0, x1 = philox_ref(seeds.to(torch.int64), positions.to(torch.int64))
    u0, u1 = ((x.to(z.dtype)[:, None] * 2.0**-32).double() for x in (x0, x1))
    tile = _pick(tiles.sum(-1), u0)
    token = _pick(tiles[torch.arange(B, device=z.device), tile], u1) + tile * SAMPLE_TILE

    nan = torch.where(bad[:, 0], torch.nan, 0.0)
    logprobs = logprobs_from_logits_ref(logits, token, temperature=t[:, 0])
    assert isinstance(logprobs, Tensor)
    # The first maximum is always kept; its mass is the 1 in log1p.
    rest = mass.scatter(-1, order[:, :1], 0.0).sum(-1, dtype=torch.float64).to(z.dtype)
    sampled = ((z - top) / t).gather(-1, token[:, None])[:, 0] - rest.log1p() + nan
    token = torch.where(bad[:, 0], 0, token)
    return SampleOutput(token, logprobs, torch.where(greedy[:, 0], nan, sampled))


def _per_row(setting: float | Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(setting, Tensor):
        return setting.to(dtype)[:, None]
    return torch.full((z.shape[0], 1), setting, dtype=dtype, device=z.device)


def _pick(mass: Tensor, u: Tensor) -> Tensor:
    """The first column whose cumulative mass exceeds u * total, or the last of positive mass."""
    total = mass.sum(-1, keepdim=True)
    columns = torch.arange(mass.shape[-1], device=mass.device)
    past = (mass.cumsum(-1) > u * total) & (mass > 0)
    first = torch.where(past, columns, mass.shape[-1]).amin(-1)
    last = torch.where(mass > 0, columns, 0).amax(-1)
    return torch.minimum(first, last)


def _results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for tokens and both log-probs; the fake too."""
    B, dtype = logits.shape[0], compute_dtype(logits)
    return (
        logits.new_empty(B, dtype=torch.int64),
        logits.new_empty(B, dtype=dtype),
        logits.new_empty(B, dtype=dtype),
    )


def _check_ranges(
    temperatures: Tensor | None, top_ks: Tensor | None, top_ps: Tensor | None, min_ps: Tensor | None
) -> None:
    """The values of settings given as tensors."""
    if temperatures is not None:
        check_values("sample", "temperature", temperatures >= 0, "in [0.0, inf]")
    if top_ks is not None:
        check_values("sample", "top_k", top_ks >= 0, "in [0, inf]")
    if top_ps is not None:
        check_values("sample", "top_p", (top_ps > 0) & (top_ps <= 1), "in (0.0, 1.0]")
    if min_ps is not None:
        check_values("sample", "min_p", (min_ps >= 0) & (min_ps <= 1), "in [0.0, 1.0]")


def _sample_native(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    top_ks: Tensor | None,
    top_k: int,
    top_ps: Tensor | None,
    top_p: float,
    min_ps: Tensor | None,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_ranges(temperatures, top_ks, top_ps, min_ps)
    tokens, logprobs, sampled = _results(logits)
    B, V = logits.shape
    x = with_unit_stride(logits)
    integers = [_dense(a, torch.int64) for a in (seeds, positions, top_ks)]
    t, p, q = (_dense(a, logprobs.dtype) for a in (temperatures, top_ps, min_ps))
    sums = torch.empty(B * 2 * -(-V // SAMPLE_TILE), dtype=torch.float64)
    _native.call(
        "sample", x,
        x.data_ptr(), pointer(integers[0]), pointer(integers[1]),
        pointer(t), pointer(integers[2]), pointer(p), pointer(q),
        sums.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), sampled.data_ptr(),
        B, V, x.stride(0), temperature, top_k, top_p, min_p, _native.DTYPE_TAGS[x.dtype],
    )  # fmt: skip
    return tokens, logprobs, sampled


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _sample_triton(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    top_ks: Tensor | None,
    top_k: int,
    top_ps: Tensor | None,
    top_p: float,
    min_ps: Tensor | None,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_ranges(temperatures, top_ks, top_ps, min_ps)
    tokens, logprobs, sampled = _results(logits)
    B, V = logits.shape
    if B == 0:
        return tokens, logprobs, sampled
    x = with_unit_stride(logits)
    settings = ((temperatures, temperature), (top_ks, top_k), (top_ps, top_p), (min_ps, min_p))
    rows = any(tensor is not None for tensor, _ in settings)
    t, k, p, q = (
        None
        if not rows
        else _dense(tensor, dtype)
        if tensor is not None
        else torch.full((B,), number, dtype=dtype, device=x.device)
        for (tensor, number), dtype in zip(
            settings, (torch.float32, torch.int64, torch.float32, torch.float32), strict=True
        )
    )
    launch_sample(
        x, _dense(seeds, torch.int64), _dense(positions, torch.int64), (t, k, p, q),
        tokens, logprobs, sampled,
        (temperature, min(top_k, V), top_p, min_p),
        has_k=top_ks is not None or 0 < top_k < V,
        has_p=top_ps is not None or top_p < 1.0,
        has_min_p=min_ps is not None or min_p > 0.0,
    )  # fmt: skip
    return tokens, logprobs, sampled


def _sample_fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _results(logits)


IMPLEMENTATIONS = {"cpu": _sample_native, "triton": _sample_triton}

_sample = register(
    "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor? temperatures, "
    "float temperature, Tensor? top_ks, int top_k, Tensor? top_ps, float top_p, Tensor? min_ps, "
    "float min_p, str backend) -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _sample_fake,
)


def _check_setting(
    op: str,
    name: str,
    setting: float | Tensor,
    logits: Tensor,
    *,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
) -> None:
    """A number in the range, or a tensor (B,), whose values `_check_ranges` looks at."""
    if not isinstance(setting, Tensor):
        check_number(op, name, setting, low=low, high=high, open_low=open_low)
        return
    check_shape(op, name, setting, logits.shape[:1])
    check_device(op, name, setting, logits.device)


def sample(
    logits: Tensor,  # (B, V)
    seeds: Tensor,  # (B,)
    positions: Tensor,  # (B,)
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    backend: str | None = None,
) -> SampleOutput:
    """Draws a token for each row, with its log-prob before and after the filters.

    Args:
        logits: (B, V), fp32, bf16, fp16 or fp64; not modified.
        seeds: (B,), int64, one a sequence, so that samples of one prompt differ.
        positions: (B,), int64, the position of the token to draw; (seed, position) is the counter.
        temperature: at least 0, 0 is greedy; a number or (B,).
        top_k: how many tokens to keep, 0 keeps all; a number or (B,) of integers.
        top_p: in (0, 1]; a number or (B,).
        min_p: in [0, 1]; a number or (B,).
        backend: ref, cpu, triton or cuda; default: by `use_backend` and the device.

    Returns:
        SampleOutput(tokens, logprobs, sampled_logprobs), each (B,), detached; log-probs in nats.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong (values of tensors: for CPU tensors;
            on a GPU with FASTRLHF_DEBUG=1).
    """
    op = "sample"
    check_float(op, "logits", logits)
    check_dims(op, "logits", logits, 2, "(B, V)")
    if logits.shape[1] < 1:
        raise ValueError(f"{op}: logits must have V >= 1, got {tuple(logits.shape)}")
    for name, x in (("seeds", seeds), ("positions", positions)):
        check_integer(op, name, x)
        check_shape(op, name, x, logits.shape[:1])
        check_device(op, name, x, logits.device)
    if isinstance(top_k, Tensor):
        check_integer(op, "top_k", top_k)
    elif isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ValueError(f"{op}: top_k must be an integer, got {top_k!r}")
    for name, setting in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        if isinstance(setting, Tensor):
            check_float(op, name, setting)
    _check_setting(op, "temperature", temperature, logits, low=0.0)
    _check_setting(op, "top_k", top_k, logits, low=0)
    _check_setting(op, "top_p", top_p, logits, low=0.0, high=1.0, open_low=True)
    _check_setting(op, "min_p", min_p, logits, low=0.0, high=1.0)
    backend = choose(op, (logits,), backend, IMPLEMENTATIONS)
    t, k, p, q = (x if isinstance(x, Tensor) else None for x in (temperature, top_k, top_p, min_p))
    if backend == "ref":
        _check_ranges(t, k, p, q)
        return sample_ref(
            logits,
            seeds,
            positions,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    drawn = _sample(
        logits,
        seeds,
        positions,
        t,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        k,
        0 if isinstance(top_k, Tensor) else top_k,
        p,
        1.0 if isinstance(top_p, Tensor) else float(top_p),
        q,
        0.0 if isinstance(min_p, Tensor) else float(min_p),
        backend,
    )
    return SampleOutput(*drawn)
