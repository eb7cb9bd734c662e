"""rollout_advantages against loops over tokens in fp64, and against the ops that it is made of."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from op_checks import far_apart, layouts
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import (
    RolloutAdvantages,
    _env,
    available_backends,
    gae,
    kl_penalty,
    rollout_advantages,
    shape_rewards,
    whiten,
)
from fastrlhf_kernels._losses import BLOCK_TILES
from fastrlhf_kernels.rollout_advantages import rollout_advantages_ref

OP = "rollout_advantages"
NAN = float("nan")
ESTIMATORS = ["k1", "k2", "k3", "abs"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"beta": 0.1, "gamma": 1.0, "lam": 0.95, "estimator": "k1", "score_clip": None}


class Case(NamedTuple):
    """The tensors of a call, in its order."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    mask: Tensor

    def of_type(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in self[:4]), self.mask)

    def rows(self, rows: Any) -> Case:
        return Case(*(x[rows] for x in self))


def case(backend: Backend, B: int, T: int, seed: int = 0) -> Case:
    """Masks have holes, and rows of nothing."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3.0 * torch.rand(B, T, generator=generator)
    gap = 0.5 * torch.randn(B, T, generator=generator)
    values = torch.randn(B, T, generator=generator)
    scores = 2.0 * torch.randn(B, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.35
    found = Case(logprobs, logprobs + gap, values, scores, mask)
    return Case(*(x.to(backend.device) for x in found))


def estimate(d: float, estimator: str) -> float:
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    if estimator == "abs":
        return abs(d)
    return math.expm1(min(-d, 20.0)) + d


def oracle(
    c: Case, *, beta: float, gamma: float, lam: float, estimator: str, score_clip: float | None
) -> tuple[Tensor, ...]:
    """Whitened advantages, returns, rewards, kl; then advantages as GAE gives them, and the sum of
    the sizes of the terms in each.

    Valid steps alone, in one list a row; an advantage is the discounted sum of its TD errors.
    """
    x, y, v, s = (t.double().cpu() for t in c[:4])
    valid = c.mask.cpu() != 0
    white, returns, rewards, kl, raw, sizes = (torch.zeros(valid.shape).double() for _ in range(6))
    for b in range(len(valid)):
        at = [t for t in range(valid.shape[1]) if valid[b, t]]
        if not at:
            continue
        row_kl = [estimate(float(x[b, t]) - float(y[b, t]), estimator) for t in at]
        score = float(s[b])
        if score_clip is not None:
            score = max(-score_clip, min(score_clip, score))
        row_rewards = [-beta * k for k in row_kl]
        row_rewards[-1] += score
        row_values = [*(float(v[b, t]) for t in at), 0.0]
        deltas = [r + gamma * row_values[i + 1] - row_values[i] for i, r in enumerate(row_rewards)]
        for i, t in enumerate(at):
            terms = [(gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(at))]
            raw[b, t], sizes[b, t] = math.fsum(terms), math.fsum(map(abs, terms))
            returns[b, t] = raw[b, t] + row_values[i]
            rewards[b, t], kl[b, t] = row_rewards[i], row_kl[i]
    entries = raw[valid].tolist()
    if entries:
        mean = math.fsum(entries) / len(entries)
        var = math.fsum((e - mean) ** 2 for e in entries) / len(entries)
        white[valid] = (raw[valid] - mean) / math.sqrt(var + 1e-8)
    return white, returns, rewards, kl, raw, sizes


def assert_right(found: Any, reference: Any, expected: Any) -> None:
    """The rule of `oracle`; sums of TD errors, and what is whitened, in units of their terms."""
    white, returns, *others, raw, sizes = expected
    assert_accurate(found[1], reference[1], returns, terms=sizes)
    for a, r, e in zip(found[2:], reference[2:], others, strict=True):
        assert_accurate(a, r, e)
    spread = float(white.std(correction=0) / raw.std(correction=0)) if white.any() else 1.0
    size = float(raw.abs().max()) if raw.numel() else 0.0
    assert_accurate(found[0], reference[0], white, terms=size * spread)
    assert not any(x.requires_grad for x in found)


def check(backend: Backend, c: Case, **settings: Any) -> None:
    settings = SETTINGS | settings
    found = rollout_advantages(*c, **settings, backend=backend.name)
    assert isinstance(found, RolloutAdvantages)
    expected = oracle(c, **settings)
    assert_right(found, rollout_advantages_ref(*c, **settings), expected)
    plain = rollout_advantages(*c, **settings, whiten=False, backend=backend.name)
    reference = rollout_advantages_ref(*c, **settings, whiten=False)
    assert_accurate(plain.advantages, reference.advantages, expected[4], terms=expected[5])
    for x, y in zip(plain[1:], found[1:], strict=True):
        assert_same_bits(x, y)


@given(
    B=st.integers(0, 3),
    T=st.integers(0, 40),
    settings=st.fixed_dictionaries(
        {
            "beta": st.sampled_from([0.0, 0.1, 2.0]),
            "gamma": st.sampled_from([0.0, 0.9, 1.0]),
            "lam": st.sampled_from([0.0, 0.95, 1.0]),
            "estimator": st.sampled_from(ESTIMATORS),
            "score_clip": st.sampled_from([None, 0.5]),
        }
    ),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_matches_definition(backend: Backend, B, T, settings, mask_dtype, dtype, seed) -> None:
    c = case(backend, B, T, seed).of_type(dtype)
    check(backend, c._replace(mask=c.mask.to(mask_dtype)), **settings)


@pytest.mark.parametrize("T", [255, 256, 257, 600, 1100])  # about the blocks of each backend
def test_long_rows(backend: Backend, T: int) -> None:
    c = case(backend, 3, T)
    c.mask[1, T // 4 :] = False  # blocks without a valid step, the last token far from the end
    check(backend, c, estimator="k3", score_clip=1.0, gamma=0.99)


def composed(c: Case, backend: str, whitened: bool, group: Any = None, **settings: Any) -> Any:
    """The same by the ops that it is made of, called one after the other."""
    s = SETTINGS | settings
    kl = kl_penalty(c.logprobs, c.ref_logprobs, estimator=s["estimator"], backend=backend)
    kl = torch.where(c.mask != 0, kl, 0.0)
    rewards = shape_rewards(
        c.scores, kl, c.mask, beta=s["beta"], clip=s["score_clip"], backend=backend
    )
    advantages, returns = gae(
        rewards, c.values, c.mask, gamma=s["gamma"], lam=s["lam"], backend=backend
    )
    if whitened:
        advantages = whiten(advantages, c.mask, group=group, backend=backend)
    return advantages, returns, rewards, kl


@pytest.mark.parametrize(
    ("estimator", "shape"), [*((e, (3, 37)) for e in ESTIMATORS), ("k3", (2, 1100))]
)
@pytest.mark.not_on("cuda", "kl_penalty and shape_rewards have no CUDA C++ to compare bits with")
def test_has_the_bits_of_the_ops_that_it_is_made_of(
    backend: Backend, estimator: str, shape: tuple[int, int]
) -> None:
    """All four results unwhitened; whitened ones too but on a GPU, whose moments go row by row."""
    c = case(backend, *shape)
    for settings in ({"score_clip": 1.0}, {"gamma": 0.9, "lam": 0.8}):
        settings = settings | {"estimator": estimator}
        op = partial(rollout_advantages, *c, **(SETTINGS | settings), backend=backend.name)
        for x, y in zip(
            op(whiten=False), composed(c, backend.name, False, **settings), strict=True
        ):
            assert_same_bits(x, y)
        if backend.name != "triton":
            assert_same_bits(op()[0], composed(c, backend.name, True, **settings)[0])


def test_many_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the second launch merges by itself; some of nothing, some far off."""
    B = BLOCK_TILES + 20
    if backend.interpreted:  # some 30 ms a row
        B = 20
        monkeypatch.setattr(importlib.import_module("fastrlhf_kernels.whiten"), "BLOCK_TILES", 8)
    c = case(backend, B, 3)
    c.values[7] += 1e4
    found = rollout_advantages(*c, **SETTINGS, backend=backend.name)
    assert_right(found, rollout_advantages_ref(*c, **SETTINGS), oracle(c, **SETTINGS))


def test_the_score_is_at_the_last_valid_token(backend: Backend) -> None:
    """Not in the last column, and not behind a hole (trl#3750)."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    zeros = torch.zeros(4, 4)
    args = (zeros, zeros, zeros, torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    found = rollout_advantages(
        *(x.to(backend.device) for x in args), beta=0.1, lam=0.5, whiten=False, backend=backend.name
    )
    expected = torch.zeros(4, 4)
    expected[0, 1], expected[1, 3], expected[2, 3] = 1.0, 2.0, 3.0
    assert torch.equal(found.rewards.cpu(), expected)
    expected[0, 0], expected[1, 1] = 0.5, 1.0  # one step earlier, over the hole
    expected[2] = 3.0 * torch.tensor([0.125, 0.25, 0.5, 1.0])
    assert torch.equal(found.advantages.cpu(), expected)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_masked_reaches_nothing(backend: Backend, bad: float) -> None:
    c = case(backend, 4, 30)
    c.mask[2] = False
    for estimator in ("k1", "k3"):
        op = partial(rollout_advantages, beta=0.1, estimator=estimator, backend=backend.name)
        clean = op(*c)
        poisoned = [x.masked_fill(~c.mask, bad) for x in c[:3]]
        scores = c.scores.clone()
        scores[2] = bad
        for x, y in zip(op(*poisoned, scores, c.mask), clean, strict=True):
            assert_same_bits(x, y)
            assert not y[~c.mask].any()


def test_a_valid_nan_stays_in_its_row_until_it_is_whitened(backend: Backend) -> None:
    c = case(backend, 3, 20)
    c.mask[:, 7] = True
    op = partial(rollout_advantages, beta=0.1, whiten=False, backend=backend.name)
    clean = op(*c)
    c.logprobs[1, 7] = NAN
    found = op(*c)
    for x, y in zip(found, clean, strict=True):
        assert_same_bits(x[[0, 2]], y[[0, 2]])
        assert_same_bits(x[1, 8:], y[1, 8:])
        assert x[1, 7].isnan()
    assert found.advantages[1, :8][c.mask[1, :8]].isnan().all()
    whitened = rollout_advantages(*c, beta=0.1, backend=backend.name)
    assert whitened.advantages[c.mask].isnan().all()
    assert not whitened.advantages[~c.mask].any()


def test_nothing_and_next_to_nothing(backend: Backend) -> None:
    op = partial(rollout_advantages, beta=0.1, backend=backend.name)
    for B, T in ((0, 0), (0, 5), (3, 0)):
        assert all(x.shape == (B, T) for x in op(*case(backend, B, T)))
    c = case(backend, 3, 12)
    none = torch.zeros_like(c.mask)
    assert not any(x.any() for x in op(*c._replace(mask=none)))
    one = none.clone()
    one[1, 4] = True
    found = op(*c._replace(mask=one))
    assert not found.advantages.any()  # its variance is 0
    assert int((found.returns != 0).sum()) == 1
    check(backend, case(backend, 5, 1))


def test_equal_advantages_are_exactly_zero(backend: Backend) -> None:
    """Equal numbers have no variance, over several of every backend's tiles too."""
    for B, T in ((3, 1), (2, 700), (5 if backend.interpreted else 2100, 1)):
        zeros = torch.zeros(B, T, device=backend.device)
        args = (zeros, zeros, zeros + 0.1, zeros.new_zeros(B), torch.ones_like(zeros))
        found = rollout_advantages(*args, beta=1.0, gamma=0.0, backend=backend.name)
        assert not found.advantages.any()
        assert not found.returns.any()


def test_layouts(backend: Backend) -> None:
    c = case(backend, 4, 33)
    op = partial(rollout_advantages, beta=0.1, estimator="k3", backend=backend.name)
    expected = op(*c)
    for x, y, v, mask in layouts(*c[:3], c.mask):
        for scores in (c.scores, torch.stack([c.scores, c.scores], -1)[:, 0]):
            for found, wanted in zip(op(x, y, v, scores, mask), expected, strict=True):
                assert_same_bits(found, wanted)
    row = [t[:1].expand(4, *t.shape[1:]) for t in c]
    column = [t[:, :1].expand(4, 33) for t in c[:3]] + [row[3], row[4]]
    for args in (row, column):
        for found, wanted in zip(op(*args), op(*(t.contiguous() for t in args)), strict=True):
            assert_same_bits(found, wanted)


def test_rows_far_apart(backend: Backend) -> None:
    c = case(backend, 2, 70).of_type(torch.float16)
    op = partial(rollout_advantages, beta=0.1, backend=backend.name)
    expected = op(*c)
    for i in (0, 1, 2, 4):  # one at a time: each is 4 GiB of addresses
        for found, wanted in zip(op(*c[:i], far_apart(c[i]), *c[i + 1 :]), expected, strict=True):
            assert_same_bits(found, wanted)


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    B = 5 if backend.interpreted else 33
    c = case(backend, B, 70)
    op = partial(rollout_advantages, beta=0.1, whiten=False, backend=backend.name)
    together = op(*c)
    for b in (0, B // 2, B - 1):
        for x, y in zip(op(*c.rows(slice(b, b + 1))), together, strict=True):
            assert_same_bits(x, y[b : b + 1])


def test_repeats(backend: Backend) -> None:
    """The same bits run after run, whatever the number of threads; arguments are not written."""
    c = case(backend, 4 if backend.interpreted else 300, 200)
    before = [x.clone() for x in c]
    threads = torch.get_num_threads()
    runs = []
    try:
        for n in (1, 1, 4):
            torch.set_num_threads(n)
            runs.append(rollout_advantages(*c, beta=0.1, estimator="k3", backend=backend.name))
    finally:
        torch.set_num_threads(threads)
    if backend.name == "ref":  # torch's own sums may differ with the threads
        runs.pop()
    for run in runs[1:]:
        for x, y in zip(run, runs[0], strict=True):
            assert_same_bits(x, y)
    assert all(torch.equal(x, y) for x, y in zip(c, before, strict=True))


def test_fp64_stays_fp64(backend: Backend) -> None:
    c = case(backend, 3, 40)
    if backend.name in ("triton", "cuda"):
        with pytest.raises(ValueError, match="does not compute in fp64"):
            rollout_advantages(
                *c._replace(scores=c.scores.double()), beta=0.1, backend=backend.name
            )
        return
    wide = c.of_type(torch.float64)
    settings = SETTINGS | {"estimator": "k3", "gamma": 0.9}
    found = rollout_advantages(*wide, **settings, backend=backend.name)
    for x, y in zip(found, oracle(wide, **settings), strict=False):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x.cpu(), y, rtol=1e-12, atol=1e-12)
    mixed = rollout_advantages(
        *c._replace(values=c.values.double()), beta=0.1, backend=backend.name
    )
    assert all(x.dtype == torch.float64 for x in mixed)


def test_opcheck_and_compile(backend: Backend) -> None:
    c = case(backend, 3, 20)
    if backend.name != "ref":
        for clip, white in ((None, True), (1.0, False)):
            args = (*c, 0.1, 1.0, 0.95, "k3", clip, white, backend.name)
            torch.library.opcheck(torch.ops.fastrlhf.rollout_advantages.default, args)
    leaf = c.logprobs.clone().requires_grad_()

    def step(x: Tensor, *others: Tensor) -> Tensor:
        return sum(rollout_advantages(2.0 * x, *others, beta=0.1, backend=backend.name))

    eager = step(leaf, *c[1:])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf, *c[1:])
    assert_same_bits(eager, compiled)
    assert not eager.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(4)}, r"logprobs must have shape \(B, T\), got \(4,\)"),
        ({"logprobs": [0.0]}, "logprobs must be a tensor, got list"),
        ({"logprobs": torch.zeros(3, 4).int()}, "logprobs must be fp32, bf16, fp16 or fp64"),
        ({"ref_logprobs": torch.zeros(3, 5)}, r"ref_logprobs must have shape \(3, 4\)"),
        ({"values": torch.zeros(3, 4).long()}, "values must be fp32, bf16, fp16 or fp64"),
        ({"values": torch.zeros(3, 4, device="meta")}, "values must be on cpu, got meta"),
        ({"scores": torch.zeros(4)}, r"scores must have shape \(3,\), got \(4,\)"),
        ({"scores": 1.0}, "scores must be a tensor, got float"),
        ({"scores": torch.zeros(3, device="meta")}, "scores must be on cpu, got meta"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(3, 4\), got \(4,\)"),
        ({"mask": None}, "mask must be a tensor, got None"),
        ({"mask": torch.ones(3, 4).cfloat()}, "mask must be bool, int or float"),
        ({"beta": NAN}, "beta must be in"),
        ({"beta": "1"}, "beta must be a number, got str"),
        ({"gamma": 1.5}, r"gamma must be in \[0.0, 1.0\], got 1.5"),
        ({"lam": -0.1}, r"lam must be in \[0.0, 1.0\], got -0.1"),
        ({"estimator": "k4"}, "estimator must be one of k1, k2, k3, abs, got 'k4'"),
        ({"score_clip": 0.0}, r"score_clip must be in \(0.0, inf\], got 0.0"),
        ({"whiten": 1}, "whiten must be a bool, got int"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = dict.fromkeys(("logprobs", "ref_logprobs", "values", "mask"), torch.zeros(3, 4))
    arguments |= {"scores": torch.zeros(3), "beta": 0.1} | change
    with pytest.raises(ValueError, match=message):
        rollout_advantages(**arguments)


def rank_main(rank: int, store: str) -> None:
    """One of two ranks: unequal shares, then shares of which one has no valid token."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    backends = {"ref", "cpu", *(["triton"] if _env.INTERPRET else [])} & set(available_backends())
    c = case(Backend("ref", "cpu"), 9, 40)
    mine = slice(0, 3) if rank == 0 else slice(3, 9)
    for mask in (c.mask, c.mask & (torch.arange(9)[:, None] < 3)):
        whole = c._replace(mask=mask)
        expected = [x[mine] for x in oracle(whole, **SETTINGS)]
        reference = [x[mine] for x in rollout_advantages_ref(*whole, **SETTINGS)]
        for name in sorted(backends):
            op: Callable[..., Any] = partial(rollout_advantages, **SETTINGS, backend=name)
            share = op(*whole.rows(mine), group=group)
            assert_right(share, reference, expected)
            parts = composed(whole.rows(mine), name, True, group)
            for x, y in zip(share, parts, strict=True):
                assert_same_bits(x, y)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_are_one(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
