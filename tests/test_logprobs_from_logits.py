"""logprobs_from_logits against log_softmax in fp64, and what trips such kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_second_derivative_raises
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import available_backends, logprobs_from_logits
from fastrlhf_kernels.logprobs_from_logits import logprobs_from_logits_ref

OP = "logprobs_from_logits"
INF, NAN = float("inf"), float("nan")


def oracle(
    logits: Tensor, labels: Tensor, temperature=1.0, softcap=None, ignore_index=-100
) -> tuple[Tensor, Tensor]:
    """The definition, by log_softmax in fp64; for rows without NaN, +inf or nothing but -inf."""
    z = logits.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.double()[..., None] if isinstance(temperature, Tensor) else temperature)
    many = labels if labels.dim() == logits.dim() else labels[..., None]
    valid = many != ignore_index
    z = torch.where(valid.any(-1, keepdim=True), z, 0.0)
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, torch.where(valid, many, 0)).where(valid, 0.0)
    finite = torch.where(z == -INF, 0.0, log_p)
    entropy = -(log_p.exp() * finite).sum(-1).where(valid.any(-1), 0.0)
    return logprobs.reshape(labels.shape), entropy


def run(function, logits: Tensor, *args, seed: int = 0, **settings) -> list[Tensor]:
    """Log-probs, entropy, and the gradient of a random function of both."""
    x = logits.detach().clone().requires_grad_()
    results = function(x, *args, **settings)
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results
    ]
    leads = [i for i, r in enumerate(results) if r.requires_grad]  # no label: no gradient
    if not leads:
        return [*results, torch.zeros_like(x)]
    (dx,) = torch.autograd.grad([results[i] for i in leads], x, [upstream[i] for i in leads])
    return [*(r.detach() for r in results), dx]


def check(backend: Backend, logits: Tensor, labels: Tensor, **settings) -> list[Tensor]:
    """Values and gradients against the oracle, by the rule of oracle.py."""
    actual = run(
        logprobs_from_logits,
        logits,
        labels,
        return_entropy=True,
        backend=backend.name,
        **settings,
    )
    reference = run(logprobs_from_logits_ref, logits, labels, return_entropy=True, **settings)
    expected = run(oracle, logits.double(), labels, **settings)
    for a, r, o in zip(actual, reference, expected, strict=True):
        assert_accurate(a, r, o, interpreted=backend.interpreted)
    return actual


def case(
    N: int, V: int, backend: Backend, K: int | None = None, dtype=torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(N, V, generator=generator)
    labels = torch.randint(0, V, (N,) if K is None else (N, K), generator=generator)
    return logits.to(dtype).to(backend.device), labels.to(backend.device)


@given(
    N=st.sampled_from([0, 12]),  # in a few rows the reference may be right by chance
    V=st.sampled_from([1, 2, 7, 16, 31, 163, 257]),
    K=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    label_dtype=st.sampled_from([torch.int64, torch.int32]),
    temperature=st.sampled_from([1.0, 0.3, 2.5, "rows"]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    infinite=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, N, V, K, dtype, label_dtype, temperature, softcap, infinite, seed
) -> None:
    if backend.interpreted:
        N = min(N, 6)  # some 40 ms a row
    logits, labels = case(N, V, backend, K, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(N, V, generator=generator) < infinite
    hidden[:, seed % V] = False
    logits = logits.masked_fill(hidden.to(logits.device), -INF)
    labels[torch.rand(labels.shape, generator=generator).to(labels.device) < 0.2] = -100
    if temperature == "rows":
        temperature = (torch.rand(N, generator=generator) + 0.5).to(logits.device)
    check(backend, logits, labels.to(label_dtype), temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("V", [2053, 4096, 4099, 8209])  # about the tiles' widths
def test_wide_rows(backend: Backend, V: int) -> None:
    logits, labels = case(2, V, backend)
    labels[1] = V - 1
    logits[1, : V - 3] = -INF  # tiles of nothing but -inf come first
    check(backend, logits, labels)
    check(backend, logits, labels, softcap=5.0, temperature=0.7)


def test_running_maximum(backend: Backend) -> None:
    """New maxima in every block, none after the first, and equals of the maximum in several."""
    V = 4499
    logits, labels = case(4, V, backend)
    slope = torch.linspace(0.0, 30.0, V, device=backend.device)
    logits[0] = 0.1 * logits[0] + slope
    logits[1] = 0.1 * logits[1] - slope
    logits[2, 10::1000] = 20.0
    logits[3] = 1.5
    check(backend, logits, labels)
    check(backend, logits, labels, temperature=0.4)


def test_bad_values_among_infinities(backend: Backend) -> None:
    """A NaN or a +inf is seen where all before it is -inf, and where all after it is."""
    V, device = 4499, backend.device
    places = [(value, at) for value in (NAN, INF) for at in (5, 600, V - 1)]
    logits = torch.full((len(places), V), -INF, device=device)
    for row, (value, at) in zip(logits, places, strict=True):
        row[at] = value
    logits = torch.cat([logits, logits])
    logits[len(places) :, V // 2] = 1.0
    labels = torch.full((len(logits),), V // 2, device=device)
    settings = {"return_entropy": True, "backend": backend.name}
    for dtype in (torch.float32, torch.bfloat16):
        for x in run(logprobs_from_logits, logits.to(dtype), labels, **settings):
            assert bool(x.isnan().all())


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e4, 1e30, 1e37])
def test_extreme_temperatures(backend: Backend, temperature: float) -> None:
    """Greedy in the limit, uniform over the tokens that are not at -inf."""
    logits, labels = case(3, 163, backend)
    logits[1, 1::2] = -INF
    labels[1] = 0
    check(backend, logits, labels, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.not_on("ref", "a path of the C++ alone")
@pytest.mark.not_on("triton", "a path of the C++ alone")
def test_large_gradients(backend: Backend, dtype: torch.dtype) -> None:
    """From 32 MiB on the C++ stores past the caches, from any alignment: the same bits."""
    V = 50257
    N = -(-(33 << 20) // (V * dtype.itemsize))
    one, label = case(2, V, backend, dtype=dtype)
    logits, labels = one[:1].repeat(N, 1), label[:1].repeat(N)
    logits[N - 1] = one[1]
    labels[N - 1] = label[1]
    settings = {"temperature": 0.7, "return_entropy": True, "backend": backend.name}
    large = run(logprobs_from_logits, logits, labels, **settings)[2]
    x = one.clone().requires_grad_()
    results = logprobs_from_logits(x, label, **settings)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(N, generator=generator, dtype=torch.float64).float() for _ in range(2)]
    for n in (0, 1, N // 2, N - 2):
        weights = [torch.stack([u[n], u[N - 1]]) for u in upstream]
        (dx,) = torch.autograd.grad(results, x, weights, retain_graph=True)
        assert_same_bits(large[[n, N - 1]], dx)


def test_precision_near_certainty(backend: Backend) -> None:
    """-log-prob and 1 - p keep their relative precision down to e^-80."""
    gaps = torch.tensor([1.0, 5.0, 16.5, 20.25, 40.0, 80.0], device=backend.device)
    logits = torch.zeros(6, 5, device=backend.device)
    logits[:, 2] = gaps
    labels = torch.full((6,), 2, device=backend.device)
    x = logits.requires_grad_()
    logprobs, entropy = logprobs_from_logits(x, labels, return_entropy=True, backend=backend.name)
    (dx,) = torch.autograd.grad(logprobs.sum(), x)
    rest = 4.0 * (-gaps.double()).exp()
    torch.testing.assert_close(logprobs.double(), -rest.log1p(), rtol=4e-6, atol=0.0)
    torch.testing.assert_close(dx[:, 2].double(), rest / (1 + rest), rtol=4e-6, atol=0.0)
    expected = rest.log1p() + rest * gaps.double() / (1 + rest)
    torch.testing.assert_close(entropy.double(), expected, rtol=4e-6, atol=0.0)
    assert bool((logprobs <= 0).all())


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offsets_cost_nothing(backend: Backend, offset: float) -> None:
    logits, labels = case(3, 163, backend)
    check(backend, logits + offset, labels, temperature=0.7)


def test_bad_rows_harm_no_other(backend: Backend) -> None:
    logits, labels = case(6, 163, backend)
    settings = {"return_entropy": True, "backend": backend.name}
    clean = run(logprobs_from_logits, logits, labels, **settings)
    logits[0, 5] = NAN
    logits[1] = -INF
    logits[2, 7] = INF
    logits[3] = NAN
    for x, y in zip(run(logprobs_from_logits, logits, labels, **settings), clean, strict=True):
        assert bool(x[:4].isnan().all())
        assert_same_bits(x[4:], y[4:])


def test_infinite_logits_of_labels(backend: Backend) -> None:
    """A label of probability 0 has log-prob -inf, and a gradient that pulls it up."""
    logits, labels = case(1, 7, backend)
    logits[0, labels[0]] = -INF
    logprobs, _, dx = check(backend, logits, labels)
    assert float(logprobs) == -INF
    assert bool(dx.isfinite().all())


def test_ignored_rows(backend: Backend) -> None:
    """Zeros, to the last bit, whatever the row holds."""
    logits, labels = case(5, 163, backend, K=2)
    labels[1] = labels[3] = labels[2, 0] = -1
    clean = run(logprobs_from_logits, logits, labels, ignore_index=-1, return_entropy=True,
                backend=backend.name)  # fmt: skip
    logits[1], logits[3, 4] = NAN, INF
    found = run(logprobs_from_logits, logits, labels, ignore_index=-1, return_entropy=True,
                backend=backend.name)  # fmt: skip
    for x, y in zip(found, clean, strict=True):
        assert_same_bits(x, y)
        assert not x[[1, 3]].any()
    assert float(found[0][2, 0]) == 0.0


@pytest.mark.parametrize("K", [0, 2, 11])
def test_many_labels_a_row(backend: Backend, K: int) -> None:
    """Repeated labels add up; each log-prob is what it is alone."""
    logits, labels = case(3, 19, backend, K)
    if K > 1:
        labels[:, 1] = labels[:, 0]
        labels[2, 0] = -100
    logprobs, entropy, _ = check(backend, logits, labels)
    for k in range(K):
        alone = logprobs_from_logits(logits, labels[:, k].contiguous(), backend=backend.name)
        assert_same_bits(alone, logprobs[:, k])
    if K == 0:
        assert not entropy.any()  # no label, no valid one


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2), (2, 0, 3)])
def test_leading_dimensions(backend: Backend, shape: tuple[int, ...]) -> None:
    logits, labels = case(12, 31, backend)
    n = 1
    for size in shape:
        n *= size
    logits, labels = logits[:n].reshape(*shape, 31), labels[:n].reshape(shape)
    check(backend, logits, labels)
    check(backend, logits, labels[..., None].expand(*shape, 2))


def test_strides(backend: Backend) -> None:
    """Slices, transposes and expanded views give the bits of their contiguous copies."""
    logits, _ = case(12, 37, backend)
    cube = logits.reshape(3, 4, 37)
    labels = torch.arange(12, device=backend.device).reshape(3, 4)
    views = [
        (cube[:, :-1], labels[:, 1:]),
        (cube.transpose(0, 1), labels.T),
        (cube[:, :1].expand(3, 4, 37), labels),
        (cube[..., ::2], labels),
        (cube[..., :1].expand(3, 4, 37), labels),
        (cube.unfold(1, 2, 1).transpose(2, 3), labels[:, :3, None].expand(3, 3, 2)),
    ]
    for x, y in views:
        assert not x.is_contiguous()
        settings = {"return_entropy": True, "backend": backend.name}
        dense = run(logprobs_from_logits, x.contiguous(), y.contiguous(), **settings)
        leaf = x.detach().requires_grad_()
        results = logprobs_from_logits(leaf, y, **settings)
        generator = torch.Generator().manual_seed(0)
        upstream = [
            torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results
        ]
        (dx,) = torch.autograd.grad(results, leaf, upstream)
        for a, b in zip((*results, dx), dense, strict=True):
            assert_same_bits(a.detach(), b)


def test_upstream_strides(backend: Backend) -> None:
    """Stride 0 from sum(), gaps from a slice, and results left unused."""
    logits, labels = case(6, 37, backend)
    x = logits.requires_grad_()
    logprobs, entropy = logprobs_from_logits(x, labels, return_entropy=True, backend=backend.name)
    ones = torch.ones_like(logprobs)
    pairs = [
        (logprobs.sum(), [(logprobs, ones)]),
        (entropy.sum(), [(entropy, ones)]),
        ((logprobs + entropy).sum(), [(logprobs, ones), (entropy, ones)]),
        (logprobs[::2].sum(), [(logprobs, ones * (torch.arange(6).to(ones) % 2 == 0))]),
    ]
    for scalar, dense in pairs:
        (found,) = torch.autograd.grad(scalar, x, retain_graph=True)
        (expected,) = torch.autograd.grad(
            [r for r, _ in dense], x, [g for _, g in dense], retain_graph=True
        )
        assert_same_bits(found, expected)


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    """One row, 33 rows, one thread, four: the same bits."""
    N, V = (5, 5003) if backend.interpreted else (33, 50257)
    logits, labels = case(N, V, backend)
    if backend.name == "ref":
        N, logits, labels = 0, logits[:0], labels[:0]  # torch's sums promise no such thing
    settings = {"temperature": 0.7, "return_entropy": True, "backend": backend.name}

    def all_of(rows: slice) -> list[Tensor]:
        x = logits[rows].detach().requires_grad_()
        results = logprobs_from_logits(x, labels[rows], **settings)
        (dx,) = torch.autograd.grad([r.sum() for r in results], x)
        return [*(r.detach() for r in results), dx]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together, again = all_of(slice(None)), all_of(slice(None))
        torch.set_num_threads(1)
        for n in {0, N // 2, N - 1} & set(range(N)):
            for x, y in zip(together, all_of(slice(n, n + 1)), strict=True):
                assert_same_bits(x[n : n + 1], y)
    finally:
        torch.set_num_threads(before)
    for x, y in zip(together, again, strict=True):
        assert_same_bits(x, y)


def test_temperature_of_rows_is_the_number(backend: Backend) -> None:
    logits, labels = case(3, 37, backend)
    number = run(logprobs_from_logits, logits, labels, temperature=0.7, return_entropy=True,
                 backend=backend.name)  # fmt: skip
    rows = torch.full((3,), 0.7, device=backend.device)
    tensor = run(logprobs_from_logits, logits, labels, temperature=rows, return_entropy=True,
                 backend=backend.name)  # fmt: skip
    if backend.name != "ref":  # torch divides by a number in fp64, by a tensor in fp32
        for x, y in zip(number, tensor, strict=True):
            assert_same_bits(x, y)
    torch.testing.assert_close(number, tensor, rtol=1e-5, atol=1e-6)


# 4 GiB of addresses; on a CPU only the pages that hold a row are ever touched.
def test_offsets_past_two_to_31(backend: Backend) -> None:
    V, far = 163, 2**31
    storage = torch.empty(far + V, dtype=torch.bfloat16, device=backend.device)
    logits = storage.as_strided((2, V), (far, 1))
    near, labels = case(2, V, backend, dtype=torch.bfloat16)
    logits.copy_(near)
    found = logprobs_from_logits(logits, labels, return_entropy=True, backend=backend.name)
    expected = logprobs_from_logits(near, labels, return_entropy=True, backend=backend.name)
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y)
    # The gradient of the view itself would be as large as the storage: the op's own is asked for.
    if backend.name != "ref":
        state = torch.ops.fastrlhf.logprobs_from_logits(
            logits, labels, None, 1.0, 0.0, -100, True, backend.name
        )[2]
        args = (torch.ones(2), torch.ones(2))
        args = tuple(x.to(backend.device) for x in args)
        rest = (labels, state, None, 1.0, 0.0, -100, backend.name)
        backward = torch.ops.fastrlhf.logprobs_from_logits_backward
        assert_same_bits(backward(*args, logits, *rest), backward(*args, near, *rest))


@pytest.mark.parametrize("name", sorted({"ref", "cpu"} & set(available_backends())))
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 4], [2, -100], [1, 1]])
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        found = logprobs_from_logits(
            x, labels, temperature=temperature, softcap=1.5, return_entropy=True, backend=name
        )
        assert all(r.dtype == torch.float64 for r in found)
        return found

    assert torch.autograd.gradcheck(function, logits)
    torch.testing.assert_close(
        function(logits), oracle(logits, labels, temperature, 1.5), rtol=1e-13, atol=1e-13
    )


def test_opcheck_and_compile(backend: Backend) -> None:
    logits, labels = case(4, 37, backend)
    labels[1] = -100
    x = logits.requires_grad_()
    if backend.name != "ref":
        temperature = torch.rand(4, device=backend.device) + 0.5
        for args in (
            (x, labels, None, 0.7, 0.0, -100, True, backend.name),
            (x.view(2, 2, 37), labels.view(2, 2), temperature, 1.0, 3.0, -100, False, backend.name),
        ):
            torch.library.opcheck(torch.ops.fastrlhf.logprobs_from_logits.default, args)

    def step(x: Tensor, y: Tensor) -> Tensor:
        logprobs, entropy = logprobs_from_logits(
            2.0 * x, y, temperature=0.7, softcap=9.0, return_entropy=True, backend=backend.name
        )
        return logprobs - 0.1 * entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (eager_dx,) = torch.autograd.grad(step(x, labels).sum(), x)
    found = compiled(x, labels)
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert_same_bits(found, step(x, labels))
    assert_same_bits(dx, eager_dx)


@pytest.mark.not_on("ref", "the reference has second derivatives")
def test_second_derivative_raises(backend: Backend) -> None:
    logits, labels = case(2, 7, backend)
    assert_second_derivative_raises(
        lambda x: logprobs_from_logits(x, labels, backend=backend.name), logits
    )


def test_arguments_keep_their_values(backend: Backend) -> None:
    logits, labels = case(3, 20, backend)
    before = logits.clone(), labels.clone()
    run(logprobs_from_logits, logits, labels, return_entropy=True, backend=backend.name)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_labels_out_of_range(backend: Backend, label: int) -> None:
    if backend.device != "cpu":
        pytest.skip("on a GPU labels are checked with FASTRLHF_DEBUG=1 only")
    with pytest.raises(IndexError, match=rf"labels must be in \[0, 7\) .* got {label}"):
        logprobs_from_logits(torch.zeros(2, 7), torch.tensor([0, label]), backend=backend.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 7).long()}, "logits must be fp32, bf16, fp16 or fp64"),
        ({"logits": torch.zeros(2, 0)}, r"logits must have shape \(\.\.\., V\), got \(2, 0\)"),
        ({"labels": torch.zeros(2)}, "labels must be int64 or int32"),
        ({"labels": torch.zeros(3).long()}, r"labels must have shape \(2,\) or \(2, 'K'\)"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"temperature": torch.ones(3)}, r"temperature must have shape \(2,\), got \(3,\)"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be in"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(2, 7), "labels": torch.zeros(2).long()} | change
    with pytest.raises(ValueError, match=message):
        logprobs_from_logits(**arguments)
