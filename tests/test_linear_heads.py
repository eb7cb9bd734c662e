"""What linear_logprobs and linear_cross_entropy promise alike: layouts, dtypes, tiles, memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastrlhf_kernels import _linear, _linear_losses, linear_cross_entropy, linear_logprobs
from fastrlhf_kernels._linear import COLUMNS
from fastrlhf_kernels.linear_cross_entropy import linear_cross_entropy_ref
from fastrlhf_kernels.linear_logprobs import linear_logprobs_ref

OP = "linear_logprobs"  # both have the same backends
INF, NAN = float("inf"), float("nan")
HALVES = [torch.bfloat16, torch.float16]

Function = Callable[..., Any]
BOTH = pytest.mark.parametrize("op", ["linear_logprobs", "linear_cross_entropy"])
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "linear_logprobs": (
        partial(linear_logprobs, return_entropy=True),
        partial(linear_logprobs_ref, return_entropy=True),
    ),
    "linear_cross_entropy": (linear_cross_entropy, linear_cross_entropy_ref),
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of logits at a time; fp32 products, on every CPU, unless a test says otherwise."""
    monkeypatch.setattr(_linear, "CPU_BF16", False)
    monkeypatch.setattr(_linear, "ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_COLUMNS", _linear.COLUMNS)
    monkeypatch.setattr(_linear_losses, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(_linear_losses, "LEAST_ROWS", {"cpu": 4, "cuda": 4})


def plain(
    op: str, hidden, weight, labels, *, bias=None, softcap=None, temperature=1.0
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, by torch's own operations in the dtypes given: in fp64, the oracle."""
    valid = labels != -100
    z = hidden.where(valid[..., None], 0.0) @ weight.T
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    log_p = (z / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, labels.where(valid, 0).long()[..., None])[..., 0].where(valid, 0.0)
    if op == "linear_cross_entropy":
        return -logprobs.sum() / valid.sum().clamp(min=1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)
    return logprobs, entropy.where(valid, 0.0)


def run(
    function: Function, hidden, weight, labels, *, bias=None, upstream: float = -2.0, **settings
) -> list[Tensor]:
    """The results, and the gradients of hidden, weight and bias."""
    # Leaves keep the strides of their arguments.
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    bias = leaves[2] if len(leaves) == 3 else None
    found = function(leaves[0], leaves[1], labels, bias=bias, **settings)
    results = [found] if isinstance(found, Tensor) else list(found)
    # Powers of two: the gradient that linear_cross_entropy holds in bf16 is then scaled exactly.
    upstreams = [
        upstream * 2.0 ** (torch.arange(r.numel(), device=r.device) % 3).to(r).reshape(r.shape)
        for r in results
    ]
    gradients = torch.autograd.grad(results, leaves, upstreams)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    return [*(r.detach() for r in results), *gradients]


def check(
    backend: Backend, op: str, *args: Tensor, bias=None, reference=None, **settings
) -> list[Tensor]:
    """Values and gradients against the oracle, by the rule of oracle.py."""
    function, ref = FUNCTIONS[op]
    function = partial(function, backend=backend.name)
    actual = run(function, *args, bias=bias, **settings)
    own = run(reference or ref, *args, bias=bias, **settings)
    hidden, weight, labels = args
    exact = partial(run, partial(plain, op), hidden.double(), weight.double(), labels)
    expected = exact(bias=None if bias is None else bias.double(), **settings)
    for a, r, o in zip(actual, own, expected, strict=True):
        # A product's terms may cancel: what is allowed is fp32 units of the largest result.
        ratio = torch.finfo(torch.float32).eps / torch.finfo(a.dtype).eps
        terms = float(o.abs().max()) * ratio
        assert_accurate(a, r, o, interpreted=backend.interpreted, terms=terms)
    return actual


def case(
    N: int, V: int, H: int, backend: Backend, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = 2.0 * torch.randn(V, H, generator=generator) / H**0.5
    labels = torch.randint(0, V, (N,), generator=generator)
    bias = torch.randn(V, generator=generator)
    hidden, weight, bias = (x.to(dtype).to(backend.device) for x in (hidden, weight, bias))
    return hidden, weight, labels.to(backend.device), bias


@BOTH
@pytest.mark.parametrize("V", [2053, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 17])
def test_vocabularies_about_the_tiles_widths(backend: Backend, op: str, V: int) -> None:
    hidden, weight, labels, bias = case(9, V, 5, backend)
    labels[0], labels[1], labels[8] = V - 1, -100, 0
    check(backend, op, hidden, weight, labels, bias=bias, softcap=5.0)


@BOTH
@pytest.mark.parametrize("V", [7, 29, COLUMNS + 3])
def test_columns_cut_for_the_products(
    backend: Backend, op: str, V: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; and the rows' work is not cut with them: it has the bits of whole pieces."""

    def cuts(columns: int, x: Tensor) -> list[slice]:
        return [slice(0, columns // 8 * 8), slice(columns // 8 * 8, columns)]

    hidden, weight, labels, bias = case(9, V, 5, backend)
    # Sums of few small integers: exact, and the same however the products are cut.
    hidden, weight = (x.mul(2).round().clamp(-3, 3) for x in (hidden, weight))
    labels[1] = -100
    whole = check(backend, op, hidden, weight, labels, bias=bias)
    monkeypatch.setattr(_linear, "column_cuts", cuts)
    monkeypatch.setattr(_linear_losses, "column_cuts", cuts)
    found = check(backend, op, hidden, weight, labels, bias=bias)
    for a, b in zip(found[:-3], whole[:-3], strict=True):  # but for the gradients
        assert_same_bits(a, b)


@BOTH
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_over_pieces_of_halves(backend: Backend, op: str, dtype: torch.dtype) -> None:
    """They stay in fp32: what later pieces add would be lost in a half's first large sum."""
    hidden, weight, labels, bias = case(61, 31, 9, backend)
    hidden = 0.05 * hidden.abs()
    hidden[:4] *= 512.0 if dtype == torch.bfloat16 else 4096.0
    weight[0] = -weight.abs().amax(0)  # an unlikely label: each row pulls at it with all its weight
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    check(backend, op, hidden, weight, torch.zeros_like(labels), bias=bias)


@BOTH
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes(backend: Backend, op: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Each gradient has its argument's dtype; labels may be int32."""
    hidden, weight, labels, bias = case(7, 163, 33, backend)
    labels[2] = -100
    h, w, b = (x.to(dtype) for x, dtype in zip((hidden, weight, bias), dtypes, strict=True))
    check(backend, op, h, w, labels.int(), bias=b)


@BOTH
@pytest.mark.not_on("ref", "the reference multiplies in fp32")
def test_products_in_bf16(backend: Backend, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX; against plain PyTorch in bf16, whose products are rounded too."""
    monkeypatch.setattr(_linear, "CPU_BF16", True)
    hidden, weight, labels, _ = case(24, 331, 64, backend, torch.bfloat16)
    labels[3] = -100
    check(backend, op, hidden, weight, labels, reference=partial(plain, op))


@BOTH
@pytest.mark.parametrize("H", [64, 40])
@pytest.mark.not_on("ref", "the reference multiplies in fp32")
def test_memory_need_not_be_clean(
    backend: Backend, op: str, H: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are bf16 too, whose left operand AMX reads past the end of its rows."""
    monkeypatch.setattr(_linear, "CPU_BF16", True)
    monkeypatch.setattr(_linear, "ROWS", 64)  # oneDNN has other code for few rows
    monkeypatch.setattr(_linear_losses, "LEAST_ROWS", {"cpu": 64, "cuda": 64})
    hidden, weight, labels, _ = case(66, 163, H, backend, torch.bfloat16)
    hidden[5, 1], labels[9] = NAN, -100

    def gradients() -> list[Tensor]:
        return run(FUNCTIONS[op][0], hidden, weight, labels, backend=backend.name)

    clean = gradients()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        filled = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, filled, strict=True):
        assert_same_bits(a, b)
    if op == "linear_logprobs":
        bad = [not x.isfinite().all() for x in filled[2]]
        assert [i for i, found in enumerate(bad) if found] == [5]


@BOTH
def test_strides(backend: Backend, op: str) -> None:
    """Slices, transposes and expanded views; ruled by the oracle, since products change bits."""
    hidden, weight, labels, bias = case(6, 22, 10, backend)
    views = [
        (hidden[:, ::2], weight[:, :5], labels),
        (hidden.T.contiguous().T, weight.T.contiguous().T, labels),
        (hidden[:1].expand(6, 10), weight, labels),
        (hidden, weight[:, :1].expand(22, 10), labels),
        (hidden.reshape(2, 3, 10).transpose(0, 1), weight, labels.reshape(2, 3).T),
        (hidden, weight, labels[:1].expand(6)),
    ]
    for x, w, y in views:
        assert not (x.is_contiguous() and w.is_contiguous() and y.is_contiguous())
        check(backend, op, x, w, y, bias=torch.stack([bias, bias], -1)[:, 0])
        check(backend, op, x, w, y, bias=bias[:1].expand(22))


@BOTH
def test_tokens_of_probability_zero(backend: Backend, op: str) -> None:
    """A bias of -inf, over a whole first tile too."""
    hidden, weight, labels, bias = case(3, COLUMNS + 9, 5, backend)
    bias[: COLUMNS + 2] = -INF
    labels[:] = COLUMNS + 3
    *_, dw, db = found = check(backend, op, hidden, weight, labels, bias=bias)
    assert all(bool(x.isfinite().all()) for x in found)
    assert not dw[: COLUMNS + 2].any()
    assert not db[: COLUMNS + 2].any()


@BOTH
def test_one_token(backend: Backend, op: str) -> None:
    """V = 1: certainty, and nothing to learn."""
    hidden, weight, labels, bias = case(4, 1, 3, backend)
    for x in check(backend, op, hidden, weight, labels, bias=bias):
        assert not x.any()


@BOTH
def test_a_nan_harms_no_other_row(backend: Backend, op: str) -> None:
    hidden, weight, labels, bias = case(5, 37, 5, backend)
    function = partial(FUNCTIONS[op][0], backend=backend.name)
    clean = run(function, hidden, weight, labels, bias=bias)
    hidden[2, 1] = NAN
    found = run(function, hidden, weight, labels, bias=bias)
    assert found[0].flatten()[2 if op == "linear_logprobs" else 0].isnan()
    dh, clean_dh = found[-3], clean[-3]
    assert dh[2].isnan().all()
    others = [0, 1, 3, 4]
    assert_same_bits(dh[others], clean_dh[others])


@BOTH
def test_a_gradient_alone(backend: Backend, op: str) -> None:
    """The same bits whichever others are asked for, in the gradients and in the results."""
    *args, labels, bias = case(5, COLUMNS + 3, 5, backend)
    args.append(bias)

    def some(wanted: tuple[int, ...]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(args)]
        found = FUNCTIONS[op][0](*leaves[:2], labels, bias=leaves[2], backend=backend.name)
        result = found if isinstance(found, Tensor) else found[0]
        assert result.requires_grad == bool(wanted)
        if not wanted:
            return [result]
        return [result.detach(), *torch.autograd.grad(result.sum(), [leaves[i] for i in wanted])]

    together = some((0, 1, 2))
    for i in range(3):
        result, gradient = some((i,))
        assert_same_bits(result, together[0])
        assert_same_bits(gradient, together[1 + i])
    assert_same_bits(some(())[0], together[0])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_upstream_only_scales(backend: Backend, dtype: torch.dtype) -> None:
    """Exactly, but for one rounding; an expanded upstream gradient is one too."""
    hidden, weight, labels, bias = case(6, 37, 5, backend, dtype)
    op = partial(linear_cross_entropy, backend=backend.name)
    once = run(op, hidden, weight, labels, bias=bias, upstream=1.0)
    for factor in (0.0, -0.25, 8.0) if backend.name == "ref" else (0.0, -0.25, 8.0, 0.3):
        found = run(op, hidden, weight, labels, bias=bias, upstream=factor)
        for x, y in zip(found[1:], once[1:], strict=True):
            assert_same_bits(x, y * torch.tensor(factor, device=y.device))
    leaf = hidden.detach().requires_grad_()
    op(leaf, weight, labels, bias=bias).expand(8).sum().backward()
    assert_same_bits(leaf.grad, once[1] * 8.0)


def test_normalizer_is_a_number_or_a_tensor(backend: Backend) -> None:
    hidden, weight, labels, bias = case(6, 37, 5, backend)
    labels[0] = -100
    op = partial(linear_cross_entropy, backend=backend.name)
    default = run(op, hidden, weight, labels, bias=bias)
    for dtype in (torch.int64, torch.float32, torch.float64):
        five = torch.tensor(5, dtype=dtype, device=backend.device)
        for normalizer in (five, five.item()):
            found = run(op, hidden, weight, labels, bias=bias, normalizer=normalizer)
            for x, y in zip(found, default, strict=True):
                assert_same_bits(x, y)
    leaf = torch.tensor(5.0, device=backend.device, requires_grad=True)
    op(hidden.requires_grad_(), weight, labels, normalizer=leaf).backward()
    assert leaf.grad is None


@BOTH
def test_never_holds_the_logits(backend: Backend, op: str) -> None:
    """The largest piece of memory asked for, in both passes, is one of logits, or a gradient.

    The reference, which asks for all logits, shows that the measure sees them.
    """
    if backend.device != "cpu":
        pytest.skip("the CPU's allocations are counted")
    N, V, H = 24, 4 * COLUMNS + 9, 2
    hidden, weight, labels, bias = case(N, V, H, backend)
    function = partial(FUNCTIONS[op][0], backend=backend.name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(function, hidden, weight, labels, bias=bias)
    largest = max(e.self_cpu_memory_usage for e in profiled.events())
    if backend.name == "ref":
        assert largest >= 4 * N * V
    else:
        piece = 4 * _linear.padded(COLUMNS if op == "linear_logprobs" else V, 4)
        assert largest == 4 * max(piece, V * H)


BAD_HEADS = [
    ({"hidden": [0.0]}, "hidden must be a tensor, got list"),
    ({"hidden": torch.zeros(2, 3).int()}, "hidden must be fp32, bf16, fp16 or fp64"),
    ({"hidden": torch.zeros(2, 0)}, r"hidden must have shape \(\.\.\., H\), got \(2, 0\)"),
    ({"weight": torch.zeros(7, 3).long()}, "weight must be fp32, bf16, fp16 or fp64"),
    ({"weight": torch.zeros(7)}, r"weight must have shape \(V, H\), got \(7,\)"),
    ({"weight": torch.zeros(7, 3, device="meta")}, "weight must be on cpu, got meta"),
    ({"labels": torch.zeros(2)}, "labels must be int64 or int32"),
    ({"labels": torch.zeros(2, device="meta").int()}, "labels must be on cpu, got meta"),
    ({"bias": torch.zeros(7).int()}, "bias must be fp32, bf16, fp16 or fp64"),
    ({"bias": torch.zeros(6)}, r"bias must have shape \(7,\), got \(6,\)"),
    ({"bias": torch.zeros(7, device="meta")}, "bias must be on cpu, got meta"),
    ({"logit_scale": NAN}, "logit_scale must be in"),
    ({"softcap": 0.0}, "softcap must be in"),
]


@BOTH
@pytest.mark.parametrize(("change", "message"), BAD_HEADS)
def test_bad_arguments_are_named(op: str, change: dict, message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(7, 3)}
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        FUNCTIONS[op][0](**({**arguments, "labels": torch.zeros(2).long()} | change))
