"""gae against fp64 loops written from the papers' and the peers' definitions."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import far_apart
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import available_backends, gae
from fastrlhf_kernels.gae import gae_ref

OP = "gae"
NAN = float("nan")


def loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: a sum of discounted TD errors, each from its own step to the end."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (n - t) * deltas[n] for n in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def oracle(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lam: float,
    masked: str = "skip",
    value_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ "skip" cuts masked steps out and puts them back as zeros; "decay" fills them with zeros."""
    rewards, values = rewards.double().cpu(), values.double().cpu()
    B, T = rewards.shape
    valid = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.cpu() != 0
    has_value = valid if value_mask is None else value_mask.cpu() != 0
    advantages, returns = torch.zeros(B, T).double(), torch.zeros(B, T).double()
    for b in range(B):
        r = [float(rewards[b, t]) if valid[b, t] else 0.0 for t in range(T)]
        v = [float(values[b, t]) if has_value[b, t] else 0.0 for t in range(T)]
        runs = [t for t in range(T) if masked == "decay" or valid[b, t]]
        found = loop([r[t] for t in runs], [v[t] for t in runs], gamma, lam)
        for t, a in zip(runs, found, strict=True):
            advantages[b, t] = a if valid[b, t] else 0.0
            returns[b, t] = a + v[t] if has_value[b, t] else 0.0
    return advantages, returns


def check(backend: Backend, rewards: Tensor, values: Tensor, mask=None, **settings) -> None:
    settings = {"gamma": 1.0, "lam": 0.95} | settings
    actual = gae(rewards, values, mask, backend=backend.name, **settings)
    reference = gae_ref(rewards, values, mask, **settings)
    for a, r, o in zip(actual, reference, oracle(rewards, values, mask, **settings), strict=True):
        assert_accurate(a, r, o)
        assert not a.requires_grad


def case(B: int, T: int, backend: Backend, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(B, T, generator=generator)
    values = torch.randn(B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.3
    return tuple(x.to(backend.device) for x in (rewards, values, mask))


@given(
    B=st.integers(0, 3),
    T=st.integers(0, 40),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    masked=st.sampled_from(["skip", "decay", "value_mask"]),
    mask_dtype=st.sampled_from([None, torch.bool, torch.int64, torch.uint8, torch.float32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, B, T, gamma, lam, masked, mask_dtype, dtype, seed
) -> None:
    rewards, values, mask = case(B, T, backend, seed)
    settings = {"gamma": gamma, "lam": lam, "masked": "skip" if masked == "skip" else "decay"}
    if masked == "value_mask":
        settings["value_mask"] = mask | mask.roll(1, -1)  # a value lives one step longer
    given_mask = None if mask_dtype is None else mask.to(mask_dtype)
    check(backend, rewards.to(dtype), values.to(dtype), given_mask, **settings)


@pytest.mark.parametrize("T", [255, 256, 257, 600])  # about BLOCK_T, where tiles meet
@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_long_rows(backend: Backend, T: int, masked: str) -> None:
    rewards, values, mask = case(2, T, backend)
    mask[1, T // 4 :] = False  # tiles with no valid step
    check(backend, rewards, values, mask, masked=masked, gamma=0.99)


def test_skip_is_verl(backend: Backend) -> None:
    """verl's recursion, which carries value and advantage over observation tokens."""
    rewards, values, mask = case(3, 24, backend)
    r, v, m = (x.double().cpu() for x in (rewards, values, mask))
    carried = torch.zeros(3).double()
    next_value = torch.zeros(3).double()
    expected = torch.zeros(3, 24).double()
    for t in reversed(range(24)):
        stepped = r[:, t] + 0.9 * next_value - v[:, t] + 0.9 * 0.8 * carried
        next_value = v[:, t] * m[:, t] + (1 - m[:, t]) * next_value
        carried = stepped * m[:, t] + (1 - m[:, t]) * carried
        expected[:, t] = carried * m[:, t]
    actual, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8, backend=backend.name)
    reference, _ = gae_ref(rewards, values, mask, gamma=0.9, lam=0.8)
    assert_accurate(actual, reference, expected)


def test_decay_is_openrlhf(backend: Backend) -> None:
    """OpenRLHF's recursion: masked values and rewards are multiplied away, then a plain loop."""
    rewards, values, mask = case(3, 24, backend)
    r, v, m = (x.double().cpu() for x in (rewards, values, mask))
    r, v = r * m, v * m
    last = torch.zeros(3).double()
    expected = torch.zeros(3, 24).double()
    for t in reversed(range(24)):
        following = v[:, t + 1] if t < 23 else 0.0
        last = r[:, t] + 0.9 * following - v[:, t] + 0.9 * 0.8 * last
        expected[:, t] = last
    settings = {"gamma": 0.9, "lam": 0.8, "masked": "decay"}
    actual, returns = gae(rewards, values, mask, **settings, backend=backend.name)
    reference, reference_returns = gae_ref(rewards, values, mask, **settings)
    assert_accurate(actual, reference, expected * m)
    assert_accurate(returns, reference_returns, (expected + v) * m)


def test_value_mask_is_trl_ppo(backend: Backend) -> None:
    """TRL's PPO keeps the value one step past the last token, and its return with it."""
    rewards, values, _ = case(3, 12, backend)
    lengths = torch.tensor([4, 11, 12], device=backend.device)[:, None]
    steps = torch.arange(12, device=backend.device)
    mask, value_mask = steps < lengths, steps < lengths + 1
    r, v = rewards.double().cpu(), values.double().cpu()
    r, v = r.masked_fill(~mask.cpu(), 0), v.masked_fill(~value_mask.cpu(), 0)
    last = torch.zeros(3).double()
    expected = torch.zeros(3, 12).double()
    for t in reversed(range(12)):
        following = v[:, t + 1] if t < 11 else 0.0
        last = r[:, t] + following - v[:, t] + 0.95 * last
        expected[:, t] = last
    settings = {"masked": "decay", "value_mask": value_mask}
    advantages, returns = gae(rewards, values, mask, **settings, backend=backend.name)
    reference = gae_ref(rewards, values, mask, **settings)
    assert_accurate(advantages, reference[0], expected.masked_fill(~mask.cpu(), 0))
    assert_accurate(returns, reference[1], (expected + v).masked_fill(~value_mask.cpu(), 0))


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_nan_under_the_mask_reaches_nothing(backend: Backend, masked: str, bad: float) -> None:
    rewards, values, mask = case(3, 20, backend)
    mask[2] = False
    clean = gae(rewards, values, mask, masked=masked, backend=backend.name)
    poisoned = gae(
        rewards.masked_fill(~mask, bad),
        values.masked_fill(~mask, bad),
        mask,
        masked=masked,
        backend=backend.name,
    )
    for x, y in zip(clean, poisoned, strict=True):
        assert_same_bits(x, y)
        assert not y[~mask].any()


def test_a_valid_nan_stays_in_its_row(backend: Backend) -> None:
    rewards, values, mask = case(3, 20, backend)
    mask[:, 7] = True
    clean = gae(rewards, values, mask, backend=backend.name)
    rewards[1, 7] = NAN
    for x, y in zip(clean, gae(rewards, values, mask, backend=backend.name), strict=True):
        assert_same_bits(x[[0, 2]], y[[0, 2]])
        assert y[1, :8][mask[1, :8]].isnan().all()
        assert_same_bits(x[1, 8:], y[1, 8:])


@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_mixed_dtypes(backend: Backend, masked: str) -> None:
    """Arithmetic in fp32 whichever argument is narrow."""
    rewards, values, mask = case(3, 40, backend)
    op = partial(gae, masked=masked, backend=backend.name)
    for r, v in itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2):
        args = (rewards.to(r), values.to(v))
        expected = op(*(x.float() for x in args), mask)
        for x, y in zip(op(*args, mask), expected, strict=True):
            assert_same_bits(x, y)
    if backend.name in ("ref", "cpu"):
        expected = op(rewards.double(), values.bfloat16().double(), mask)
        for x, y in zip(op(rewards.double(), values.bfloat16(), mask), expected, strict=True):
            assert_same_bits(x, y)


def test_strides(backend: Backend) -> None:
    """Transposed, sliced and expanded arguments give the bits of their contiguous copies."""
    rewards, values, mask = case(4, 33, backend)
    odd = (
        rewards.T.contiguous().T,
        torch.stack([values, values], -1)[..., 0],
        torch.cat([mask, mask], 1)[:, :33],
    )
    expanded = (rewards[:1].expand(4, 33), values[:, :1].expand(4, 33), mask[:1].expand(4, 33))
    off = tuple(torch.cat([x[0, :1], x.flatten()])[1:].view_as(x) for x in (rewards, values, mask))
    assert not any(x.is_contiguous() for x in (*odd, *expanded))
    for args in (odd, expanded, off):
        dense = tuple(x.clone(memory_format=torch.contiguous_format) for x in args)
        for settings in ({}, {"masked": "decay", "value_mask": args[2].roll(1, 0)}):
            expected = gae(*dense, **settings, backend=backend.name)
            if settings:
                settings["value_mask"] = settings["value_mask"].T.contiguous().T
            for x, y in zip(gae(*args, **settings, backend=backend.name), expected, strict=True):
                assert_same_bits(x, y)


@pytest.mark.parametrize("B", [2, 3])
def test_rows_far_apart(backend: Backend, B: int) -> None:
    rewards, values, mask = case(B, 40, backend)
    args = (rewards.half(), values.half(), mask)
    op = partial(gae, masked="decay", backend=backend.name)
    expected = op(*args, value_mask=mask)
    for i in range(3):  # one at a time: each is 4 GiB of addresses
        for x, y in zip(
            op(*args[:i], far_apart(args[i]), *args[i + 1 :], value_mask=mask),
            expected,
            strict=True,
        ):
            assert_same_bits(x, y)
    for x, y in zip(op(*args, value_mask=far_apart(mask)), expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_nothing_and_next_to_nothing(backend: Backend, masked: str) -> None:
    op = partial(gae, masked=masked, backend=backend.name)
    for B, T in ((0, 0), (0, 5), (3, 0)):
        rewards, values, mask = case(B, T, backend)
        for valid in (None, mask):
            assert all(x.shape == (B, T) for x in op(rewards, values, valid))
    rewards, values, mask = case(3, 1, backend)
    mask[:] = torch.tensor([[True], [False], [True]])
    check(backend, rewards, values, mask, masked=masked)
    rewards, values, mask = case(3, 300, backend)
    assert not any(x.any() for x in op(rewards, values, torch.zeros_like(mask)))


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    B = 5 if backend.interpreted else 33  # the interpreter takes some 30 ms a row
    rewards, values, mask = case(B, 70, backend)
    for masked in ("skip", "decay"):
        together = gae(rewards, values, mask, masked=masked, backend=backend.name)
        again = gae(rewards, values, mask, masked=masked, backend=backend.name)
        for b in (0, B // 2, B - 1):
            row = slice(b, b + 1)
            alone = gae(rewards[row], values[row], mask[row], masked=masked, backend=backend.name)
            for x, y in zip(together, alone, strict=True):
                assert_same_bits(x[row], y)
        for x, y in zip(together, again, strict=True):
            assert_same_bits(x, y)
    value_mask = mask.roll(1, -1)
    op = partial(gae, masked="decay", backend=backend.name)
    together = op(rewards, values, mask, value_mask=value_mask)
    for b in (0, B - 1):
        row = slice(b, b + 1)
        alone = op(rewards[row], values[row], mask[row], value_mask=value_mask[row])
        for x, y in zip(together, alone, strict=True):
            assert_same_bits(x[row], y)


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_thread_count_changes_no_bit() -> None:
    rewards, values, mask = case(64, 500, Backend("cpu", "cpu"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gae(rewards, values, mask, backend="cpu")
        torch.set_num_threads(4)
        four = gae(rewards, values, mask, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for x, y in zip(one, four, strict=True):
        assert_same_bits(x, y)


def test_fp64_stays_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 50, generator=generator, dtype=torch.float64)
    expected = oracle(rewards, values, gamma=0.9, lam=0.95)
    for name in {"ref", "cpu"} & set(available_backends()):
        actual = gae(rewards, values, gamma=0.9, backend=name)
        for x, y in zip(actual, expected, strict=True):
            assert x.dtype == torch.float64
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
    assert gae(rewards.float(), values, backend="ref")[0].dtype == torch.float64


def test_arguments_keep_their_values(backend: Backend) -> None:
    args = case(3, 20, backend)
    before = [x.clone() for x in args]
    gae(*args, backend=backend.name)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_opcheck_and_compile(backend: Backend) -> None:
    rewards, values, mask = case(3, 20, backend)
    if backend.name != "ref":
        args = (rewards, values, mask, None, 0.9, 0.8, "skip", backend.name)
        torch.library.opcheck(torch.ops.fastrlhf.gae.default, args)
    rewards.requires_grad_()

    def step(r: Tensor, v: Tensor, m: Tensor) -> Tensor:
        advantages, returns = gae(2.0 * r, v, m, gamma=0.9, backend=backend.name)
        return advantages - returns

    eager = step(rewards, values, mask)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(rewards, values, mask)
    assert_same_bits(eager, compiled)
    assert not eager.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards must have shape \(B, T\), got \(4,\)"),
        ({"values": torch.zeros(3, 5)}, r"values must have shape \(3, 4\), got \(3, 5\)"),
        ({"values": torch.zeros(3, 4).long()}, "values must be fp32, bf16, fp16 or fp64"),
        ({"rewards": [1.0]}, "rewards must be a tensor, got list"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(3, 4\)"),
        ({"mask": torch.ones(3, 4).cfloat()}, "mask must be bool, int or float"),
        ({"gamma": 1.5}, r"gamma must be in \[0.0, 1.0\], got 1.5"),
        ({"lam": NAN}, "lam must be in"),
        ({"gamma": "1"}, "gamma must be a number, got str"),
        ({"masked": "cut"}, "masked must be one of skip, decay, got 'cut'"),
        ({"value_mask": torch.ones(3, 4)}, "value_mask needs masked='decay'"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"rewards": torch.zeros(3, 4), "values": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        gae(**arguments)
