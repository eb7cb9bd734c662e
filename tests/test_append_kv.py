"""append_kv against a loop over tokens; what is not named keeps its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Backend, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import append_kv, available_backends
from fastrlhf_kernels.append_kv import _append_kv_native

OP = "append_kv"
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    backend: Backend,
    N: int = 9,
    pages: int = 5,
    page_size: int = 3,
    HKV: int = 2,
    D: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    skip: float = 0.2,
    seed: int = 0,
) -> list[Tensor]:
    """k, v, k_cache, v_cache, slots; a share of the slots is below 0."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, N, HKV, D, generator=generator).to(dtype)
    caches = torch.randn(2, pages, page_size, HKV, D, generator=generator)
    slots = torch.randperm(pages * page_size, generator=generator)[:N]
    skipped = torch.rand(N, generator=generator) < skip
    slots = torch.where(skipped, torch.randint(-9, 0, (N,), generator=generator), slots)
    k_cache, v_cache = caches.to(cache_dtype or dtype)
    return [x.to(backend.device).clone() for x in (k, v, k_cache, v_cache, slots)]


def written(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> list[Tensor]:
    """The definition, on copies."""
    caches = [k_cache.clone(), v_cache.clone()]
    for n, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, k_cache.shape[1])
            for cache, x in zip(caches, (k, v), strict=True):
                cache[page, offset] = x[n].to(cache.dtype)
    return caches


def check(backend: Backend, k, v, k_cache, v_cache, slots) -> None:
    expected = written(k, v, k_cache, v_cache, slots)
    assert append_kv(k, v, k_cache, v_cache, slots, backend=backend.name) is None
    for cache, wanted in zip((k_cache, v_cache), expected, strict=True):
        if backend.interpreted and cache.dtype == torch.bfloat16 != k.dtype:
            # Triton's interpreter truncates to bf16.
            torch.testing.assert_close(cache, wanted, rtol=2.0**-7, atol=0.0, equal_nan=True)
        else:
            assert_same_bits(cache, wanted)


@given(
    N=st.integers(0, 12),
    page_size=st.sampled_from([1, 3, 16]),
    HKV=st.integers(1, 5),
    D=st.sampled_from([1, 7, 16, 64, 80, 130, 256]),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from(DTYPES),
    int32=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, N, page_size, HKV, D, dtype, cache_dtype, int32, seed
) -> None:
    args = case(backend, N, 12, page_size, HKV, D, dtype=dtype, cache_dtype=cache_dtype, seed=seed)
    args[4] = args[4].int() if int32 else args[4]
    check(backend, *args)


def test_fp64() -> None:
    for name in sorted({"ref", "cpu"} & set(available_backends())):
        for dtype, cache_dtype in (
            (torch.float64, torch.float64),
            (torch.float64, torch.bfloat16),
            (torch.float16, torch.float64),
        ):
            backend = Backend(name, "cpu")
            check(backend, *case(backend, D=19, dtype=dtype, cache_dtype=cache_dtype))


def test_two_dtypes_at_once(backend: Backend) -> None:
    k, v, k_cache, v_cache, slots = case(backend, dtype=torch.float16, cache_dtype=torch.float32)
    check(backend, k, v.float(), k_cache, v_cache, slots)


def test_strides(backend: Backend) -> None:
    """Slices of a fused product, transposed heads, caches by head, and two caches in one."""
    N, HKV, D = 9, 2, 8
    k, v, k_cache, v_cache, slots = case(backend, N, HKV=HKV, D=D)
    fused = torch.cat([k.flatten(1), v.flatten(1)], 1)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    spread = [torch.stack([x, x], -1)[..., 0] for x in (k, v)]
    inputs = [
        (fused[:, : HKV * D].view(N, HKV, D), fused[:, HKV * D :].view(N, HKV, D)),
        tuple(by_head),
        tuple(spread),
        (k[:1].expand(N, HKV, D), v[:, :1].expand(N, HKV, D)),
    ]
    caches = [
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)),
        tuple(torch.stack([k_cache, v_cache], 1).unbind(1)),
        tuple(torch.nn.functional.pad(x, (0, 3))[..., :D] for x in (k_cache, v_cache)),
    ]
    for a, b in inputs:
        check(backend, a, b, k_cache.clone(), v_cache.clone(), slots)
    for a, b in caches:
        check(backend, k, v, a, b, slots.repeat_interleave(2)[::2])


def test_nan_is_copied_and_harms_no_neighbour(backend: Backend) -> None:
    k, v, k_cache, v_cache, slots = case(backend, skip=0.0)
    k[3], v[:, 1, 2] = NAN, -float("inf")
    k_cache[1, 2] = NAN
    check(backend, k, v, k_cache, v_cache, slots)


def test_nothing_to_write(backend: Backend) -> None:
    for sizes in ({"N": 0}, {"HKV": 0}, {"skip": 1.1}):
        check(backend, *case(backend, **sizes))
    k, v, k_cache, v_cache, _ = case(backend, N=4)
    slots = torch.full((4,), -1, device=backend.device)
    check(backend, k, v, k_cache[:0], v_cache[:0], slots)


# 4 GiB of addresses; on a CPU only the pages that hold a row are ever touched.
@pytest.mark.not_on("ref", "the reference goes over the whole cache")
def test_offsets_past_two_to_31(backend: Backend) -> None:
    HKV, D, page_size = 2, 8, 3
    far = 2**31
    size = far + page_size * HKV * D
    storage = torch.empty(size, dtype=torch.bfloat16, device=backend.device)
    near = case(backend, 4, 3, page_size, HKV, D, dtype=torch.bfloat16, skip=0.0)
    for pages in (2, 3):  # a page stride that is no int32, and one whose product with a page is not
        shape = (pages, page_size, HKV, D)
        stride = far // (pages - 1)
        wide = storage.as_strided(shape, (stride, HKV * D, D, 1))
        k, v, k_cache, v_cache, _ = near
        slots = torch.tensor([0, 4, (pages - 1) * page_size + 2, 2], device=backend.device)
        expected = written(k, v, k_cache[:pages], v_cache[:pages], slots)
        wide.copy_(k_cache[:pages])
        append_kv(k, v, wide, v_cache[:pages].clone(), slots, backend=backend.name)
        assert_same_bits(wide, expected[0])
        wide.copy_(v_cache[:pages])
        append_kv(k, v, k_cache[:pages].clone(), wide, slots, backend=backend.name)
        assert_same_bits(wide, expected[1])


def test_slots_past_the_cache(backend: Backend) -> None:
    """Refused before anything is written, and on a GPU skipped."""
    for bad in (15, 16, 2**40):
        k, v, k_cache, v_cache, slots = case(backend, skip=0.0)
        expected = [k_cache.clone(), v_cache.clone()]
        slots[4] = bad
        if backend.device == "cpu":
            with pytest.raises(ValueError, match=r"append_kv: slots must be below pages \* page_s"):
                append_kv(k, v, k_cache, v_cache, slots, backend=backend.name)
        else:
            append_kv(k, v, k_cache, v_cache, slots, backend=backend.name)
            slots[4] = -1
            expected = written(k, v, *expected, slots)
        assert_same_bits(k_cache, expected[0])
        assert_same_bits(v_cache, expected[1])


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_thread_count_changes_no_bit() -> None:
    args = case(Backend("cpu", "cpu"), 3000, 300, 16, 4, 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            check(Backend("cpu", "cpu"), *(x.clone() for x in args))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_the_way_without_checks() -> None:
    k, v, k_cache, v_cache, slots = case(Backend("cpu", "cpu"))
    expected = written(k, v, k_cache, v_cache, slots)
    _append_kv_native(k, v, k_cache, v_cache, slots)
    assert_same_bits(k_cache, expected[0])
    assert_same_bits(v_cache, expected[1])
    slots[0] = 15
    with pytest.raises(ValueError, match="slots must be below"):
        _append_kv_native(k, v, k_cache, v_cache, slots)


def test_opcheck_and_compile(backend: Backend) -> None:
    args = case(backend)
    if backend.name != "ref":
        torch.library.opcheck(torch.ops.fastrlhf.append_kv.default, (*args, backend.name))

    def step(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Tensor:
        append_kv(2.0 * k, v, k_cache, v_cache, slots, backend=backend.name)
        before = k_cache + v_cache
        append_kv(k, v + 1.0, k_cache, v_cache, slots - 1, backend=backend.name)
        return before

    eager, traced = ([x.clone() for x in args] for _ in range(2))
    expected = step(*eager)
    torch.compiler.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    for x, y in zip((found, *traced), (expected, *eager), strict=True):
        assert_same_bits(x, y)


@pytest.mark.not_on("ref", "autograd sees what the reference does")
def test_autograd_is_told_of_the_writing(backend: Backend) -> None:
    """What was saved for a backward and then written over is no longer there: torch must know."""
    k, v, k_cache, v_cache, slots = case(backend)
    version = k_cache._version
    append_kv(k, v, k_cache, v_cache, slots, backend=backend.name)
    torch.ops.fastrlhf.append_kv(k, v, k_cache, v_cache, slots, backend.name)
    assert k_cache._version >= version + 2
    x = torch.ones((), device=backend.device, requires_grad=True)
    y = (x * k_cache).sum()
    append_kv(k, v, k_cache, v_cache, slots, backend=backend.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        check(backend, *case(backend))


@pytest.mark.parametrize("name", ["k", "v", "k_cache", "v_cache"])
def test_gradients_are_refused(backend: Backend, name: str) -> None:
    names = ("k", "v", "k_cache", "v_cache", "slots")
    arguments = dict(zip(names, case(backend), strict=True))
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        append_kv(**arguments, backend=backend.name)
    with torch.no_grad():
        append_kv(**arguments, backend=backend.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(4, 2)}, r"k must have shape \(N, Hkv, D\), got \(4, 2\)"),
        ({"v": torch.zeros(4, 2, 7)}, r"v must have shape \(4, 2, 8\), got \(4, 2, 7\)"),
        ({"k_cache": torch.zeros(3, 2, 8)}, r"k_cache must have shape \(pages, page_size, Hkv"),
        ({"v_cache": torch.zeros(3, 5, 2, 9)}, r"v_cache must have shape \(3, 5, 2, 8\)"),
        ({"v_cache": torch.zeros(3, 5, 2, 8).half()}, "v_cache must be torch.float32 like k_cache"),
        (
            {"k": torch.zeros(4, 1, 8), "v": torch.zeros(4, 1, 8)},
            r"k_cache must have shape \(pages, page_size, 1, 8\) for k \(4, 1, 8\)",
        ),
        ({"v_cache": torch.zeros(3, 5, 8, 2).mT}, "v_cache must be dense in D, got strides"),
        ({"slots": torch.zeros(4)}, "slots must be int64 or int32, got torch.float32"),
        ({"slots": torch.zeros(3).long()}, r"slots must have shape \(4,\), got \(3,\)"),
        ({"slots": torch.full((4,), 15)}, "slots must be below pages"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "k": torch.zeros(4, 2, 8),
        "v": torch.zeros(4, 2, 8),
        "k_cache": torch.zeros(3, 5, 2, 8),
        "v_cache": torch.zeros(3, 5, 2, 8),
        "slots": torch.arange(4),
    } | change
    with pytest.raises(ValueError, match=message):
        append_kv(**arguments)
