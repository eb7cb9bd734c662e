"""ranking_loss against a loop over pairs in fp64."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import (
    assert_compiled_is_eager,
    assert_repeats,
    assert_second_derivative_raises,
    far_apart,
    with_gradients,
)
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import _env, _native, available_backends, ranking_loss
from fastrlhf_kernels.ranking_loss import ranking_loss_ref

OP = "ranking_loss"
NAN = float("nan")


def oracle(
    scores: Tensor, ranks: Tensor, group_sizes: Tensor, normalizer=None
) -> tuple[dict[str, float], Tensor]:
    """(loss and stats, gradient), pair by pair."""
    s, r, sizes = scores.double().tolist(), ranks.tolist(), group_sizes.tolist()
    divisor = len(sizes) if normalizer is None else float(normalizer)
    losses, pairs, right = [], 0, 0
    gradient = [[0.0] for _ in s]
    start = 0
    for K in sizes:
        for i, j in itertools.permutations(range(start, start + K), 2):
            if r[i] >= r[j]:
                continue  # i is the winner, once a pair
            weight = 1.0 / (math.comb(K, 2) * divisor)
            margin = s[i] - s[j]
            tail = math.exp(-abs(margin))
            losses.append(weight * (max(-margin, 0.0) + math.log1p(tail)))
            pull = weight * (tail if margin > 0 else 1.0) / (1.0 + tail)
            gradient[i].append(-pull)
            gradient[j].append(pull)
            pairs += 1
            right += margin > 0
        start += K
    expected = {
        "loss": math.fsum(losses),
        "pair_accuracy": right / max(pairs, 1),
        "pairs": float(pairs),
    }
    return expected, torch.tensor([math.fsum(g) for g in gradient], dtype=torch.float64)


def case(backend: Backend, sizes: list[int], seed: int = 0, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = scale * torch.randn(n, generator=generator)
    ranks = torch.randint(-2, 4, (n,), generator=generator)  # with ties
    return tuple(x.to(backend.device) for x in (scores, ranks, torch.tensor(sizes).long()))


def check(backend: Backend, scores, ranks, group_sizes, normalizer=None) -> None:
    found = []
    for f in (partial(ranking_loss, backend=backend.name), ranking_loss_ref):
        leaf = scores.clone().requires_grad_()
        loss, stats = f(leaf, ranks, group_sizes, normalizer=normalizer)
        (gradient,) = torch.autograd.grad(3.0 * loss, leaf)
        assert not any(s.requires_grad for s in stats.values())
        found.append(({"loss": loss} | stats, gradient))
    (actual, actual_gradient), (reference, reference_gradient) = found
    expected, gradient = oracle(scores, ranks, group_sizes, normalizer)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_accurate(actual[name], reference[name], torch.tensor(value, dtype=torch.float64))
    # An output's pulls may cancel: each pair's is at most 3 / (C(K, 2) normalizer).
    assert_accurate(
        actual_gradient,
        reference_gradient,
        3.0 * gradient,
        interpreted=backend.interpreted,
        terms=float((3.0 * gradient).abs().max()) if len(gradient) else 0.0,
    )


@given(
    sizes=st.lists(st.integers(0, 9), max_size=6),
    normalizer=st.sampled_from([None, 7, 0.5, torch.tensor(11), torch.tensor(2.5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    integer=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 99),
)
def test_matches_definition(backend: Backend, sizes, normalizer, dtype, integer, seed) -> None:
    scores, ranks, group_sizes = case(backend, sizes, seed)
    check(backend, scores.to(dtype), ranks.to(integer), group_sizes.to(integer), normalizer)


def test_groups_of_all_sizes(backend: Backend) -> None:
    """Groups wider than the squares in which the Triton kernel walks."""
    check(backend, *case(backend, [1, 15, 16, 17, 40]))


def test_many_groups(backend: Backend) -> None:
    """More groups than the Triton kernels add at once."""
    sizes = [2] * 257 if backend.interpreted else [4, 9, 1, 5] * 200
    check(backend, *case(backend, sizes))


def test_a_pair_is_instructgpts_loss(backend: Backend) -> None:
    """K = 2: -log sigmoid(r_chosen - r_rejected)."""
    scores = torch.tensor([0.3, -0.5, 2.0, 1.0], device=backend.device)
    ranks = torch.tensor([1, 2, 9, -9], device=backend.device)
    sizes = torch.tensor([2, 2], device=backend.device)
    loss, stats = ranking_loss(scores, ranks, sizes, backend=backend.name)
    expected = (math.log1p(math.exp(-0.8)) + math.log1p(math.exp(1.0))) / 2
    assert abs(float(loss) - expected) < 1e-6
    assert {k: float(v) for k, v in stats.items()} == {"pair_accuracy": 0.5, "pairs": 2.0}


def test_ties_count_as_pairs_but_decide_nothing(backend: Backend) -> None:
    scores = torch.tensor([1.0, 0.0, 5.0], device=backend.device)
    ranks = torch.tensor([1, 2, 2], device=backend.device)
    sizes = torch.tensor([3], device=backend.device)
    loss, stats = ranking_loss(scores, ranks, sizes, backend=backend.name)
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(4.0))) / 3  # C(3, 2), not 2
    assert abs(float(loss) - expected) < 1e-6
    assert float(stats["pairs"]) == 2.0


@pytest.mark.parametrize("gap", [30.0, 90.0, 100.0, 1e4])
def test_large_gaps(backend: Backend, gap: float) -> None:
    """The loss of a wide wrong gap is the gap; that of a right one keeps its relative precision."""
    sizes = torch.tensor([2], device=backend.device)
    ranks = torch.tensor([0, 1], device=backend.device)
    wide = [torch.float64] if backend.name in ("ref", "cpu") else []
    for dtype in (torch.float32, *wide):
        close = 2e-6 if dtype == torch.float32 else 1e-14
        for scores in ([gap, 0.0], [0.0, gap]):
            leaf = torch.tensor(scores, dtype=dtype, device=backend.device, requires_grad=True)
            loss, _ = ranking_loss(leaf, ranks, sizes, backend=backend.name)
            loss.backward()
            expected, gradient = oracle(leaf.detach(), ranks, sizes)
            tiny = torch.finfo(dtype).tiny  # denormal numbers may be flushed
            exact = torch.tensor(expected["loss"], dtype=torch.float64)
            torch.testing.assert_close(loss.detach().double().cpu(), exact, rtol=close, atol=tiny)
            torch.testing.assert_close(leaf.grad.double().cpu(), gradient, rtol=close, atol=tiny)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    shift=st.sampled_from([-4.0, 8.0]),
)
def test_only_order_and_differences_count(backend: Backend, sizes, seed, shift) -> None:
    scores, ranks, group_sizes = case(backend, sizes, seed)
    scores = torch.round(8.0 * scores) / 8.0  # so that a shift is exact
    op = partial(ranking_loss, backend=backend.name)
    base = with_gradients(lambda s: op(s, ranks, group_sizes), scores)
    stretched = with_gradients(lambda s: op(s, ranks**3 * 10**9 - 5, group_sizes), scores)
    shifted = with_gradients(lambda s: op(s + shift, ranks, group_sizes), scores)
    for x, y, z in zip(base, stretched, shifted, strict=True):
        assert_same_bits(x, y)
        assert_same_bits(x, z)
    assert abs(float(base[-1].double().sum())) < 1e-6  # a pull on one is a push on another


@pytest.mark.parametrize("normalizer", [None, 3, torch.tensor(0), torch.tensor(NAN)])
@pytest.mark.parametrize("sizes", [[], [0, 0], [1, 1, 1], [3]])
def test_nothing_decided(backend: Backend, sizes, normalizer) -> None:
    """Groups of none or one, or all equal: their scores reach nothing."""
    scores, _, group_sizes = case(backend, sizes)
    leaf = (NAN * scores).requires_grad_()
    ties = torch.zeros_like(leaf, dtype=torch.int64)
    loss, stats = ranking_loss(leaf, ties, group_sizes, normalizer=normalizer, backend=backend.name)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(float(s) for s in stats.values())
    assert torch.equal(leaf.grad, torch.zeros_like(scores))


def test_a_nan_stays_in_its_group(backend: Backend) -> None:
    scores, _, sizes = case(backend, [3, 4, 2])
    ranks = torch.arange(9, device=scores.device)
    clean = with_gradients(lambda s: ranking_loss(s, ranks, sizes, backend=backend.name), scores)
    scores[4] = NAN
    loss, _, _, gradient = with_gradients(
        lambda s: ranking_loss(s, ranks, sizes, backend=backend.name), scores
    )
    assert loss.isnan()
    assert gradient[3:7].isnan().all()
    others = [0, 1, 2, 7, 8]
    assert_same_bits(gradient[others], clean[-1][others])


def test_groups_do_not_depend_on_the_batch(backend: Backend) -> None:
    sizes = [3, 20, 1, 6]
    scores, ranks, group_sizes = case(backend, sizes)
    op = partial(ranking_loss, normalizer=1.0, backend=backend.name)
    *_, together = with_gradients(lambda s: op(s, ranks, group_sizes), scores)
    start = 0
    for g, K in enumerate(sizes):
        part = slice(start, start + K)
        *_, alone = with_gradients(
            lambda s, part=part, g=g: op(s, ranks[part], group_sizes[g : g + 1]), scores[part]
        )
        if backend.name == "ref":  # promises no bits
            torch.testing.assert_close(alone, together[part])
        else:
            assert_same_bits(alone, together[part])
        start += K


def test_layouts(backend: Backend) -> None:
    scores, ranks, sizes = case(backend, [4, 1, 7])
    op = partial(ranking_loss, backend=backend.name)
    expected = with_gradients(lambda s: op(s, ranks, sizes), scores)
    spread = [torch.stack([x, x], -1)[:, 0] for x in (scores, ranks, sizes)]
    for x, y in zip(with_gradients(lambda s: op(s, *spread[1:]), spread[0]), expected, strict=True):
        assert_same_bits(x, y)
    equal = op(scores[:1].expand(12), ranks, sizes)[0]
    assert_same_bits(equal, op(scores[:1].expand(12).contiguous(), ranks, sizes)[0])
    ones = ranks[:1].expand(12)
    assert float(op(scores, ones, sizes)[1]["pairs"]) == 0.0
    fours = sizes[:1].expand(3)
    assert_same_bits(op(scores, ranks, fours)[0], op(scores, ranks, fours.contiguous())[0])
    off = [torch.cat([x[:1], x])[1:] for x in (scores, ranks, sizes)]  # a vector's alignment
    for x, y in zip(with_gradients(lambda s: op(s, *off[1:]), off[0]), expected, strict=True):
        assert_same_bits(x, y)


def test_scores_far_apart(backend: Backend) -> None:
    ranks = torch.tensor([2, 1], device=backend.device)
    sizes = torch.tensor([2], device=backend.device)
    scores = torch.tensor([1.5, -0.25], device=backend.device).half()
    apart = far_apart(scores[:, None])[:, 0]
    assert apart.stride() == (2**31,)
    op = partial(ranking_loss, backend=backend.name)
    expected = with_gradients(lambda s: op(s, ranks, sizes), scores)
    for x, y in zip(with_gradients(lambda s: op(s, ranks, sizes), apart), expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.not_on("ref on a GPU", "torch divides there by a number by way of its inverse")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_the_normalizers_dtype_is_not_the_losss(backend: Backend, dtype: torch.dtype) -> None:
    args = case(backend, [4, 1, 7])
    op = partial(ranking_loss, *args, backend=backend.name)
    normalizer = torch.tensor(7, device=args[0].device).to(dtype)
    loss, _ = op(normalizer=normalizer)
    assert loss.dtype == torch.float32
    assert_same_bits(loss, op(normalizer=float(normalizer))[0])


def test_repeats(backend: Backend) -> None:
    scores, ranks, sizes = case(backend, [4, 9] * (300 if backend.name == "cpu" else 4))
    before = [x.clone() for x in (scores, ranks, sizes)]
    assert_repeats(backend, lambda s: ranking_loss(s, ranks, sizes, backend=backend.name), scores)
    assert all(torch.equal(x, y) for x, y in zip((scores, ranks, sizes), before, strict=True))


def test_without_gradient(backend: Backend) -> None:
    scores, ranks, sizes = case(backend, [4, 9])
    leaf = scores.clone().requires_grad_()
    loss, _ = ranking_loss(leaf, ranks, sizes, backend=backend.name)
    with torch.no_grad():
        again, _ = ranking_loss(leaf, ranks, sizes, backend=backend.name)
    assert not again.requires_grad
    assert_same_bits(again, loss.detach())


def test_gradcheck() -> None:
    scores, ranks, sizes = case(Backend("cpu", "cpu"), [4, 1, 6])
    leaf = scores.double().requires_grad_()
    for name in {"ref", "cpu"} & set(available_backends()):
        for normalizer in (None, 3.0, torch.tensor(3.0)):
            op = partial(ranking_loss, normalizer=normalizer, backend=name)
            assert torch.autograd.gradcheck(lambda s, op=op: op(s, ranks, sizes)[0], leaf)
        assert op(leaf, ranks, sizes)[0].dtype == torch.float64


def test_opcheck_compile_and_second_derivative(backend: Backend) -> None:
    scores, ranks, sizes = case(backend, [4, 1, 6])

    def op(s: Tensor, normalizer: Tensor | None = None):
        return ranking_loss(s, ranks, sizes, normalizer=normalizer, backend=backend.name)

    normalizer = torch.tensor(5.0, device=scores.device)
    assert_compiled_is_eager(lambda s: op(2.0 * s), scores)
    assert_compiled_is_eager(lambda s, z: op(s, z), scores, normalizer)
    if backend.name != "ref":
        leaf = scores.clone().requires_grad_()
        for tensor, number in ((None, None), (None, 4.0), (normalizer, None)):
            args = (leaf, ranks, sizes, tensor, number, True, backend.name)
            torch.library.opcheck(torch.ops.fastrlhf.ranking_loss.default, args)
        assert_second_derivative_raises(op, scores)


def as_cuda_does_it(scores: Tensor, ranks: Tensor, group_sizes: Tensor) -> list[Tensor]:
    """Loss, stats and gradient from csrc/ranking_loss.cu's warps and blocks, played on the CPU."""
    G, total = len(group_sizes), len(scores)
    scratch = torch.empty(3 * G, dtype=torch.float64)
    loss, stats, gradient = torch.empty(()), torch.empty(3), torch.empty(total)
    _native.cpu.test_ranking_warps(
        *(x.data_ptr() for x in (scores, ranks, group_sizes, scratch, loss, stats, gradient)),
        *(G, total, 0, 1.0),
    )
    return [loss, stats, gradient * stats[2]]


@pytest.mark.skipif(_native.cpu is None, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [2], [0, 3, 1], [9] * 5, [31, 32, 33, 70], [4, 9, 1] * 100]
)
@pytest.mark.parametrize("scale", [3.0, 100.0, 1e4])
def test_what_a_gpu_runs(sizes: list[int], scale: float) -> None:
    """One warp a group, one block that adds them: the same results as the specification's."""
    scores, ranks, group_sizes = case(Backend("ref", "cpu"), sizes, scale=scale)
    loss, stats, gradient = as_cuda_does_it(scores, ranks, group_sizes)
    leaf = scores.clone().requires_grad_()
    reference, _ = ranking_loss_ref(leaf, ranks, group_sizes)
    reference.backward()
    expected, slope = (
        oracle(scores, ranks, group_sizes) if sizes else ({"loss": 0.0}, leaf.detach())
    )
    exact = torch.tensor(expected["loss"], dtype=torch.float64)
    assert_accurate(loss, reference, exact)
    terms = float(slope.abs().max()) if len(slope) else 0.0
    assert_accurate(gradient, leaf.grad, slope.double(), terms=terms)
    assert [float(x) for x in stats[:2]] == pytest.approx(
        [expected.get("pair_accuracy", 0.0), expected.get("pairs", 0.0)]
    )
    for x, y in zip(
        as_cuda_does_it(scores, ranks, group_sizes), (loss, stats, gradient), strict=True
    ):
        assert_same_bits(x, y)


@pytest.mark.skipif(_native.cpu is None, reason="the C++ extension is not built")
def test_what_a_gpu_runs_reads_nothing_out_of_bounds() -> None:
    """Sizes that do not fit, which a GPU is not asked to check, are held to what is there."""
    scores, ranks, _ = case(Backend("ref", "cpu"), [6])
    for sizes in ([2**62], [-5, 9], [4, 4, 4], [2**62, 2**62, -1]):
        as_cuda_does_it(scores, ranks, torch.tensor(sizes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0]}, "scores must be a tensor, got list"),
        ({"scores": torch.zeros(3).int()}, "scores must be fp32, bf16, fp16 or fp64"),
        ({"scores": torch.zeros(3, 1)}, r"scores must have shape \(sum K,\), got \(3, 1\)"),
        ({"ranks": torch.zeros(3)}, "ranks must be int64 or int32, got torch.float32"),
        ({"ranks": torch.zeros(4).int()}, r"ranks must have shape \(3,\), got \(4,\)"),
        ({"ranks": torch.zeros(3, device="meta").int()}, "ranks must be on cpu, got meta"),
        ({"group_sizes": torch.ones(3)}, "group_sizes must be int64 or int32"),
        ({"group_sizes": torch.ones(3, 1).int()}, r"group_sizes must have shape \(G,\)"),
        ({"normalizer": 0}, r"normalizer must be in \(0.0, inf\], got 0"),
        ({"normalizer": torch.ones(1)}, "normalizer must be a number or a 0-d tensor"),
        ({"backend": "gpu"}, "backend must be one of ref, cpu, triton, cuda"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"scores": torch.zeros(3), "ranks": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        ranking_loss(**({**arguments, "group_sizes": torch.tensor([1, 2])} | change))


@pytest.mark.parametrize("sizes", [[], [2], [2, 2], [4, -1], [2**62, 2**62, 2**62, 2**62, 3]])
def test_sizes_must_add_up(
    backend: Backend, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU always, on a GPU in debug mode."""
    monkeypatch.setattr(_env, "DEBUG", backend.device == "cuda")
    scores, ranks, _ = case(backend, [3])
    group_sizes = torch.tensor(sizes, dtype=torch.int64, device=backend.device)
    with pytest.raises(ValueError, match="group_sizes must be at least 0 and add up"):
        ranking_loss(scores, ranks, group_sizes, backend=backend.name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="values are always checked on a CPU")
@pytest.mark.not_on("ref", "torch checks them itself, or not")
@pytest.mark.not_on("cpu", "it checks them")
@pytest.mark.parametrize("sizes", [[], [2], [2, 2], [4, -1], [2**62, 2**62, 2**62, 2**62, 3]])
def test_sizes_that_do_not_fit_reach_nothing_outside(backend: Backend, sizes: list[int]) -> None:
    """Unchecked on a GPU: the result means nothing, and nothing but the scores is read."""
    within, ranks, _ = case(backend, [3])
    scores = torch.full((9,), NAN, device=backend.device)
    scores[3:6] = within
    group_sizes = torch.tensor(sizes, dtype=torch.int64, device=backend.device)
    results = with_gradients(
        lambda s: ranking_loss(s, ranks, group_sizes, backend=backend.name), scores[3:6]
    )
    assert all(bool(x.isfinite().all()) for x in results[:-1])
