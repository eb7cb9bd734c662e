"""The element-wise parts of a decode step against fp64, on every instruction set and in Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_accurate, assert_same_bits, instruction_set
from torch import Tensor

from fastrlhf_kernels import _native, _triton
from fastrlhf_kernels._decode_step import (
    NATIVE_DTYPES,
    Between,
    Layer,
    Panels,
    gate_native,
    gate_ref,
    norm_native,
    norm_ref,
    rope_append_native,
    rope_append_ref,
)
from fastrlhf_kernels._decode_step_triton import gate_triton, norm_triton, rope_append_triton

EPS = 1e-6
NAN = float("nan")
SIZES = st.sampled_from([1, 2, 7, 16, 33, 64, 100, 257])
NATIVE = pytest.mark.skipif(_native.cpu is None, reason="the C++ extension is not built")
ISAS = [] if _native.cpu is None else [f"cpu-{isa}" for isa in _native.cpu.isas()]


class Parts(NamedTuple):
    """One way of computing them, and where."""

    norm: Callable[..., Tensor]
    rope_append: Callable[..., Tensor]
    gate: Callable[..., Tensor]
    device: str
    interpreted: bool = False


@pytest.fixture(params=[*ISAS, *(["triton"] if _triton.missing is None else [])])
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    if request.param == "triton":
        on_gpu = torch.cuda.is_available()
        device = "cuda" if on_gpu else "cpu"
        yield Parts(norm_triton, rope_append_triton, gate_triton, device, not on_gpu)
        return
    with instruction_set(request.param.removeprefix("cpu-")):
        yield Parts(norm_native, rope_append_native, gate_native, "cpu")


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


@given(N=st.integers(0, 5), H=SIZES, dtype=st.sampled_from(NATIVE_DTYPES), seed=st.integers(0, 99))
def test_norm(parts: Parts, N: int, H: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = 3.0 * randn(N, H, seed=seed), 1.0 + randn(H, seed=seed + 1, dtype=dtype)
    x, weight = x.to(parts.device), weight.to(parts.device)
    found = parts.norm(x, weight, EPS)
    wanted = rms(x.double()) * weight.double()
    assert_accurate(found, norm_ref(x, weight, EPS), wanted, interpreted=parts.interpreted)
    for n in range(N):
        assert_same_bits(parts.norm(x[n : n + 1], weight, EPS)[0], found[n])


@pytest.mark.skipif(_triton.missing is not None, reason=f"no Triton here: {_triton.missing}")
@given(N=st.integers(0, 5), H=SIZES, dtype=st.sampled_from(NATIVE_DTYPES), seed=st.integers(0, 99))
def test_a_sum_and_its_norm(N: int, H: int, dtype: torch.dtype, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = 3.0 * randn(N, H, seed=seed).to(device), randn(N, H, seed=9, dtype=dtype).to(device)
    weight = 1.0 + randn(H, seed=seed + 1, dtype=dtype).to(device)
    total = x + y
    wanted = norm_triton(total.clone(), weight, EPS)
    found = norm_triton(x, weight, EPS, y)
    assert_same_bits(x, total)
    assert_same_bits(found, wanted)


@given(N=st.integers(0, 5), width=SIZES, dtype=st.sampled_from(NATIVE_DTYPES),
       seed=st.integers(0, 99))  # fmt: skip
def test_gate(parts: Parts, N: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = 4.0 * randn(N, 2 * width, seed=seed, dtype=dtype).to(parts.device)
    gate, up = gate_up.double().chunk(2, -1)
    found = parts.gate(gate_up)
    wanted = gate * gate.sigmoid() * up
    assert_accurate(found, gate_ref(gate_up), wanted, interpreted=parts.interpreted)
    for n in range(N):
        assert_same_bits(parts.gate(gate_up[n : n + 1])[0], found[n])


def test_gates_far_out(parts: Parts) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 200.0, 1e30, NAN]], device=parts.device)
    found = parts.gate(torch.cat([gate, torch.ones_like(gate)], 1))
    wanted = gate_ref(torch.cat([gate, torch.ones_like(gate)], 1))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-37, equal_nan=True)


def rope_case(
    B: int,
    n_q: int,
    n_kv: int,
    D: int,
    dtype: torch.dtype,
    *,
    normed: bool,
    seed: int,
    device: str = "cpu",
) -> list:
    """Arguments of rope_append; a third of the slots is below 0."""
    pages, page_size, longest = 4, 3, 50
    generator = torch.Generator().manual_seed(seed)
    qkv = randn(B, n_q + 2 * n_kv, D, seed=seed, dtype=dtype)
    positions = torch.randint(0, longest, (B,), generator=generator)
    slots = torch.randperm(pages * page_size, generator=generator)[:B]
    slots = torch.where(torch.rand(B, generator=generator) < 0.3, -1, slots)
    cos, sin = randn(2, longest, D, seed=seed + 1)
    norms = tuple(1.0 + randn(2, D, seed=seed + 2, dtype=dtype)) if normed else None
    # The heads' rows lie apart, and each in a page of its own size.
    caches = randn(2, pages, page_size + 1, n_kv, D + 5, seed=seed + 3, dtype=dtype).to(device)
    k_cache, v_cache = caches[:, :, :page_size, :, :D]
    qkv, positions, slots, cos, sin = (x.to(device) for x in (qkv, positions, slots, cos, sin))
    norms = None if norms is None else tuple(x.to(device) for x in norms)
    return [qkv, positions, slots, cos, sin, norms, k_cache, v_cache, EPS]


def turned(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition in fp64, of heads (B, heads, D)."""
    x = x.double()
    if weight is not None:
        x = rms(x) * weight.double()
    first, second = x.chunk(2, -1)
    return x * cos[:, None].double() + torch.cat([second, first], -1) * sin[:, None].double()


@given(
    B=st.integers(0, 9),
    n_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    D=st.sampled_from([2, 6, 16, 32, 80, 128, 256]),
    dtype=st.sampled_from(NATIVE_DTYPES),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rope_append(
    parts: Parts,
    B: int,
    n_kv: int,
    group: int,
    D: int,
    dtype: torch.dtype,
    normed: bool,
    seed: int,
) -> None:
    n_q = n_kv * group
    args = rope_case(B, n_q, n_kv, D, dtype, normed=normed, seed=seed, device=parts.device)
    qkv, positions, slots, cos, sin, norms, k_cache, v_cache, _ = args
    q, k, v = qkv.clone().split([n_q, n_kv, n_kv], 1)
    at = cos[positions], sin[positions]
    weights = norms or (None, None)
    wanted_q, wanted_k = turned(q, weights[0], *at), turned(k, weights[1], *at)

    theirs = [x.clone() if isinstance(x, Tensor) else x for x in args]
    reference = rope_append_ref(*theirs)
    before = [k_cache.clone(), v_cache.clone()]
    found = parts.rope_append(*args)
    size = cos.abs().max() + sin.abs().max()
    terms = float(size * (6.0 if normed else 1.0) * qkv.abs().max()) if B else 0.0
    allowed = {"terms": terms, "interpreted": parts.interpreted}
    assert_accurate(found, reference, wanted_q, **allowed)
    page, offset = slots // 3, slots % 3
    for n in range(B):
        if slots[n] >= 0:
            place = page[n], offset[n]
            assert_accurate(k_cache[place], theirs[6][place], wanted_k[n], **allowed)
            assert_same_bits(v_cache[place], v[n])
            before[0][place], before[1][place] = k_cache[place], v_cache[place]
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        assert_same_bits(cache, old)  # but for the slots named


@NATIVE
@pytest.mark.parametrize("isa", ISAS)
def test_rows_and_threads_change_no_bit(isa: str) -> None:
    with instruction_set(isa.removeprefix("cpu-")):
        check_rows_and_threads()


def check_rows_and_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            args = rope_case(9, 64, 8, 256, torch.float32, normed=True, seed=3)
            results.append([rope_append_native(*args), *args[6:8], norm_native(*wide()[:2], EPS),
                            gate_native(wide()[0])])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)
    args = rope_case(9, 64, 8, 256, torch.float32, normed=True, seed=3)
    alone = [x[4:5] for x in args[:3]]
    assert_same_bits(rope_append_native(*alone, *args[3:])[0], results[0][0][4])


def wide() -> tuple[Tensor, Tensor]:
    return randn(40, 8192), randn(8192, seed=1)


@NATIVE
def test_slots_and_positions_out_of_range_are_refused_before_anything_is_written() -> None:
    for which, value, message in (
        (2, 12, "slots must be below"),
        (1, 50, "positions must be"),
        (1, -1, "positions must be"),
    ):
        args = rope_case(5, 2, 2, 16, torch.float32, normed=False, seed=0)
        args[which][3] = value
        kept = [x.clone() for x in args if isinstance(x, Tensor)]
        with pytest.raises(ValueError, match=message):
            rope_append_native(*args)
        for x, y in zip((x for x in args if isinstance(x, Tensor)), kept, strict=True):
            assert_same_bits(x, y)
    with pytest.raises(ValueError, match="D must be even"):
        rope_append_native(*rope_case(1, 1, 1, 7, torch.float32, normed=False, seed=0))


# ---- products of few rows, and the step by layers


@NATIVE
@pytest.mark.parametrize("isa", ISAS)
@given(
    B=st.integers(0, 60),
    N=st.sampled_from([1, 15, 63, 64, 65, 200]),
    K=st.sampled_from([1, 7, 31, 32, 33, 100, 1000]),
    extra=st.sampled_from(["", "bias", "residual", "both"]),
    seed=st.integers(0, 99),
)
def test_products_of_few_rows(isa: str, B: int, N: int, K: int, extra: str, seed: int) -> None:
    x, weight = randn(B, K, seed=seed), randn(N, K, seed=seed + 1)
    bias = randn(N, seed=seed + 2) if extra in ("bias", "both") else None
    residual = randn(B, N, seed=seed + 3) if extra in ("residual", "both") else None
    with instruction_set(isa.removeprefix("cpu-")):
        panels = Panels(weight, bias)
        found = panels(x, None if residual is None else residual.clone())
        if B:
            last = None if residual is None else residual[-1:].clone()
            assert_same_bits(panels(x[-1:].contiguous(), last)[0], found[-1])
    added = (0.0 if bias is None else bias) + (torch.zeros(B, N) if residual is None else residual)
    wanted = x.double() @ weight.double().T + added
    terms = x.abs().double() @ weight.abs().double().T
    # One sum after another: of K terms each may be rounded K times.
    assert_accurate(found, x @ weight.T + added, wanted, terms=terms * max(1.0, K**0.5 / 4))


def layers_case(*, normed: bool, bias: bool, seed: int) -> dict[str, Any]:
    """Two layers of width 24, 4 heads on 2 of size 8, 40 hidden units, and 70 words."""
    H, D, n_q, n_kv, I, V = 24, 8, 4, 2, 40, 70
    draw = iter(range(seed, seed + 100))

    def weight(*size: int) -> Tensor:
        return randn(*size, seed=next(draw)) * size[-1] ** -0.5

    def panels(rows: int, columns: int, *, biased: bool = False) -> Panels:
        return Panels(weight(rows, columns), weight(rows) if biased else None)

    layers = [
        Layer(
            1.0 + weight(H), panels((n_q + 2 * n_kv) * D, H, biased=bias),
            (1.0 + weight(D), 1.0 + weight(D)) if normed else None,
            panels(H, n_q * D), 1.0 + weight(H), panels(2 * I, H), panels(H, I, biased=bias),
        )
        for _ in range(2)
    ]  # fmt: skip
    return {"layers": layers, "norm": 1.0 + weight(H), "head": panels(V, H), "n_kv": n_kv, "D": D}


@NATIVE
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_by_layers_is_its_parts(isa: str, normed: bool, bias: bool) -> None:
    case = layers_case(normed=normed, bias=bias, seed=7)
    layers, norm, head, D = (case[k] for k in ("layers", "norm", "head", "D"))
    rope = tuple(randn(2, 50, D, seed=1))
    positions, slots = torch.tensor([3, 49, 0]), torch.tensor([2, -1, 11])
    caches = [randn(2, 4, 3, 2, D, seed=9), randn(2, 4, 3, 2, D, seed=9)]  # layers, pages, ...
    x = [randn(3, 24, seed=4), randn(3, 24, seed=4)]
    with instruction_set(isa.removeprefix("cpu-")):
        between = Between(layers, norm, head, rope, case["n_kv"], EPS)
        keys, values = list(caches[0]), list(caches[0] + 1.0)
        between.into(keys, values)
        keys_too, values_too = list(caches[1]), list(caches[1] + 1.0)
        seen = None
        for i, layer in enumerate(layers):
            found = between(i, x[0], seen, positions, slots)
            qkv = layer.qkv(norm_native(x[1], layer.first_norm, EPS)).view(3, -1, D)
            q = rope_append_native(qkv, positions, slots, *rope, layer.head_norms,
                                   keys_too[i], values_too[i], EPS)  # fmt: skip
            assert_same_bits(found.view(3, -1, D)[:, :4], q)
            assert_same_bits(keys[i], keys_too[i])
            assert_same_bits(values[i], values_too[i])
            seen = randn(3, 4, D, seed=20 + i)
            layer.out(seen.view(3, -1), x[1])
            h = layer.gate_up(norm_native(x[1], layer.second_norm, EPS))
            layer.down(gate_native(h), x[1])
        found = between(2, x[0], seen, positions, slots)
        assert_same_bits(x[0], x[1])
        assert_same_bits(found, head(norm_native(x[1], norm, EPS)))
        with pytest.raises(ValueError, match="positions must be in the tables"):
            between(0, x[0], None, positions + 1, slots)
