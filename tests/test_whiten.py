"""whiten against its definition in fp64, in one process and over two."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiled_is_eager, far_apart, layouts
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import _env, available_backends, whiten
from fastrlhf_kernels._losses import BLOCK_TILES
from fastrlhf_kernels._moments import merge_ref, moments_ref
from fastrlhf_kernels.whiten import whiten_ref

OP = "whiten"
NAN = float("nan")


def oracle(
    x: Tensor, mask: Tensor | None = None, *, shift_mean=True, unbiased=False, eps=1e-8
) -> Tensor:
    """Exact sums (math.fsum) of the valid entries."""
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    entries = x.double().cpu()[valid.cpu()].tolist()
    out = torch.zeros(x.shape, dtype=torch.float64)
    if not entries:
        return out
    n = len(entries)
    mean = math.fsum(entries) / n
    var = math.fsum((e - mean) ** 2 for e in entries) / max(n - unbiased, 1) if n > 1 else 0.0
    out[valid.cpu()] = torch.tensor(
        [(e - mean) / math.sqrt(var + eps) + (0.0 if shift_mean else mean) for e in entries],
        dtype=torch.float64,
    )
    return out


def check(backend: Backend, x: Tensor, mask: Tensor | None = None, **settings) -> None:
    actual = whiten(x, mask, backend=backend.name, **settings)
    assert_accurate(actual, whiten_ref(x, mask, **settings), oracle(x, mask, **settings))
    assert not actual.requires_grad


def case(backend: Backend, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.4
    return x.to(backend.device), mask.to(backend.device)


@given(
    shape=st.sampled_from([(), (0,), (1,), (2,), (5,), (3, 0), (3, 7), (2, 3, 5), (70,)]),
    shift_mean=st.booleans(),
    unbiased=st.booleans(),
    eps=st.sampled_from([1e-8, 1e-3, 1.0]),
    mask_dtype=st.sampled_from([None, torch.bool, torch.int64, torch.uint8, torch.float32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, shape, shift_mean, unbiased, eps, mask_dtype, dtype, seed
) -> None:
    x, mask = case(backend, shape, seed)
    settings = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": eps}
    check(backend, x.to(dtype), None if mask_dtype is None else mask.to(mask_dtype), **settings)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_large_offsets_cost_nothing(backend: Backend, offset: float, shift_mean: bool) -> None:
    """Over several tiles, one of them without a valid entry."""
    x, mask = case(backend, (4500,))
    mask[1024:2048] = False
    check(backend, x + offset, mask, shift_mean=shift_mean)


def test_far_apart(backend: Backend) -> None:
    """Tiles whose means differ by far more than their spread."""
    x, mask = case(backend, (3000,))
    x[1500:] += 1e5
    check(backend, x, mask)


def test_many_parts(backend: Backend) -> None:
    """Moments of more parts than the Triton kernels merge at once, some of them of nothing."""
    if backend.name == "ref":
        parts_of, apply = moments_ref, None
    else:
        parts_of = partial(torch.ops.fastrlhf.whiten_moments, backend=backend.name)
        apply = torch.ops.fastrlhf.whiten_apply
    x, mask = case(backend, (3 * (BLOCK_TILES + 40),))
    x += 1e4
    chunks = zip(x.split(30), mask.split(30), strict=True)
    parts = torch.stack([parts_of(c, m) for c, m in chunks])
    whole = parts_of(x, mask)
    n, mean, m2 = merge_ref(parts)
    torch.testing.assert_close(torch.stack([n, mean, m2]), whole, rtol=1e-6, atol=0)
    if apply is not None:
        parts = torch.cat([parts, parts.new_zeros(BLOCK_TILES, 3)])
        y = apply(x, mask, parts.roll(7, 0), True, False, 1e-8, backend.name)
        assert_accurate(y, whiten_ref(x, mask), oracle(x, mask))


@pytest.mark.parametrize("unbiased", [True, False])
def test_none_and_one(backend: Backend, unbiased: bool) -> None:
    x, mask = case(backend, (40,))
    none = torch.zeros_like(mask)
    assert not whiten(x, none, unbiased=unbiased, backend=backend.name).any()
    one = none.clone()
    one[7] = True
    assert not whiten(x, one, unbiased=unbiased, backend=backend.name).any()
    kept = whiten(x, one, shift_mean=False, unbiased=unbiased, backend=backend.name)
    assert torch.equal(kept, torch.where(one, x, 0.0))


@pytest.mark.parametrize("n", [3, 1999])
@pytest.mark.parametrize("value", [0.1, -1e4 / 3])
def test_equal_entries_are_exactly_zero(backend: Backend, n: int, value: float) -> None:
    x = torch.full((n,), value, device=backend.device)
    for eps in (1e-8, 0.0):
        assert not whiten(x, eps=eps, backend=backend.name).any()
    if backend.name in ("ref", "cpu"):
        wide = torch.full((n,), value, dtype=torch.float64, device=backend.device)
        assert not whiten(wide, eps=0.0, backend=backend.name).any()


@pytest.mark.parametrize("scale", [1e20, 1e-24])
def test_scales_whose_squares_are_no_numbers_of_fp32(backend: Backend, scale: float) -> None:
    for n in (40, 1500):
        x, mask = case(backend, (n,))
        small = whiten(x, mask, eps=0.0, backend=backend.name)
        found = whiten(x * scale, mask, eps=0.0, backend=backend.name)
        torch.testing.assert_close(found, small, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_what_is_masked_reaches_nothing(backend: Backend, bad: float) -> None:
    for n in (40, 1500):
        x, mask = case(backend, (n,))
        mask[0] = False  # also in the first place, from which moments are shifted
        clean = whiten(x, mask, backend=backend.name)
        assert_same_bits(whiten(x.masked_fill(~mask, bad), mask, backend=backend.name), clean)
        x[n - 3], mask[n - 3] = bad, True
        assert whiten(x, mask, backend=backend.name)[mask].isnan().all()
        assert not whiten(x, mask, backend=backend.name)[~mask].any()


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_one_that_is_no_number(backend: Backend, bad: float) -> None:
    """The only valid entry: its variance is 0, its distance from the mean no number."""
    x, mask = case(backend, (40,))
    one = torch.zeros_like(mask)
    one[7] = True
    x[7] = bad
    for shift_mean in (True, False):
        y = whiten(x, one, shift_mean=shift_mean, backend=backend.name)
        assert y[7].isnan()
        assert not y[~one].any()


def test_layouts(backend: Backend) -> None:
    x, mask = case(backend, (4, 33))
    expected = whiten(x, mask, backend=backend.name)
    for odd_x, odd_mask in layouts(x, mask):
        assert_same_bits(whiten(odd_x, odd_mask, backend=backend.name), expected)
    row = (x[:1].expand(4, 33), mask[:1].expand(4, 33))
    dense = whiten(*(t.contiguous() for t in row), backend=backend.name)
    assert_same_bits(whiten(*row, backend=backend.name), dense)


def test_rows_far_apart(backend: Backend) -> None:
    x, mask = case(backend, (2, 40))
    x = x.half()
    expected = whiten(x, mask, backend=backend.name)
    assert_same_bits(whiten(far_apart(x), mask, backend=backend.name), expected)
    assert_same_bits(whiten(x, far_apart(mask), backend=backend.name), expected)


def test_repeats(backend: Backend) -> None:
    """The same bits run after run, whatever the number of threads; arguments are not written."""
    x, mask = case(backend, (5000 if backend.interpreted else 100_000,))
    before, masked = x.clone(), mask.clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, second = (whiten(x, mask, backend=backend.name) for _ in range(2))
        torch.set_num_threads(4)
        third = whiten(x, mask, backend=backend.name)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(first, second)
    assert_same_bits(first, third)
    assert torch.equal(x, before)
    assert torch.equal(mask, masked)


def test_fp64_stays_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator, dtype=torch.float64) + 1e4
    for name in {"ref", "cpu"} & set(available_backends()):
        actual = whiten(x, backend=name)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, oracle(x), rtol=1e-11, atol=1e-11)


def test_opcheck_and_compile(backend: Backend) -> None:
    x, mask = case(backend, (3, 20))
    op = partial(whiten, backend=backend.name)
    if backend.name != "ref":
        ops = torch.ops.fastrlhf
        args = (x, mask, True, False, 1e-8, backend.name)
        torch.library.opcheck(ops.whiten.default, args)
        torch.library.opcheck(ops.whiten_moments.default, (x, None, backend.name))
        parts = ops.whiten_moments(x, mask, backend.name).expand(2, 3).contiguous()
        args = (x, mask, parts, False, True, 1e-8, backend.name)
        torch.library.opcheck(ops.whiten_apply.default, args)
    # It has no gradient of its own; that of its argument goes on through the rest.
    assert_compiled_is_eager(lambda x: x * op(2.0 * x, mask), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"x": torch.zeros(3, 4).int()}, "x must be fp32, bf16, fp16 or fp64"),
        ({"mask": torch.ones(4)}, r"mask must have shape \(3, 4\), got \(4,\)"),
        ({"mask": torch.ones(3, 4, device="meta")}, "mask must be on cpu, got meta"),
        ({"mask": torch.ones(3, 4).cfloat()}, "mask must be bool, int or float"),
        ({"eps": -1.0}, r"eps must be in \[0.0, inf\], got -1.0"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(**({"x": torch.zeros(3, 4)} | change))


def rank_main(rank: int, store: str) -> None:
    """One of two ranks: unequal shares, then shares of which one has no valid entry."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    backends = {"ref", "cpu", *(["triton"] if _env.INTERPRET else [])} & set(available_backends())
    x, mask = case(Backend("ref", "cpu"), (2500,))
    x = x + 1e4
    for mask_here in (mask, mask & (torch.arange(2500) < 700), torch.zeros_like(mask)):
        mine = slice(0, 700) if rank == 0 else slice(700, 2500)
        for settings in ({}, {"shift_mean": False, "unbiased": True}):
            expected = oracle(x, mask_here, **settings)[mine]
            reference = whiten_ref(x, mask_here, **settings)[mine]
            for name in backends:
                op = partial(whiten, **settings, group=group, backend=name)
                share = op(x[mine], mask_here[mine])
                assert_accurate(share, reference, expected)
    compiled = torch.compile(
        lambda x, m: whiten(2.0 * x, m, group=group, backend="ref"),
        fullgraph=True,
        backend="aot_eager",
    )
    share = compiled(x[mine], mask[mine])
    assert_same_bits(share, whiten(2.0 * x[mine], mask[mine], group=group, backend="ref"))
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
