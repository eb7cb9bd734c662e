"""sample: the reference's tokens on every backend, and the distributions that it promises."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import SampleOutput, available_backends, logprobs_from_logits, sample
from fastrlhf_kernels.sample import philox_ref, sample_ref

OP = "sample"
INF, NAN = float("inf"), float("nan")


def case(
    B: int, V: int, backend: Backend, dtype=torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = (2.0 * torch.randn(B, V, generator=generator)).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator)
    positions = torch.randint(0, 2**40, (B,), generator=generator)
    return tuple(x.to(backend.device) for x in (logits, seeds, positions))


def kept_oracle(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """The tokens that the filters leave, (V,) bool, by sorting one row's fp64 probabilities."""
    z = logits.double()
    order = sorted(range(len(z)), key=lambda j: (-float(z[j]), j))
    order = order[: top_k or None]
    p = ((z - z.max()) / temperature).exp()
    total, before, kept = sum(float(p[j]) for j in order), 0.0, []
    for j in order:
        if kept and top_p < 1 and before >= top_p * total:
            break
        kept.append(j)
        before += float(p[j])
    mask = torch.zeros(len(z), dtype=torch.bool)
    mask[[j for j in kept if float(p[j]) >= min_p]] = True
    return mask


@given(
    V=st.sampled_from([1, 2, 7, 163, 1023, 1025, 2500]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, "rows"]),
    top_k=st.sampled_from([0, 1, 5, 100, "rows"]),
    top_p=st.sampled_from([1.0, 0.9, 0.2, "rows"]),
    min_p=st.sampled_from([0.0, 0.1, "rows"]),
    coarse=st.booleans(),
    infinite=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_draws_the_reference_s_tokens(
    backend: Backend, V, dtype, temperature, top_k, top_p, min_p, coarse, infinite, seed
) -> None:
    B = 1 if backend.interpreted else 6
    logits, seeds, positions = case(B, V, backend, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    if coarse:
        logits = logits.round()  # many ties
    hidden = torch.rand(B, V, generator=generator) < infinite
    hidden[:, seed % V] = False
    logits = logits.masked_fill(hidden.to(logits.device), -INF)
    rows = torch.rand(B, generator=generator).to(logits.device)
    settings = {
        "temperature": rows + 0.3 if temperature == "rows" else temperature,
        "top_k": (rows * 2 * V).long() if top_k == "rows" else top_k,
        "top_p": 1.0 - 0.9 * rows if top_p == "rows" else top_p,
        "min_p": 0.3 * rows if min_p == "rows" else min_p,
    }
    found = sample(logits, seeds, positions, **settings, backend=backend.name)
    expected = sample_ref(logits, seeds, positions, **settings)
    # fp32's 0.2 is above 0.2, which five equal tokens notice: fp64 gets the same numbers.
    rounded = {
        k: x if isinstance(x, Tensor | int) else float(torch.tensor(x)) for k, x in settings.items()
    }
    exact = sample_ref(logits.double(), seeds, positions, **rounded)
    assert_same_bits(found.tokens, expected.tokens)
    assert_same_bits(exact.tokens, expected.tokens)
    for a, r, o in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert_accurate(a, r, o)
        assert not a.requires_grad
    # The shared row routine: what the trainer will compute for this token, to the bit.
    t = settings["temperature"]
    again = logprobs_from_logits(
        logits, found.tokens, temperature=t if isinstance(t, Tensor) else t or 1.0,
        backend=backend.name,
    )  # fmt: skip
    assert_same_bits(found.logprobs, again)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8, "min_p": 0.15},
    ],
    ids=str,
)
@pytest.mark.not_on(
    "interpreted", "thousands of rows take minutes; the tokens are held to the reference's"
)
def test_frequencies(backend: Backend, settings: dict) -> None:
    """Tokens come as often as they should, within five standard deviations; no other ever comes."""
    n = 20000
    row = torch.tensor([0.3, 2.0, -1.0, 1.1, -INF, 2.0, 0.0, 1.7], device=backend.device)
    seeds = torch.arange(n, device=backend.device)
    found = sample(
        row.expand(n, 8), seeds, torch.full_like(seeds, 5), **settings, backend=backend.name
    )
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    kept = kept_oracle(row.cpu(), **full)
    p = (row.cpu().double() / full["temperature"]).softmax(0)
    after = torch.where(kept, p, 0.0) / p[kept].sum()
    counts = torch.bincount(found.tokens.cpu(), minlength=8).double()
    assert not counts[after == 0].any()
    spread = (n * after * (1 - after)).sqrt()
    assert bool(((counts - n * after).abs() <= 5 * spread + 1e-9).all()), (counts, n * after)
    tokens = found.tokens.cpu()
    torch.testing.assert_close(found.logprobs.cpu().double(), p.log()[tokens], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found.sampled_logprobs.cpu().double(), after.log()[tokens], rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 40},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 200, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.not_on("ref", "millions of sorted rows take an hour")
@pytest.mark.not_on("interpreted", "millions of rows take days")
def test_five_million_draws_follow_the_distribution(backend: Backend, settings: dict) -> None:
    """Chi-squared over all tokens, without filters those of two tiles; the support is exact."""
    V, n, chunk = 163 if settings else 1100, 5_000_000, 100_000
    generator = torch.Generator().manual_seed(1)
    row = 1.5 * torch.randn(V, generator=generator)
    row[torch.randperm(V, generator=generator)[: V // 20]] = -INF
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    counts = torch.zeros(V, dtype=torch.int64)
    logits = row.to(backend.device).expand(chunk, V)
    for first in range(0, n, chunk):
        seeds = torch.arange(first, first + chunk, device=backend.device)
        drawn = sample(logits, seeds, seeds % 1000, **settings, backend=backend.name)
        counts += drawn.tokens.cpu().bincount(minlength=V)
    kept = kept_oracle(row, **full)
    p = torch.where(kept, (row.double() / full["temperature"]).softmax(0), 0.0)
    expected = n * p / p.sum()
    assert not counts[expected == 0].any()
    assert bool((counts[expected >= 40] > 0).all())
    # Tokens of few expected draws are pooled, as the test wants.
    rare = (expected > 0) & (expected < 10)
    found = torch.cat([counts[expected >= 10].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[expected >= 10], expected[rare].sum()[None]])
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    statistic = float(((found - wanted).square() / wanted).sum())
    assert scipy.stats.chi2.sf(statistic, len(wanted) - 1) > 1e-4, statistic


@pytest.mark.not_on(
    "interpreted", "thousands of rows take minutes; the tokens are held to the reference's"
)
def test_wide_rows_spread_over_all_tiles(backend: Backend) -> None:
    """A flat row of several tiles: each tile, and each quarter of one, gets its share."""
    V, n = 3072, 2000
    seeds = torch.arange(n, device=backend.device)
    logits = torch.zeros(1, V, device=backend.device).expand(n, V)
    tokens = sample(logits, seeds, seeds, backend=backend.name).tokens.cpu()
    counts = torch.bincount(tokens // 256, minlength=12).double()
    assert bool(((counts - n / 12).abs() < 5 * (n / 12) ** 0.5).all()), counts


def test_ties_go_to_the_lower_id(backend: Backend) -> None:
    B, V = (5, 37) if backend.interpreted else (200, 1500)
    seeds = torch.arange(B, device=backend.device)
    flat = torch.zeros(B, V, device=backend.device)
    for settings, most in (({"top_k": 3}, 3), ({"top_p": 5.5 / V}, 6), ({"top_p": 1e-6}, 1)):
        tokens = sample(flat, seeds, seeds, **settings, backend=backend.name).tokens
        assert set(tokens.tolist()) <= set(range(most))
        assert len(set(tokens.tolist())) >= min(most, 2)
    assert not sample(flat, seeds, seeds, temperature=0.0, backend=backend.name).tokens.any()
    step = flat.clone()
    step[:, 9:15] = 1.0
    found = sample(step, seeds, seeds, temperature=0.0, backend=backend.name)
    assert bool((found.tokens == 9).all())
    assert not found.sampled_logprobs.any()


def test_bad_rows_harm_no_other(backend: Backend) -> None:
    logits, seeds, positions = case(6, 163, backend)
    for settings in ({}, {"top_k": 5}, {"temperature": 0.0}):
        clean = sample(logits, seeds, positions, **settings, backend=backend.name)
        poisoned = logits.clone()
        poisoned[0, 3], poisoned[1], poisoned[2, 7], poisoned[3] = NAN, -INF, INF, NAN
        found = sample(poisoned, seeds, positions, **settings, backend=backend.name)
        assert not found.tokens[:4].any()
        assert bool(found.logprobs[:4].isnan().all())
        assert bool(found.sampled_logprobs[:4].isnan().all())
        for x, y in zip(found, clean, strict=True):
            assert_same_bits(x[4:], y[4:])


def test_impossible_tokens_never_come(backend: Backend) -> None:
    B, V = (3, 1100) if backend.interpreted else (64, 5000)
    logits, seeds, positions = case(B, V, backend)
    allowed = torch.zeros(V, dtype=torch.bool, device=backend.device)
    allowed[[V - 2, 1050]] = True  # neither in the first tile
    logits = logits.masked_fill(~allowed, -INF)
    for settings in ({}, {"top_k": 50}, {"top_p": 0.999}):
        found = sample(logits, seeds, positions, **settings, backend=backend.name)
        assert bool(allowed[found.tokens].all())
        assert bool(found.logprobs.isfinite().all())


def test_precision_near_certainty(backend: Backend) -> None:
    gaps = torch.tensor([5.0, 20.25, 40.0, 80.0], device=backend.device)
    logits = torch.zeros(4, 5, device=backend.device)
    logits[:, 2] = gaps
    zeros = torch.zeros(4, dtype=torch.int64, device=backend.device)
    found = sample(logits, zeros, zeros, min_p=1e-37, backend=backend.name)
    assert bool((found.tokens == 2).all())
    expected = -(4.0 * (-gaps.double()).exp()).log1p()
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=4e-6, atol=0.0)
    torch.testing.assert_close(found.sampled_logprobs.double(), expected, rtol=4e-6, atol=0.0)


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    B, V = (4, 2100) if backend.interpreted else (33, 50257)
    if backend.name == "ref":
        V = 300
    logits, seeds, positions = case(B, V, backend)
    for settings in ({}, {"top_k": 40, "top_p": 0.9}):
        together = sample(logits, seeds, positions, **settings, backend=backend.name)
        for b in (0, B // 2, B - 1):
            row = slice(b, b + 1)
            alone = sample(
                logits[row], seeds[row], positions[row], **settings, backend=backend.name
            )
            assert_same_bits(alone.tokens, together.tokens[row])
            if backend.name != "ref":  # torch's sums promise no such thing
                for x, y in zip(alone, together, strict=True):
                    assert_same_bits(x, y[row])


def test_seeds_and_positions_are_a_counter(backend: Backend) -> None:
    """Another seed or another position draws another token; all 64 bits of both count."""
    n = 16
    logits = torch.zeros(n, 1024, device=backend.device)
    base = torch.full((n,), 77, device=backend.device)
    shifts = torch.tensor([0, *(1 << (4 * i) for i in range(15))], device=backend.device)
    by_seed = sample(logits, base + shifts, base, backend=backend.name).tokens
    by_position = sample(logits, base, base + shifts, backend=backend.name).tokens
    assert len(set(by_seed.tolist())) > n - 3
    assert len(set(by_position.tolist())) > n - 3
    assert int(by_seed[0]) == int(by_position[0])
    assert not torch.equal(by_seed, by_position)


def test_philox_known_answer() -> None:
    """Random123's vector for a zero counter and key."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(x) for x in philox_ref(zero, zero)] == [0x6627E8D5, 0xE169C58D]


def test_strides_and_integer_dtypes(backend: Backend) -> None:
    B = 2 if backend.interpreted else 5
    logits, seeds, positions = case(B, 41, backend)
    seeds, positions = seeds % 1000, positions % 1000
    dense = sample(logits, seeds, positions, top_k=7, backend=backend.name)
    views = [
        torch.cat([logits, logits], 1)[:, :41],
        logits.T.contiguous().T,
        torch.stack([logits, logits], 1)[:, 1],
    ]
    for view in views:
        found = sample(
            view, seeds.repeat_interleave(2)[::2], positions.to(torch.int32),
            top_k=torch.full((B,), 7, dtype=torch.int32, device=backend.device),
            backend=backend.name,
        )  # fmt: skip
        for x, y in zip(found, dense, strict=True):
            assert_same_bits(x, y)


# 4 GiB of addresses; on a CPU only the pages that hold a row are ever touched.
def test_offsets_past_two_to_31(backend: Backend) -> None:
    V, far = 163, 2**31
    storage = torch.empty(far + V, dtype=torch.bfloat16, device=backend.device)
    logits = storage.as_strided((2, V), (far, 1))
    near, seeds, positions = case(2, V, backend, torch.bfloat16)
    logits.copy_(near)
    for settings in ({}, {"top_k": 5, "top_p": 0.9}):
        found = sample(logits, seeds, positions, **settings, backend=backend.name)
        expected = sample(near, seeds, positions, **settings, backend=backend.name)
        for x, y in zip(found, expected, strict=True):
            assert_same_bits(x, y)


def test_empty_batch_and_one_token(backend: Backend) -> None:
    logits, seeds, positions = case(3, 1, backend)
    found = sample(logits, seeds, positions, top_k=1, top_p=0.5, min_p=1.0, backend=backend.name)
    assert not any(bool(x.any()) for x in found)
    empty = sample(logits[:0], seeds[:0], positions[:0], backend=backend.name)
    assert isinstance(empty, SampleOutput)
    assert [x.shape for x in empty] == [(0,)] * 3


def test_fp64_stays_fp64() -> None:
    for name in sorted({"ref", "cpu"} & set(available_backends())):
        logits, seeds, positions = case(4, 2500, Backend(name, "cpu"), torch.float64)
        for settings in ({"temperature": 0.7}, {"top_k": 30, "top_p": 0.9}):
            found = sample(logits, seeds, positions, **settings, backend=name)
            expected = sample_ref(logits, seeds, positions, **settings)
            assert_same_bits(found.tokens, expected.tokens)
            for x, y in zip(found[1:], expected[1:], strict=True):
                assert x.dtype == torch.float64
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_thread_count_changes_no_bit() -> None:
    logits, seeds, positions = case(40, 1500, Backend("cpu", "cpu"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sample(logits, seeds, positions, top_p=0.9, backend="cpu")
        torch.set_num_threads(4)
        four = sample(logits, seeds, positions, top_p=0.9, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for x, y in zip(one, four, strict=True):
        assert_same_bits(x, y)


def test_opcheck_and_compile(backend: Backend) -> None:
    B = 1 if backend.interpreted else 4
    logits, seeds, positions = case(B, 37, backend)
    before = logits.clone()
    if backend.name != "ref":
        t = torch.full((B,), 0.7, device=backend.device)
        args = (logits, seeds, positions, t, 1.0, None, 5, None, 0.9, None, 0.1, backend.name)
        torch.library.opcheck(torch.ops.fastrlhf.sample.default, args)

    def step(x: Tensor, s: Tensor, p: Tensor) -> SampleOutput:
        return sample(x * 1.0, s, p + 1, temperature=0.7, top_k=9, backend=backend.name)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = step(logits.requires_grad_(), seeds, positions)
    for x, y in zip(compiled(logits, seeds, positions), eager, strict=True):
        assert_same_bits(x, y)
        assert not x.requires_grad
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(7)}, r"logits must have shape \(B, V\), got \(7,\)"),
        ({"logits": torch.zeros(2, 0)}, "logits must have V >= 1"),
        ({"seeds": torch.zeros(3).long()}, r"seeds must have shape \(2,\), got \(3,\)"),
        ({"positions": torch.zeros(2)}, "positions must be int64 or int32"),
        ({"temperature": -1.0}, "temperature must be in"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be in"),
        ({"top_k": 1.5}, "top_k must be an integer, got 1.5"),
        ({"top_k": -1}, "top_k must be in"),
        ({"top_k": torch.tensor([1, -1])}, "top_k must be in"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": torch.tensor([0.5, 1.5])}, "top_p must be in"),
        ({"min_p": torch.ones(3)}, r"min_p must have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    zero = torch.zeros(2, dtype=torch.int64)
    arguments = {"logits": torch.zeros(2, 7), "seeds": zero, "positions": zero} | change
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
