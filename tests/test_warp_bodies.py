"""The bodies of the CUDA kernels of gae and rollout_advantages, run on a CPU.

csrc/gae_warp.h and csrc/rollout_warp.h are templates over what a warp is. csrc/selftest.cpp runs
them with a warp made of arrays, so that lanes, ballots, shuffles and carries are tested without a
GPU; what this cannot see is the hardware's own shuffles, and the rounding of nvcc's arithmetic.
The ops are called as ever, with the entry of the `cpu` backend replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Backend, assert_accurate, assert_same_bits, instruction_set
from test_gae import case as gae_case
from test_gae import oracle as gae_oracle
from test_rollout_advantages import SETTINGS, assert_right, case, check, composed, oracle
from torch import Tensor

from fastrlhf_kernels import _native, gae, rollout_advantages
from fastrlhf_kernels.gae import gae_ref
from fastrlhf_kernels.rollout_advantages import rollout_advantages_ref

NAN = float("nan")
CPU = Backend("cpu", "cpu")
ENTRIES = {"gae": "test_gae_warp", "rollout_advantages": "test_rollout_warp"}
SCRATCH = (
    9  # which argument of rollout_advantages it is; the body wants three doubles a row, and 24
)

pytestmark = pytest.mark.skipif(
    _native.cpu is None, reason=f"the C++ part is not built: {_native.cpu_missing}"
)
T = 200


@pytest.fixture(params=("not built",) if _native.cpu is None else _native.cpu.isas(), autouse=True)
def warp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of gae and rollout_advantages on `cpu` run the warps' bodies, on each set in turn."""
    real = _native.call

    def call(op: str, like: Tensor, *args: Any) -> None:
        if op == "rollout_advantages":
            scratch = torch.empty(3 * like.shape[0] + 24, dtype=torch.float64)
            args = (*args[:SCRATCH], scratch.data_ptr(), *args[SCRATCH + 1 :])
        real(ENTRIES.get(op, op), like, *args)

    monkeypatch.setattr(_native, "call", call)
    with instruction_set(request.param):
        yield


@pytest.mark.parametrize("masked", ["none", "skip", "decay", "value_mask"])
def test_gae_at_every_length(masked: str) -> None:
    """An advantage depends on later steps alone: the last n steps of the rows, for each n."""
    rewards, values, mask = gae_case(4, T, CPU)
    mask[1, 40:150] = False  # tiles with no valid step
    mask[2] = False
    mask[3, -40:] = False
    settings: dict[str, Any] = {"masked": "skip" if masked in ("none", "skip") else "decay"}
    if masked == "value_mask":
        settings["value_mask"] = mask | mask.roll(1, -1)
    valid = None if masked == "none" else mask
    exact = gae_oracle(rewards, values, valid, gamma=0.99, lam=0.9, **settings)
    plain = gae_ref(rewards, values, valid, gamma=0.99, lam=0.9, **settings)
    for n in range(T + 1):
        last = slice(T - n, None)
        also = settings.get("value_mask")
        found = gae(
            rewards[:, last],
            values[:, last],
            None if valid is None else valid[:, last],
            gamma=0.99,
            lam=0.9,
            backend="cpu",
            masked=settings["masked"],
            value_mask=None if also is None else also[:, last],
        )
        for f, p, e in zip(found, plain, exact, strict=True):
            assert_accurate(f, p[:, last], e[:, last])


def test_gae_is_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's plain loop gives the same within rounding; in fp64 far closer than fp32 could."""
    rewards, values, mask = gae_case(5, 170, CPU)
    rewards, values = rewards.double(), values.double()
    for masked in ("skip", "decay"):
        op = partial(gae, rewards, values, mask, masked=masked, backend="cpu")
        scan = op()
        with monkeypatch.context() as m:
            m.delitem(ENTRIES, "gae")
            loop = op()
        for x, y in zip(scan, loop, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
            assert torch.equal(x == 0, y == 0)


@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_gae_leaves_nan_where_it_is(masked: str) -> None:
    rewards, values, mask = gae_case(3, 100, CPU)
    op = partial(gae, masked=masked, backend="cpu")
    clean = op(rewards, values, mask)
    poisoned = (x.masked_fill(~mask, NAN) for x in (rewards, values))
    for x, y in zip(op(*poisoned, mask), clean, strict=True):
        assert_same_bits(x, y)
    mask[:, 70] = True
    clean = op(rewards, values, mask)
    rewards[1, 70] = NAN
    for x, y in zip(op(rewards, values, mask), clean, strict=True):
        assert_same_bits(x[[0, 2]], y[[0, 2]])
        assert_same_bits(x[1, 71:], y[1, 71:])
        assert x[1, :71][mask[1, :71]].isnan().all()
        assert not x[1][~mask[1]].any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_rollout_advantages(estimator: str) -> None:
    for n in (0, 1, 2, 31, 32, 33, 64, 65, 131):
        check(CPU, case(CPU, 3, n, seed=n), estimator=estimator, score_clip=1.0, gamma=0.98)


def test_rollout_advantages_at_every_length() -> None:
    """Rewards, returns and KL of the last n steps; the whitened advantages go with the length."""
    c = case(CPU, 4, T)
    c.mask[1, 40:150] = False
    c.mask[3, -40:] = False
    exact = oracle(c, **SETTINGS)
    plain = rollout_advantages_ref(*c, **SETTINGS, whiten=False)
    for n in range(T + 1):
        last = slice(T - n, None)
        part = (*(x[:, last] for x in c[:3]), c.scores, c.mask[:, last])
        found = rollout_advantages(*part, **SETTINGS, whiten=False, backend="cpu")
        # A row's score stands at its last valid step, wherever the row begins.
        for f, p, e in zip(found, plain, (exact[4], *exact[1:4]), strict=True):
            assert_accurate(f, p[:, last], e[:, last], terms=exact[5][:, last])


def test_rollout_advantages_has_the_bits_of_gaes_body() -> None:
    """Given the rewards that kl_penalty and shape_rewards make, which are the same for k1."""
    c = case(CPU, 5, 150)
    found = rollout_advantages(*c, **SETTINGS, whiten=False, backend="cpu")
    for x, y in zip(found, composed(c, "cpu", False), strict=True):
        assert_same_bits(x, y)
    alone = rollout_advantages(*c.rows(slice(2, 3)), **SETTINGS, whiten=False, backend="cpu")
    for x, y in zip(alone, found, strict=True):
        assert_same_bits(x, y[2:3])


@pytest.mark.parametrize("rows", [1, 8, 33, 300])  # a lane, a share, over a warp, several each
def test_moments_of_many_rows(rows: int) -> None:
    c = case(CPU, rows, 3)
    c.values[rows // 2] += 1e4
    found = rollout_advantages(*c, **SETTINGS, backend="cpu")
    assert_right(found, rollout_advantages_ref(*c, **SETTINGS), oracle(c, **SETTINGS))


def test_large_offsets_cost_nothing() -> None:
    """Advantages about 1e6 with a spread of 1: the moments are shifted by one of them."""
    B, n = 40, 70
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(B, n, generator=generator) - 1e6
    zeros = torch.zeros(B, n)
    args = (zeros, zeros, values, torch.zeros(B), torch.ones(B, n))
    settings = SETTINGS | {"gamma": 0.0}
    found = rollout_advantages(*args, **settings, backend="cpu")
    exact = -values.double()
    exact = (exact - exact.mean()) / (exact.var(correction=0) + 1e-8).sqrt()
    assert_accurate(found[0], rollout_advantages_ref(*args, **settings)[0], exact)
    equal = (zeros, zeros, zeros - 1e6 / 3, torch.zeros(B), torch.ones(B, n))
    assert not rollout_advantages(*equal, **settings, backend="cpu").advantages.any()


def test_what_is_masked_reaches_nothing() -> None:
    c = case(CPU, 4, 90)
    c.mask[2] = False
    for estimator in ("k1", "k3"):
        op = partial(rollout_advantages, beta=0.1, estimator=estimator, backend="cpu")
        clean = op(*c)
        scores = c.scores.clone()
        scores[2] = NAN
        poisoned = [x.masked_fill(~c.mask, NAN) for x in c[:3]]
        for x, y in zip(op(*poisoned, scores, c.mask), clean, strict=True):
            assert_same_bits(x, y)
