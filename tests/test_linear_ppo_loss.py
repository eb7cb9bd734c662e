"""linear_ppo_loss against the definition in fp64, and against policy_loss of linear_logprobs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_second_derivative_raises
from oracle import Backend, assert_accurate, assert_same_bits, reference_of_head
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from fastrlhf_kernels import (
    _linear,
    _linear_losses,
    available_backends,
    linear_logprobs,
    linear_ppo_loss,
    policy_loss,
)
from fastrlhf_kernels.linear_ppo_loss import STATS, linear_ppo_loss_ref

OP = "linear_ppo_loss"
INF, NAN = float("inf"), float("nan")
Leaves = tuple[Tensor, Tensor, Tensor | None]
Data = tuple[Tensor, Tensor, Tensor]  # labels, old log-probs, advantages

# Log-ratios on both sides of every bend of the loss, and none near one, where fp32 might differ.
LOG_RATIOS = (0.0, 0.05, -0.05, 0.1, -0.1, 0.5, -0.5, 3.0, -3.0, 25.0, -25.0)


def log_softmax(
    hidden: Tensor, weight: Tensor, bias, valid: Tensor, logit_scale=1.0, softcap=None,
    temperature: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    h = torch.where(valid[..., None], hidden, 0.0)
    z = logit_scale * linear(h, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return (z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
            ).log_softmax(-1)  # fmt: skip


def oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask=None, *,
    clip=0.2, entropy_coef=0.0, bias=None, normalizer=None, **head,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The definition in fp64, all logits at once, row sums by hand."""
    valid = labels != -100 if mask is None else (labels != -100) & (mask != 0)
    log_p = log_softmax(hidden, weight, bias, valid, **head)
    picked = log_p.gather(-1, labels.where(valid, 0).long()[..., None])[..., 0][valid]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)[valid]
    old, A = old.double()[valid], advantages.double()[valid]
    d = (picked - old).clamp(-20.0, 20.0)
    ratio = d.exp()
    plain, clipped = -A * ratio, -A * ratio.clamp(1.0 - clip, 1.0 + clip)
    n = int(valid.sum())
    if n == 0:
        zero = sum(x.sum() * 0.0 for x in (hidden, weight, bias) if x is not None)
        return zero, dict.fromkeys(STATS, zero.detach())
    loss = torch.maximum(plain, clipped).sum() - entropy_coef * entropy.sum()
    stats = {
        "clip_fraction": (clipped > plain).double().mean(),
        "approx_kl": (0.5 * d * d).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "entropy": entropy.mean(),
    }
    return loss / (n if normalizer is None else normalizer), {
        k: v.detach() for k, v in stats.items()
    }


def run(
    function, leaves: Leaves, data: Data, mask=None, factor: float = 1.0, **settings: Any
) -> list[Tensor]:
    """The loss, the stats, and the gradients of `factor` times the loss."""
    leaves = tuple(None if x is None else x.detach().clone().requires_grad_() for x in leaves)
    loss, stats = function(*leaves[:2], *data, mask, bias=leaves[2], **settings)
    assert tuple(stats) == STATS
    assert not any(x.requires_grad for x in stats.values())
    gradients = torch.autograd.grad(loss * factor, [x for x in leaves if x is not None])
    return [loss.detach(), *stats.values(), *gradients]


def check(backend: Backend, leaves: Leaves, data: Data, mask=None, **settings) -> list[Tensor]:
    actual = run(linear_ppo_loss, leaves, data, mask, backend=backend.name, **settings)
    plain = reference_of_head(linear_ppo_loss_ref, backend, *leaves[:2])
    reference = run(plain, leaves, data, mask, **settings)
    wide = tuple(None if x is None else x.double() for x in leaves)
    expected = run(oracle, wide, data, mask, **settings)
    # A unit in the last place of a log-prob of size s moves the ratio by s units of its own.
    head = {k: v for k, v in settings.items() if k in ("logit_scale", "softcap", "temperature")}
    log_p = log_softmax(*wide, torch.ones_like(data[0], dtype=torch.bool), **head)
    picked = log_p.gather(-1, data[0].long()[..., None])
    size = max(1.0, float(picked.abs().max())) if picked.numel() else 1.0
    for a, r, o in zip(actual, reference, expected, strict=True):
        # A product's terms may cancel: what is allowed is fp32 units of the largest result.
        ratio = size * torch.finfo(torch.float32).eps / torch.finfo(a.dtype).eps
        terms = float(o.abs().max()) * ratio if o.numel() else 0.0
        assert_accurate(a, r, o, interpreted=backend.interpreted, terms=terms)
    return actual


def case(
    N: int, H: int, V: int, backend: Backend, dtype=torch.float32, bias: bool = True, seed: int = 0,
    **head,
) -> tuple[Leaves, Data]:  # fmt: skip
    """Old log-probs are the true ones less each of LOG_RATIOS in turn."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 3.0 * H**-0.5
    shift = torch.randn(V, generator=generator) if bias else None
    labels = torch.randint(0, V, (N,), generator=generator)
    advantages = torch.randn(N, generator=generator)
    leaves = tuple(None if x is None else x.to(dtype) for x in (hidden, weight, shift))
    wide = [None if x is None else x.double() for x in leaves]
    head = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in head.items()}
    log_p = log_softmax(*wide, torch.ones(N, dtype=torch.bool), **head)
    old = log_p.gather(-1, labels[:, None])[:, 0]
    old = (old - torch.tensor([LOG_RATIOS[i % len(LOG_RATIOS)] for i in range(N)])).float()
    leaves = tuple(None if x is None else x.to(backend.device) for x in leaves)
    return leaves, tuple(x.to(backend.device) for x in (labels, old, advantages))


@given(
    V=st.sampled_from([1, 7, 37, 163]),
    H=st.sampled_from([1, 5, 32]),
    empty=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 4.0]),
    temperature=st.sampled_from([1.0, 0.6, "rows"]),
    clip=st.sampled_from([0.2, 0.0, 0.15]),
    entropy_coef=st.sampled_from([0.0, 0.01, -2.0]),
    normalizer=st.sampled_from([None, 3, 7.5, "tensor"]),
    factor=st.sampled_from([1.0, -0.25]),  # exact: the gradient is kept in the halves' dtypes
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, V, H, empty, dtype, bias, logit_scale, softcap, temperature, clip,
    entropy_coef, normalizer, factor, masked, seed,
) -> None:  # fmt: skip
    N = 0 if empty else 11 if backend.interpreted else 22
    generator = torch.Generator().manual_seed(seed)
    if temperature == "rows":
        temperature = (torch.rand(N, generator=generator) + 0.5).to(backend.device)
    head = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    leaves, data = case(N, H, V, backend, dtype, bias, seed, **head)
    mask = (torch.rand(N, generator=generator) >= masked).to(backend.device)
    if clip == 0.0:  # a ratio of 1 then stands on the bend
        mask &= torch.arange(N, device=mask.device) % len(LOG_RATIOS) != 0
    if normalizer == "tensor":
        normalizer = torch.tensor(11.0, device=backend.device)
    check(
        backend, leaves, data, None if masked == 0.0 and clip else mask, factor=factor, clip=clip,
        entropy_coef=entropy_coef, normalizer=normalizer, **head,
    )  # fmt: skip


def test_many_chunks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of rows, the last one short, several tiles of columns."""
    monkeypatch.setattr(_linear_losses, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(_linear_losses, "LEAST_ROWS", {"cpu": 8, "cuda": 8})
    temperature = torch.linspace(0.5, 2.0, 22, device=backend.device)
    leaves, data = case(22, 16, 4099, backend, temperature=temperature)
    mask = torch.ones(22, device=backend.device)
    mask[3] = 0.0
    check(backend, leaves, data, mask, entropy_coef=0.1, temperature=temperature)


def test_is_policy_loss_of_linear_logprobs(backend: Backend) -> None:
    (hidden, weight, bias), (labels, old, advantages) = case(22, 8, 37, backend)
    mask = torch.arange(22, device=backend.device) % 5
    settings = {"bias": bias, "backend": backend.name}
    loss, stats = linear_ppo_loss(
        hidden, weight, labels, old, advantages, mask, entropy_coef=0.3, **settings
    )
    logprobs, entropy = linear_logprobs(hidden, weight, labels, return_entropy=True, **settings)
    expected, wanted = policy_loss(logprobs, old, advantages, mask, backend=backend.name)
    wanted["entropy"] = entropy[mask != 0].mean()
    torch.testing.assert_close(loss, expected - 0.3 * wanted["entropy"], rtol=1e-5, atol=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(stats[name], value, rtol=1e-5, atol=1e-6)


def test_a_mask_is_bool_int_or_float(backend: Backend) -> None:
    leaves, data = case(11, 8, 37, backend)
    keep = torch.arange(11, device=backend.device) % 3 != 1
    first = run(linear_ppo_loss, leaves, data, keep, backend=backend.name)
    for mask in (keep.int(), 0.5 * keep.float(), keep.to(torch.uint8), -keep.long()):
        found = run(linear_ppo_loss, leaves, data, mask, backend=backend.name)
        for x, y in zip(found, first, strict=True):
            assert_same_bits(x, y)


def test_masked_rows_reach_nothing(backend: Backend) -> None:
    """As if they were cut out, whatever hidden, labels, old log-probs, advantages hold there."""
    settings = {"entropy_coef": 0.2, "backend": backend.name}
    (hidden, weight, bias), data = case(11, 8, 37, backend)
    mask = torch.ones(11, dtype=torch.bool, device=backend.device)
    mask[[1, 4, 7]] = False
    temperature = torch.linspace(0.5, 1.5, 11, device=backend.device)
    cut = run(
        linear_ppo_loss, (hidden[mask], weight, bias), tuple(x[mask] for x in data),
        temperature=temperature[mask], **settings,
    )  # fmt: skip
    hidden, temperature = hidden.clone(), temperature.clone()
    labels, old, advantages = (x.clone() for x in data)
    hidden[1], hidden[4, 2], old[1], advantages[4], old[7] = NAN, INF, NAN, -INF, INF
    labels[1], labels[4], temperature[1] = 10**9, -1, NAN
    found = run(
        linear_ppo_loss, (hidden, weight, bias), (labels, old, advantages), mask,
        temperature=temperature, **settings,
    )  # fmt: skip
    compare = assert_same_bits
    if backend.name == "ref":  # its products are of other shapes

        def compare(x: Tensor, y: Tensor) -> None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)

    for i, (x, y) in enumerate(zip(found, cut, strict=True)):
        compare(x[mask] if i == 1 + len(STATS) else x, y)
    assert not found[1 + len(STATS)][~mask].any()
    labels[~mask] = -100
    again = run(
        linear_ppo_loss, (hidden, weight, bias), (labels, old, advantages),
        temperature=temperature, **settings,
    )  # fmt: skip
    for x, y in zip(again, found, strict=True):
        compare(x, y)


def test_nothing_valid(backend: Backend) -> None:
    """No row, or none that counts: all is 0, whatever the rows hold and the normalizer is."""
    (hidden, weight, bias), (labels, old, advantages) = case(3, 8, 37, backend)
    zero = torch.tensor(0.0, device=backend.device)
    for keep, normalizer in ((0, None), (3, None), (3, 7.0), (3, zero)):
        found = run(
            linear_ppo_loss, (torch.full_like(hidden[:keep], NAN), weight, bias),
            (labels[:keep], old[:keep], advantages[:keep]), torch.zeros_like(old[:keep]),
            entropy_coef=0.1, normalizer=normalizer, backend=backend.name,
        )  # fmt: skip
        assert not any(bool(x.any()) for x in found)


def test_a_nan_stays_in_its_row(backend: Backend) -> None:
    (hidden, weight, bias), data = case(5, 8, 37, backend)
    settings = {"entropy_coef": 0.2, "normalizer": 5, "backend": backend.name}
    clean = run(linear_ppo_loss, (hidden, weight, bias), data, **settings)
    hidden[2, 3] = NAN
    found = run(linear_ppo_loss, (hidden, weight, bias), data, **settings)
    assert found[0].isnan()
    dh, clean_dh = found[1 + len(STATS)], clean[1 + len(STATS)]
    assert_same_bits(dh[[0, 1, 3, 4]], clean_dh[[0, 1, 3, 4]])


def test_far_log_ratios_are_clamped(backend: Backend) -> None:
    """Beyond +-20 all is finite, and no gradient flows through the ratio."""
    (hidden, weight, _), (labels, old, _) = case(2, 8, 37, backend, bias=False)
    old += torch.tensor([90.0, -90.0], device=backend.device)
    advantages = torch.tensor([1.0, -1.0], device=backend.device)
    found = run(
        linear_ppo_loss, (hidden, weight, None), (labels, old, advantages), backend=backend.name
    )
    assert math.isclose(float(found[0]), 0.5 * math.exp(20.0), rel_tol=1e-5)
    assert math.isclose(float(found[4]), math.exp(20.0), rel_tol=1e-5)
    assert not any(bool(x.any()) for x in found[-2:])


def test_normalizer_is_a_number_or_a_tensor(backend: Backend) -> None:
    leaves, data = case(6, 8, 37, backend)
    mask = torch.arange(6, device=backend.device)
    default = run(
        linear_ppo_loss, leaves, data, mask, entropy_coef=0.5, backend=backend.name
    )  # five valid
    for dtype in (torch.int64, torch.float32, torch.float64):
        five = torch.tensor(5, dtype=dtype, device=backend.device)
        for normalizer in (five, five.item()):
            found = run(
                linear_ppo_loss, leaves, data, mask, entropy_coef=0.5, normalizer=normalizer,
                backend=backend.name,
            )  # fmt: skip
            for x, y in zip(found, default, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_gradient_is_made_where_it_is_wanted_alone(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, data = case(6, 8, 37, backend)
    settings = {"entropy_coef": 0.1, "backend": backend.name}
    full = run(linear_ppo_loss, leaves, data, **settings)
    for i in range(3):
        some = [x.detach().clone().requires_grad_(j == i) for j, x in enumerate(leaves)]
        linear_ppo_loss(some[0], some[1], *data, bias=some[2], **settings)[0].backward()
        assert [x.grad is not None for x in some] == [j == i for j in range(3)]
        torch.testing.assert_close(some[i].grad, full[i - 3], rtol=1e-5, atol=1e-7)
    if backend.name == "ref":
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was made that nobody asked for")

    monkeypatch.setattr(_linear_losses, "backward_rows", refuse)
    with torch.no_grad():
        loss, stats = linear_ppo_loss(
            leaves[0].requires_grad_(), leaves[1], *data, bias=leaves[2], **settings
        )
    for x, y in zip([loss, *stats.values()], full, strict=False):
        assert_same_bits(x, y)
    with pytest.raises(AssertionError, match="nobody asked"):
        linear_ppo_loss(leaves[0], leaves[1], *data, **settings)


def test_upstream_only_scales(backend: Backend) -> None:
    """Twice through the same graph, and in place where there is no second time."""
    leaves, data = case(6, 8, 37, backend)
    hidden, weight = leaves[0].requires_grad_(), leaves[1].requires_grad_()
    loss, _ = linear_ppo_loss(hidden, weight, *data, entropy_coef=0.1, backend=backend.name)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for keep in (True, False):
        found = torch.autograd.grad(-2.0 * loss, (hidden, weight), retain_graph=keep)
        for x, y in zip(found, once, strict=True):
            assert_same_bits(x, -2.0 * y)


def test_leading_dimensions_and_strides(backend: Backend) -> None:
    (hidden, weight, bias), data = case(12, 8, 37, backend)
    settings = {"entropy_coef": 0.1, "backend": backend.name}
    flat = run(linear_ppo_loss, (hidden, weight, bias), data, **settings)
    shaped = run(
        linear_ppo_loss, (hidden.reshape(3, 4, 8), weight, bias),
        tuple(x.reshape(3, 4) for x in data), **settings,
    )  # fmt: skip
    for x, y in zip(shaped, flat, strict=True):
        assert_same_bits(x.reshape(y.shape), y)
    cube, grids = hidden.reshape(3, 4, 8)[:, :-1], [x.reshape(3, 4)[:, 1:] for x in data]
    sliced = linear_ppo_loss(cube, weight, *grids, grids[2] > 0, **settings)[0]
    dense = linear_ppo_loss(
        cube.contiguous(), weight, *(x.contiguous() for x in grids), grids[2] > 0, **settings
    )[0]
    assert_same_bits(sliced, dense)


def test_mixed_dtypes(backend: Backend) -> None:
    """Each gradient has its argument's dtype; int32 labels; halves of old log-probs."""
    (hidden, weight, bias), (labels, old, advantages) = case(11, 8, 37, backend)
    leaves = (hidden.bfloat16(), weight, bias.half())
    check(backend, leaves, (labels.int(), old.half().float(), advantages.bfloat16()))
    if backend.name != "triton":
        found = run(linear_ppo_loss, leaves, (labels, old.double(), advantages), clip=0.3)
        assert found[0].dtype == torch.float64
        assert found[-3].dtype == torch.bfloat16


def test_repeats_and_autocast(backend: Backend) -> None:
    leaves, data = case(9, 8, 163, backend)

    def autocast(*args: Tensor, **settings) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            return linear_ppo_loss(*args, **settings)

    first = run(linear_ppo_loss, leaves, data, backend=backend.name)
    for function in (linear_ppo_loss, autocast):
        for x, y in zip(run(function, leaves, data, backend=backend.name), first, strict=True):
            assert_same_bits(x, y)


@pytest.mark.not_on("ref", "it does hold them")
def test_never_holds_the_logits(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest piece of memory asked for, in both passes, is a chunk's logits or a gradient."""
    if backend.device != "cpu":
        pytest.skip("the CPU's allocations are counted")
    monkeypatch.setattr(_linear_losses, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(_linear_losses, "LEAST_ROWS", {"cpu": 4})
    N, V, H = 24, 9001, 2
    leaves, data = case(N, H, V, backend)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(linear_ppo_loss, leaves, data, entropy_coef=0.1, factor=3.0, backend=backend.name)
    largest = max(e.self_cpu_memory_usage for e in profiled.events())
    assert largest == 4 * max(4 * _linear.padded(V, 4), V * H)


@pytest.mark.parametrize("name", sorted({"ref", "cpu"} & set(available_backends())))
def test_gradcheck(name: str) -> None:
    leaves, (labels, old, advantages) = case(5, 3, 7, Backend(name, "cpu"), torch.float64)
    labels[2] = -100
    temperature = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss, _ = linear_ppo_loss(
            hidden, weight, labels, old, advantages, bias=bias, logit_scale=0.5, softcap=2.0,
            temperature=temperature, entropy_coef=0.3, clip=0.9, backend=name,
        )  # fmt: skip
        assert loss.dtype == torch.float64
        return loss

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


def test_opcheck_and_compile(backend: Backend) -> None:
    leaves, (labels, old, advantages) = case(5, 8, 37, backend)
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    mask = torch.arange(5, device=backend.device) != 1
    if backend.name != "ref":
        rows, n = torch.rand(5, device=backend.device) + 0.5, torch.tensor(3.0)
        for b, m, t, norm, number in (
            (bias, mask, None, None, 3.0),
            (None, None, rows, n.to(backend.device), None),
        ):
            data = (labels, old, advantages, m, t, norm, number)
            settings = (0.7, 0.5, 3.0, 0.2, 0.1, True, True, b is not None, False, backend.name)
            torch.library.opcheck(
                torch.ops.fastrlhf.linear_ppo_loss.default, (hidden, weight, b, *data, *settings)
            )

    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = linear_ppo_loss(
            2.0 * h, w, y, old, advantages, mask, bias=b, softcap=9.0, entropy_coef=0.1,
            backend=backend.name,
        )  # fmt: skip
        return 3.0 * loss, stats["entropy"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, found = (f(hidden, weight, bias, labels) for f in (step, compiled))
    assert_same_bits(found[0], eager[0])
    assert_same_bits(found[1], eager[1])
    gradients = (torch.autograd.grad(x[0], (hidden, weight, bias)) for x in (found, eager))
    for x, y in zip(*gradients, strict=True):
        assert_same_bits(x, y)


@pytest.mark.not_on("ref", "the reference has second derivatives")
def test_second_derivative_raises(backend: Backend) -> None:
    (hidden, weight, bias), data = case(3, 4, 7, backend)
    assert_second_derivative_raises(
        lambda x: linear_ppo_loss(x, weight, *data, bias=bias, backend=backend.name)[0], hidden
    )


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_out_of_range(backend: Backend, label: int) -> None:
    if backend.device != "cpu":
        pytest.skip("on a GPU labels are checked with FASTRLHF_DEBUG=1 only")
    args = (torch.zeros(2, 4), torch.zeros(7, 4), torch.tensor([0, label]), *torch.zeros(2, 2))
    with pytest.raises(IndexError, match=rf"labels must be in \[0, 7\) .* got {label}"):
        linear_ppo_loss(*args, backend=backend.name)
    linear_ppo_loss(*args, torch.tensor([1, 0]), backend=backend.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 5)}, r"weight must have shape \(7, 4\), got \(7, 5\)"),
        ({"weight": torch.zeros(0, 4)}, r"weight must have shape \(V, H\), V >= 1"),
        ({"labels": torch.zeros(3).long()}, r"labels must have shape \(2,\), got \(3,\)"),
        ({"old_logprobs": torch.zeros(3)}, r"old_logprobs must have shape \(2,\), got \(3,\)"),
        ({"old_logprobs": torch.zeros(2).long()}, "old_logprobs must be fp32, bf16, fp16 or fp64"),
        ({"advantages": torch.zeros(2, 1)}, r"advantages must have shape \(2,\)"),
        ({"mask": torch.zeros(3)}, r"mask must have shape \(2,\), got \(3,\)"),
        ({"mask": [1, 0]}, "mask must be a tensor, got list"),
        ({"clip": -0.1}, "clip must be in"),
        ({"entropy_coef": NAN}, "entropy_coef must be in"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be above 0"),
        ({"normalizer": 0}, "normalizer must be in"),
        ({"normalizer": torch.ones(2)}, "normalizer must be a number or a 0-d tensor"),
        ({"backend": "cuda2"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(2).long(),
        "old_logprobs": torch.zeros(2), "advantages": torch.zeros(2),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=f"linear_ppo_loss: .*{message}|{message}"):
        linear_ppo_loss(**arguments)
