"""linear_logprobs against log_softmax of the product in fp64, and against logprobs_from_logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_second_derivative_raises
from oracle import Backend, assert_accurate, assert_same_bits, reference_of_head
from torch import Tensor
from torch.nn.functional import linear

from fastrlhf_kernels import _linear, available_backends, linear_logprobs, logprobs_from_logits
from fastrlhf_kernels.linear_logprobs import linear_logprobs_ref

OP = "linear_logprobs"
INF, NAN = float("inf"), float("nan")


def oracle(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale=1.0,
    softcap=None, temperature=1.0, ignore_index=-100, **_,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in fp64, all logits at once."""
    valid = labels != ignore_index
    h = torch.where(valid[..., None], hidden.double(), 0.0)
    z = logit_scale * linear(h, weight.double(), None if bias is None else bias.double())
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.double()[..., None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    finite = torch.where(z == -INF, 0.0, log_p)
    entropy = -(log_p.exp() * finite).sum(-1)
    return logprobs.where(valid, 0.0), entropy.where(valid, 0.0)


def run(function, tensors: tuple[Tensor | None, ...], labels: Tensor, **settings) -> list[Tensor]:
    """Log-probs, entropy, and the gradients of an uneven sum of both to hidden, weight, bias."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    logprobs, entropy = function(leaves, labels, **settings)
    weights = torch.linspace(-1.0, 2.0, max(labels.numel(), 1), dtype=torch.float64)
    weights = weights[: labels.numel()].reshape(labels.shape).to(logprobs)
    total = (logprobs * weights).sum() + (entropy * (1.0 - weights)).sum()
    gradients = torch.autograd.grad(total, [x for x in leaves if x is not None])
    return [logprobs.detach(), entropy.detach(), *gradients]


def op(backend: str):
    def call(leaves: list[Tensor | None], labels: Tensor, **settings) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = leaves
        return linear_logprobs(
            hidden, weight, labels, bias=bias, return_entropy=True, backend=backend, **settings
        )

    return call


def reference(backend: Backend):
    def call(leaves: list[Tensor | None], labels: Tensor, **settings) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = leaves
        function = reference_of_head(linear_logprobs_ref, backend, hidden, weight)
        return function(hidden, weight, labels, bias=bias, return_entropy=True, **settings)

    return call


def check(
    backend: Backend, tensors: tuple[Tensor | None, ...], labels: Tensor, **settings
) -> list[Tensor]:
    actual = run(op(backend.name), tensors, labels, **settings)
    wide = tuple(None if x is None else x.double() for x in tensors)
    expected = run(lambda leaves, y, **s: oracle(*leaves, y, **s), wide, labels, **settings)
    own = run(reference(backend), tensors, labels, **settings)
    for a, r, o in zip(actual, own, expected, strict=True):
        assert_accurate(a, r, o, interpreted=backend.interpreted)
    return actual


def case(
    N: int, H: int, V: int, backend: Backend, dtype=torch.float32, bias: bool = True, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 3.0 * H**-0.5
    shift = torch.randn(V, generator=generator) if bias else None
    labels = torch.randint(0, V, (N,), generator=generator).to(backend.device)
    tensors = (hidden, weight, shift)
    return tuple(None if x is None else x.to(dtype).to(backend.device) for x in tensors), labels


@given(
    V=st.sampled_from([1, 7, 37, 163]),
    H=st.sampled_from([1, 5, 32]),
    empty=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 4.0]),
    temperature=st.sampled_from([1.0, 0.6, "rows"]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, V, H, empty, dtype, bias, logit_scale, softcap, temperature, ignored, seed
) -> None:
    N = 0 if empty else 8 if backend.interpreted else 24
    tensors, labels = case(N, H, V, backend, dtype, bias, seed)
    generator = torch.Generator().manual_seed(seed)
    labels[torch.rand(N, generator=generator).to(labels.device) < ignored] = -100
    if temperature == "rows":
        temperature = (torch.rand(N, generator=generator) + 0.5).to(labels.device)
    check(
        backend, tensors, labels,
        logit_scale=logit_scale, softcap=softcap, temperature=temperature,
    )  # fmt: skip


def test_many_pieces(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of columns, several pieces of rows, none of them full."""
    monkeypatch.setattr(_linear, "ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_COLUMNS", _linear.COLUMNS)
    tensors, labels = case(11, 16, 4099, backend)
    labels[3] = -100
    labels[5:7] = 4098
    check(backend, tensors, labels, temperature=torch.linspace(0.5, 2.0, 11).to(labels.device))


@pytest.mark.not_on("ref", "torch's sums promise no such thing")
def test_bits_of_logprobs_from_logits(backend: Backend) -> None:
    """Where products are exact, so that logits agree, the log-probs agree to the bit."""
    N, V = (3, 4099) if backend.interpreted else (9, 9001)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (N, 8), generator=generator).float().to(backend.device)
    weight = torch.randint(-4, 5, (V, 8), generator=generator).float().to(backend.device) / 16
    bias = torch.randn(V, generator=generator).to(backend.device)
    labels = torch.randint(0, V, (N,), generator=generator).to(backend.device)
    settings = {"temperature": 0.7, "softcap": 5.0, "backend": backend.name}
    logits = (hidden @ weight.T + bias) * 0.3
    expected = logprobs_from_logits(logits, labels, return_entropy=True, **settings)
    found = linear_logprobs(
        hidden, weight, labels, bias=bias, logit_scale=0.3, return_entropy=True, **settings
    )
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y)


def test_ignored_rows_reach_nothing(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(6, 8, 37, backend)
    labels[[1, 4]] = -1
    clean = run(op(backend.name), (hidden, weight, bias), labels, ignore_index=-1)
    hidden[1], hidden[4, 2] = NAN, INF
    for x, y in zip(
        run(op(backend.name), (hidden, weight, bias), labels, ignore_index=-1), clean, strict=True
    ):
        assert_same_bits(x, y)
    assert not clean[2][[1, 4]].any()


def test_a_nan_stays_in_its_row(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(4, 8, 37, backend)
    clean = run(op(backend.name), (hidden, weight, bias), labels)
    hidden[2, 3] = NAN
    found = run(op(backend.name), (hidden, weight, bias), labels)
    for x, y in zip(found[:3], clean[:3], strict=True):
        assert bool(x[2].isnan().all())
        assert_same_bits(x[[0, 1, 3]], y[[0, 1, 3]])


def test_a_bias_of_minus_infinity_removes_a_token(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(6, 8, 4099, backend)
    bias[:4096] = -INF  # a first tile of nothing but -inf
    labels[:] = torch.arange(4096, 4102) % 3 + 4096
    found = check(backend, (hidden, weight, bias), labels)
    assert all(bool(x.isfinite().all()) for x in found)


def test_leading_dimensions_and_strides(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(12, 8, 37, backend)
    dense = run(op(backend.name), (hidden, weight, bias), labels)
    cube, table = hidden.reshape(3, 4, 8), labels.reshape(3, 4)
    shaped = run(op(backend.name), (cube, weight, bias), table)
    for x, y in zip(shaped, dense, strict=True):
        assert_same_bits(x.reshape(y.shape), y)
    odd_weight = weight.T.contiguous().T
    assert not odd_weight.is_contiguous()
    odd = linear_logprobs(
        cube[:, 1:], odd_weight, table[:, 1:], bias=torch.stack([bias, bias], 1)[:, 0],
        return_entropy=True, backend=backend.name,
    )  # fmt: skip
    for x, y in zip(odd, dense[:2], strict=True):
        torch.testing.assert_close(x, y.reshape(3, 4)[:, 1:], rtol=1e-5, atol=1e-5)
    single = linear_logprobs(hidden[0], weight, labels[0], bias=bias, backend=backend.name)
    assert single.shape == ()
    torch.testing.assert_close(single, dense[0][0], rtol=1e-5, atol=1e-5)


def test_only_what_requires_a_gradient_gets_one(backend: Backend) -> None:
    tensors, labels = case(5, 8, 37, backend)
    full = run(op(backend.name), tensors, labels)[2:]
    for i in range(3):
        leaves = [x.detach().clone().requires_grad_(j == i) for j, x in enumerate(tensors)]
        logprobs, entropy = op(backend.name)(leaves, labels)
        weights = torch.linspace(-1.0, 2.0, 5).to(logprobs)
        ((logprobs * weights).sum() + (entropy * (1 - weights)).sum()).backward()
        assert [x.grad is not None for x in leaves] == [j == i for j in range(3)]
        torch.testing.assert_close(leaves[i].grad, full[i], rtol=1e-5, atol=1e-6)


def test_scores_without_a_gradient(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the call with gradient; nothing is kept for a backward pass."""
    monkeypatch.setattr(_linear, "ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_ROWS", 4)
    monkeypatch.setattr(_linear, "GPU_COLUMNS", _linear.COLUMNS)
    (hidden, weight, bias), labels = case(11, 16, 4099, backend)
    labels[3] = -100
    temperature = torch.linspace(0.5, 2.0, 11, device=backend.device)
    for entropy in (False, True):
        settings = {
            "bias": bias, "softcap": 5.0, "temperature": temperature, "return_entropy": entropy,
            "backend": backend.name,
        }  # fmt: skip
        leaf = hidden.clone().requires_grad_()
        kept = linear_logprobs(leaf, weight, labels, **settings)
        scored = linear_logprobs(hidden, weight, labels, **settings)
        with torch.no_grad():
            within = linear_logprobs(leaf, weight, labels, **settings)
        for found in (scored, within):
            for x, y in zip(torch.atleast_1d(found), torch.atleast_1d(kept), strict=True):
                assert not x.requires_grad
                assert_same_bits(x, y.detach())
    if backend.name == "ref":
        return
    args = (leaf, weight, None, labels, None, 1.0, 1.0, 0.0, -100, False)
    logprobs, _, states = torch.ops.fastrlhf.linear_logprobs.default(*args, False, "", backend.name)
    assert states.numel() == 0
    with pytest.raises(RuntimeError, match="without states"):
        logprobs.sum().backward()


def test_unused_results_and_expanded_gradients(backend: Backend) -> None:
    (hidden, weight, _), labels = case(5, 8, 37, backend)
    hidden.requires_grad_()
    logprobs, entropy = linear_logprobs(
        hidden, weight, labels, return_entropy=True, backend=backend.name
    )
    ones = torch.ones_like(logprobs)
    for result in (logprobs, entropy):
        (expanded,) = torch.autograd.grad(result.sum(), hidden, retain_graph=True)
        (dense,) = torch.autograd.grad(result, hidden, ones, retain_graph=True)
        assert_same_bits(expanded, dense)


def test_repeats(backend: Backend) -> None:
    tensors, labels = case(9, 8, 4099, backend)
    first, second = (run(op(backend.name), tensors, labels) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert_same_bits(x, y)


def test_autocast_changes_nothing(backend: Backend) -> None:
    tensors, labels = case(5, 8, 37, backend)
    plain = run(op(backend.name), tensors, labels)

    def autocast(leaves: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            return op(backend.name)(leaves, labels)

    within = run(autocast, tensors, labels)
    for x, y in zip(within, plain, strict=True):
        assert_same_bits(x, y)


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_logits_are_never_held() -> None:
    """The largest piece of memory asked for, in both passes, is far below (N, V)."""
    N, V = 3000, 9001
    tensors, labels = case(N, 4, V, Backend("cpu", "cpu"))
    with torch.profiler.profile(profile_memory=True) as profile:
        run(op("cpu"), tensors, labels)
    sizes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert max(sizes) == _linear.ROWS * _linear.padded(_linear.COLUMNS, 4) * 4
    assert max(sizes) * 3 < N * V * 4


@pytest.mark.skipif("cpu" not in available_backends(), reason="C++ extension not built")
def test_bf16_products_are_as_good_as_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX products stay bf16: no worse than a plain bf16 head followed by fp32 log_softmax."""
    monkeypatch.setattr(_linear, "CPU_BF16", True)
    tensors, labels = case(64, 32, 163, Backend("cpu", "cpu"), torch.bfloat16)
    labels[::7] = -100

    def plain(leaves: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = leaves
        log_p = (linear(hidden, weight).float() + bias.float()).log_softmax(-1)
        valid = labels != -100
        picked = log_p.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
        return picked.where(valid, 0.0), -(log_p.exp() * log_p).sum(1).where(valid, 0.0)

    found = run(op("cpu"), tensors, labels)
    expected = run(lambda x, y: oracle(*x, y), tuple(x.double() for x in tensors), labels)
    for a, r, o in zip(found, run(plain, tensors, labels), expected, strict=True):
        assert_accurate(a, r, o)
    assert float((found[0].double() - expected[0]).abs().max()) > 1e-4  # it did run in bf16


@pytest.mark.parametrize("name", sorted({"ref", "cpu"} & set(available_backends())))
def test_gradcheck(name: str) -> None:
    tensors, labels = case(5, 3, 7, Backend(name, "cpu"), torch.float64)
    labels[2] = -100
    temperature = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        found = op(name)(
            list(leaves), labels, logit_scale=0.5, softcap=2.0, temperature=temperature
        )
        assert all(x.dtype == torch.float64 for x in found)
        return found

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])


def test_opcheck_and_compile(backend: Backend) -> None:
    tensors, labels = case(5, 8, 37, backend)
    labels[1] = -100
    hidden, weight, bias = (x.requires_grad_() for x in tensors)
    if backend.name != "ref":
        rows = torch.rand(5, device=backend.device) + 0.5
        for temperatures, entropy, b in ((None, True, bias), (rows, False, None)):
            args = (hidden, weight, b, labels, temperatures, 0.7, 0.5, 3.0, -100, entropy, True, "")
            torch.library.opcheck(torch.ops.fastrlhf.linear_logprobs.default, (*args, backend.name))

    def step(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        logprobs, entropy = linear_logprobs(
            2.0 * h, w, y, bias=b, softcap=9.0, return_entropy=True, backend=backend.name
        )
        return logprobs - 0.1 * entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = (hidden, weight, bias)
    eager, found = step(*leaves, labels), compiled(*leaves, labels)
    assert_same_bits(found, eager)
    gradients = (torch.autograd.grad(x.sum(), leaves) for x in (found, eager))
    for x, y in zip(*gradients, strict=True):
        assert_same_bits(x, y)


@pytest.mark.not_on("ref", "the reference has second derivatives")
def test_second_derivative_raises(backend: Backend) -> None:
    (hidden, weight, bias), labels = case(3, 4, 7, backend)
    assert_second_derivative_raises(
        lambda x: linear_logprobs(x, weight, labels, bias=bias, backend=backend.name), hidden
    )


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_out_of_range(backend: Backend, label: int) -> None:
    if backend.device != "cpu":
        pytest.skip("on a GPU labels are checked with FASTRLHF_DEBUG=1 only")
    with pytest.raises(IndexError, match=rf"labels must be in \[0, 7\) .* got {label}"):
        linear_logprobs(
            torch.zeros(2, 4), torch.zeros(7, 4), torch.tensor([0, label]), backend=backend.name
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 5)}, r"weight must have shape \(7, 5\), got \(7, 4\)"),
        ({"weight": torch.zeros(0, 4)}, r"weight must have shape \(V, H\), V >= 1"),
        ({"labels": torch.zeros(3).long()}, r"labels must have shape \(2,\), got \(3,\)"),
        ({"labels": torch.zeros(2)}, "labels must be int64 or int32"),
        ({"bias": torch.zeros(6)}, r"bias must have shape \(7,\), got \(6,\)"),
        ({"softcap": 0.0}, "softcap must be in"),
        ({"logit_scale": NAN}, "logit_scale must be in"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be above 0"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(2).long()
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)
