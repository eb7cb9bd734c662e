"""gae_varlen against gae's fp64 definition, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import gae, gae_varlen
from fastrlhf_kernels.gae_varlen import gae_varlen_ref

OP = "gae_varlen"
NAN = float("nan")


def oracle(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The definition: a sum of discounted TD errors, each from its own step to the end."""
    advantages: list[float] = []
    start = 0
    for T in lengths:
        r = rewards[start : start + T].double().tolist()
        v = [*values[start : start + T].double().tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(T)]
        for t in range(T):
            advantages.append(sum((gamma * lam) ** (n - t) * deltas[n] for n in range(t, T)))
        start += T
    found = torch.tensor(advantages, dtype=torch.float64)
    return found, found + values.double().cpu()


def case(lengths: list[int], backend: Backend, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return rewards.to(backend.device), values.to(backend.device), offsets.to(backend.device)


@given(
    lengths=st.lists(st.integers(0, 20), max_size=5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offsets=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_matches_definition(backend: Backend, lengths, gamma, lam, dtype, offsets, seed) -> None:
    rewards, values, cu_seqlens = case(lengths, backend, seed)
    args = (rewards.to(dtype), values.to(dtype), cu_seqlens.to(offsets))
    actual = gae_varlen(*args, gamma=gamma, lam=lam, backend=backend.name)
    reference = gae_varlen_ref(*args, gamma=gamma, lam=lam)
    expected = oracle(*args[:2], lengths, gamma, lam)
    for a, r, o in zip(actual, reference, expected, strict=True):
        assert_accurate(a, r, o)
        assert not a.requires_grad


def test_long_sequences(backend: Backend) -> None:
    lengths = [255, 256, 0, 257, 1, 600]  # about BLOCK_T, where tiles meet
    args = case(lengths, backend)
    actual = gae_varlen(*args, backend=backend.name)
    reference = gae_varlen_ref(*args)
    for a, r, o in zip(actual, reference, oracle(*args[:2], lengths, 1.0, 0.95), strict=True):
        assert_accurate(a, r, o)


def test_sequences_do_not_depend_on_the_batch(backend: Backend) -> None:
    """A sequence packed with others has the bits that it has alone, and those of gae."""
    rewards, values, cu_seqlens = case([7, 40, 0, 300], backend)
    packed = gae_varlen(rewards, values, cu_seqlens, backend=backend.name)
    again = gae_varlen(rewards, values, cu_seqlens, backend=backend.name)
    for x, y in zip(packed, again, strict=True):
        assert_same_bits(x, y)
    for start, end in ((0, 7), (7, 47), (47, 347)):
        r, v = rewards[start:end], values[start:end]
        one = torch.tensor([0, end - start], device=backend.device)
        alone = gae_varlen(r, v, one, backend=backend.name)
        padded = gae(r[None], v[None], backend=backend.name)
        for x, y, z in zip(packed, alone, padded, strict=True):
            assert_same_bits(x[start:end], y)
            assert_same_bits(y, z[0])


def test_nan_stays_in_its_sequence(backend: Backend) -> None:
    rewards, values, cu_seqlens = case([5, 5, 5], backend)
    clean = gae_varlen(rewards, values, cu_seqlens, backend=backend.name)
    values[7] = NAN
    found = gae_varlen(rewards, values, cu_seqlens, backend=backend.name)
    for x, y in zip(clean, found, strict=True):
        assert_same_bits(x[:5], y[:5])
        assert_same_bits(x[8:], y[8:])
        assert y[5:8].isnan().all()


def test_strided_arguments(backend: Backend) -> None:
    rewards, values, cu_seqlens = case([9, 13], backend)
    args = (rewards.repeat_interleave(2)[::2], values[:1].expand(22), cu_seqlens)
    dense = gae_varlen(*(x.contiguous() for x in args), backend=backend.name)
    for x, y in zip(gae_varlen(*args, backend=backend.name), dense, strict=True):
        assert_same_bits(x, y)


def test_entries_far_apart(backend: Backend) -> None:
    """Steps 2^31 elements apart, on pages that are never touched."""
    rewards, values, cu_seqlens = case([1, 1], backend)
    wide = torch.empty(2**31 + 1, dtype=torch.float16, device=backend.device)
    far = wide.as_strided((2,), (2**31,)).copy_(rewards)
    expected = gae_varlen(rewards.half(), values, cu_seqlens, backend=backend.name)
    for x, y in zip(
        gae_varlen(far, values, cu_seqlens, backend=backend.name), expected, strict=True
    ):
        assert_same_bits(x, y)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0, 1]])
def test_nothing_and_next_to_nothing(backend: Backend, lengths: list[int]) -> None:
    args = case(lengths, backend)
    found = gae_varlen(*args, backend=backend.name)
    expected = oracle(*args[:2], lengths, 1.0, 0.95)
    for a, r, o in zip(found, gae_varlen_ref(*args), expected, strict=True):
        assert_accurate(a, r, o)


def test_fp64_stays_fp64(backend: Backend) -> None:
    if backend.name in ("triton", "cuda"):
        args = (x.double() for x in case([3], backend)[:2])
        with pytest.raises(ValueError, match="does not compute in fp64"):
            gae_varlen(*args, torch.tensor([0, 3]).to(backend.device), backend=backend.name)
        return
    rewards, values, cu_seqlens = case([30, 0, 5], backend)
    rewards, values = rewards.double(), values.double()
    actual = gae_varlen(rewards, values, cu_seqlens, gamma=0.9, backend=backend.name)
    for x, y in zip(actual, oracle(rewards, values, [30, 0, 5], 0.9, 0.95), strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x.cpu(), y, rtol=1e-13, atol=1e-13)


def test_opcheck_and_compile(backend: Backend) -> None:
    rewards, values, cu_seqlens = case([9, 13], backend)
    if backend.name == "ref":
        return  # the reference packs by lengths it reads: there is no graph without a break
    args = (rewards, values, cu_seqlens, 0.9, 0.8, backend.name)
    torch.library.opcheck(torch.ops.fastrlhf.gae_varlen.default, args)

    def step(r: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        advantages, returns = gae_varlen(2.0 * r, v, offsets, backend=backend.name)
        return advantages - returns

    rewards.requires_grad_()
    eager = step(rewards, values, cu_seqlens)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(eager, compiled(rewards, values, cu_seqlens))
    assert not eager.requires_grad


@pytest.mark.parametrize("offsets", [[1, 6], [0, 5], [0, 4, 3, 6], [0, 7, 6]])
def test_bad_offsets_are_refused(backend: Backend, offsets: list[int]) -> None:
    if backend.device != "cpu":
        pytest.skip("on a GPU offsets are checked with FASTRLHF_DEBUG=1 only")
    x = torch.zeros(6)
    with pytest.raises(ValueError, match="cu_seqlens must be offsets from 0 to 6, not decreasing"):
        gae_varlen(x, x, torch.tensor(offsets), backend=backend.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(2, 3)}, r"rewards must have shape \(sum T,\), got \(2, 3\)"),
        ({"values": torch.zeros(5)}, r"values must have shape \(6,\), got \(5,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be int64 or int32"),
        ({"cu_seqlens": torch.zeros(0).long()}, r"cu_seqlens must have shape \(G \+ 1,\)"),
        ({"rewards": [0.0]}, "rewards must be a tensor, got list"),
        ({"rewards": torch.zeros(6).int()}, "rewards must be fp32, bf16, fp16 or fp64"),
        ({"values": torch.zeros(6, device="meta")}, "values must be on cpu, got meta"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens must be a tensor, got list"),
        (
            {"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
            "cu_seqlens must be on cpu, got meta",
        ),
        ({"gamma": "1"}, "gamma must be a number, got str"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
        ({"lam": -0.1}, r"lam must be in \[0.0, 1.0\], got -0.1"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "rewards": torch.zeros(6),
        "values": torch.zeros(6),
        "cu_seqlens": torch.tensor([0, 6]),
    } | change
    with pytest.raises(ValueError, match=message):
        gae_varlen(**arguments)
