"""kl_divergence against the definition in fp64, and what trips it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_second_derivative_raises
from oracle import Backend, assert_accurate, assert_same_bits
from torch import Tensor

from fastrlhf_kernels import available_backends, kl_divergence
from fastrlhf_kernels.kl_divergence import kl_divergence_ref

OP = "kl_divergence"
INF, NAN = float("inf"), float("nan")


def oracle(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """sum p (log p - log q) by log_softmax in fp64; 0 where p is 0."""
    log_p = (p_logits.double() / temperature).log_softmax(-1)
    log_q = (q_logits.double() / temperature).log_softmax(-1)
    some = log_p > -INF
    ratio = torch.where(some, log_p, 0.0) - torch.where(some, log_q, 0.0)
    return (torch.where(some, log_p, -INF).exp() * ratio).sum(-1)


def oracle_gradients(p_logits: Tensor, q_logits: Tensor, temperature: float) -> list[Tensor]:
    """Their formulas, for upstream gradients of 1, and the size of the terms of the first."""
    log_p = (p_logits.double() / temperature).log_softmax(-1)
    log_q = (q_logits.double() / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(log_p == -INF, 0.0, log_p - log_q)
    kl = (p * ratio).sum(-1, keepdim=True)
    sizes = p * (ratio.abs() + kl) / temperature
    return [p * (ratio - kl) / temperature, (q - p) / temperature, sizes]


def run(function, p: Tensor, q: Tensor, **settings) -> list[Tensor]:
    """The KL and both gradients, for upstream gradients of 1."""
    p, q = p.detach().clone().requires_grad_(), q.detach().clone().requires_grad_()
    kl = function(p, q, **settings)
    return [kl.detach(), *torch.autograd.grad(kl, [p, q], torch.ones_like(kl))]


def case(
    N: int, V: int, backend: Backend, dtype=torch.float32, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = 3.0 * torch.randn(N, V, generator=generator)
    q = p + spread * torch.randn(N, V, generator=generator)
    return p.to(dtype).to(backend.device), q.to(dtype).to(backend.device)


def check(backend: Backend, p: Tensor, q: Tensor, temperature: float = 1.0) -> list[Tensor]:
    actual = run(kl_divergence, p, q, temperature=temperature, backend=backend.name)
    reference = run(kl_divergence_ref, p, q, temperature=temperature)
    kl = oracle(p, q, temperature)
    dp, dq, size = oracle_gradients(p, q, temperature)
    for a, r, o in zip(actual, reference, [kl, dp, dq], strict=True):
        # p_j (w_j - KL): the two terms may cancel
        terms = {"terms": size.cpu()} if o is dp else {}
        assert_accurate(a, r, o, interpreted=backend.interpreted, **terms)
    return actual


@given(
    N=st.sampled_from([0, 8]),
    V=st.sampled_from([1, 2, 7, 16, 31, 163, 257]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    spread=st.sampled_from([0.3, 1.0, 6.0]),
    infinite=st.sampled_from(["none", "both", "p"]),
    seed=st.integers(0, 99),
)
def test_matches_definition(
    backend: Backend, N, V, dtype, temperature, spread, infinite, seed
) -> None:
    p, q = case(min(N, 3) if backend.interpreted else N, V, backend, dtype, seed, spread)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(p.shape, generator=generator) < 0.4
    hidden[:, seed % V] = False
    if infinite != "none":
        p = p.masked_fill(hidden.to(p.device), -INF)
    if infinite == "both":
        q = q.masked_fill(hidden.to(q.device), -INF)
    check(backend, p, q, temperature)


@pytest.mark.parametrize("V", [2053, 4096, 4099, 8209])  # about the tiles' widths
def test_wide_rows(backend: Backend, V: int) -> None:
    p, q = case(2, V, backend)
    check(backend, p, q)
    p[0, : V - 3] = q[0, : V - 3] = -INF  # tiles of nothing but -inf come first
    p[1, : V - 3] = -INF
    check(backend, p, q, 0.7)


@pytest.mark.parametrize("offsets", [(1e4, 1e4), (1e4, -1e4), (-3e4, 5.0)])
def test_offsets_cost_nothing(backend: Backend, offsets: tuple[float, float]) -> None:
    p, q = case(3, 163, backend)
    check(backend, p + offsets[0], q + offsets[1], 0.7)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 3e-7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_nearly_equal_rows(backend: Backend, size: float, temperature: float) -> None:
    """The KL and its gradients keep their relative precision; 3e-7 is a few units in the last."""
    p, _ = case(4, 1031, backend)
    generator = torch.Generator().manual_seed(1)
    q = p + size * torch.randn(p.shape, generator=generator).to(p.device)
    kl, dp, dq = run(kl_divergence, p, q, temperature=temperature, backend=backend.name)
    # In fp64 w is good to 1e-16 and at least 1e-9 in size; its series needs no more terms.
    log_p, log_q = ((z.double() / temperature).log_softmax(-1) for z in (p, q))
    w, mass = log_p - log_q, log_p.exp()
    small = w * w * (0.5 - w / 6.0 + w * w / 24.0 - w**3 / 120.0)
    expected = (mass * small).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=3e-6, atol=0.0)
    wanted = [mass * (w - expected[:, None]) / temperature, mass * (small - w) / temperature]
    for found, gradient in zip((dp, dq), wanted, strict=True):
        error = (found.double() - gradient).norm(dim=-1) / gradient.norm(dim=-1)
        assert float(error.max()) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows(backend: Backend, dtype: torch.dtype) -> None:
    """0, and no gradient, to the last bit."""
    p, _ = case(3, 163, backend, dtype)
    p[1, 5:] = -INF
    for x in run(kl_divergence, p, p, temperature=0.7, backend=backend.name):
        assert not x.any()


def test_certain_rows(backend: Backend) -> None:
    """p -> 1 in both: KL of what is left, which keeps its relative precision."""
    p = torch.zeros(3, 5, device=backend.device)
    q = torch.zeros(3, 5, device=backend.device)
    p[:, 2] = torch.tensor([20.0, 40.0, 60.0])
    q[:, 2] = torch.tensor([21.0, 43.0, 50.0])
    kl = kl_divergence(p, q, backend=backend.name)
    a, b = 4.0 * (-p[:, 2].double()).exp(), 4.0 * (-q[:, 2].double()).exp()  # the odds of the rest
    top = b.log1p() - a.log1p()  # log-ratio of the certain token
    rest = top + (q[:, 2] - p[:, 2]).double()
    # sum of the four terms that are not negative, as in the specification
    expected = a / (1 + a) * (rest + torch.expm1(-rest)) + (top * top / 2) / (1 + a)
    torch.testing.assert_close(kl.double(), expected, rtol=4e-6, atol=0.0)


def test_zero_probabilities(backend: Backend) -> None:
    p, q = case(4, 7, backend)
    p[0, 1] = q[0, 1] = -INF  # in both: as if the column were not there
    p[1, 1] = -INF  # p = 0, q > 0: adds nothing
    q[2, 1] = -INF  # q = 0, p > 0: infinite
    p[3, 2], q[3, 1] = 300.0, -INF  # p underflows and is not 0
    kl, dp, dq = run(kl_divergence, p, q, backend=backend.name)
    assert_accurate(kl, kl_divergence_ref(p, q), oracle(p, q))
    assert float(kl[2]) == float(kl[3]) == INF
    for x in (dp, dq):
        assert bool(x[:2].isfinite().all())
        assert not bool(x[2:].isfinite().all())
    assert float(dp[0, 1]) == float(dq[0, 1]) == float(dp[1, 1]) == 0.0
    columns = [0, 2, 3, 4, 5, 6]
    alone = run(kl_divergence, p[:1, columns], q[:1, columns], backend=backend.name)
    torch.testing.assert_close(kl[:1], alone[0], rtol=1e-6, atol=1e-7)
    if backend.name != "ref":  # no gradient flows out of a row that none flows into
        a, b = p.clone().requires_grad_(), q.clone().requires_grad_()
        found = kl_divergence(a, b, backend=backend.name)
        weights = torch.tensor([1.0, 1.0, 0.0, 0.0], device=p.device)
        for x in torch.autograd.grad(found, [a, b], weights):
            assert bool(x.isfinite().all())
            assert not x[2:].any()


def test_bad_rows_harm_no_other(backend: Backend) -> None:
    p, q = case(8, 163, backend)
    clean = run(kl_divergence, p, q, backend=backend.name)
    p[0, 5], p[1, 7], q[3, 5], q[4, 7] = NAN, INF, NAN, INF
    p[2] = q[5] = -INF
    found = run(kl_divergence, p, q, backend=backend.name)
    assert bool(found[0][:6].isnan().all())
    assert bool(found[1][:6].isnan().any(-1).all())
    assert bool(found[2][:6].isnan().any(-1).all())
    for x, y in zip(found, clean, strict=True):
        assert_same_bits(x[6:], y[6:])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2), (2, 0, 3)])
def test_leading_dimensions(backend: Backend, shape: tuple[int, ...]) -> None:
    p, q = case(12, 31, backend)
    n = 1
    for size in shape:
        n *= size
    check(backend, p[:n].reshape(*shape, 31), q[:n].reshape(*shape, 31))


def test_strides(backend: Backend) -> None:
    """Slices, transposes, expanded views, and upstream gradients with gaps or of stride 0."""
    p, q = (x.reshape(2, 3, 37) for x in case(6, 37, backend))
    views = [
        (p[:, :-1], q[:, 1:]),
        (p.transpose(0, 1), q.transpose(0, 1)),
        (p[:, :1].expand(2, 3, 37), q),
        (p[..., ::2], q[..., 1::2].repeat(1, 1, 2)[..., :19]),
        (p[..., :1].expand(2, 3, 37), q),
    ]
    for x, y in views:
        dense = run(kl_divergence, x.contiguous(), y.contiguous(), backend=backend.name)
        a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
        kl = kl_divergence(a, b, backend=backend.name)
        for upstream in (kl.sum(), (kl.unsqueeze(-1) * torch.ones(2).to(kl))[..., 0].sum()):
            found = torch.autograd.grad(upstream, [a, b], retain_graph=True)
            for u, v in zip((kl.detach(), *found), dense, strict=True):
                assert_same_bits(u, v)


def test_one_gradient_at_a_time(backend: Backend) -> None:
    p, q = case(3, 37, backend)
    _, dp, dq = run(kl_divergence, p, q, backend=backend.name)
    a, b = p.clone().requires_grad_(), q.clone().requires_grad_()
    (found,) = torch.autograd.grad(kl_divergence(a, q, backend=backend.name).sum(), a)
    assert_same_bits(found, dp)
    (found,) = torch.autograd.grad(kl_divergence(p, b, backend=backend.name).sum(), b)
    assert_same_bits(found, dq)


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    """One row, 33 rows, one thread, four: the same bits."""
    N, V = (5, 5003) if backend.interpreted else (33, 50257)
    p, q = case(N, V, backend)
    if backend.name == "ref":
        N, p, q = 0, p[:0], q[:0]  # torch's sums promise no such thing
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = run(kl_divergence, p, q, temperature=0.7, backend=backend.name)
        again = run(kl_divergence, p, q, temperature=0.7, backend=backend.name)
        torch.set_num_threads(1)
        for n in {0, N // 2, N - 1} & set(range(N)):
            one = slice(n, n + 1)
            alone = run(kl_divergence, p[one], q[one], temperature=0.7, backend=backend.name)
            for x, y in zip(together, alone, strict=True):
                assert_same_bits(x[one], y)
    finally:
        torch.set_num_threads(before)
    for x, y in zip(together, again, strict=True):
        assert_same_bits(x, y)


# 4 GiB of addresses; on a CPU only the pages that hold a row are ever touched.
def test_offsets_past_two_to_31(backend: Backend) -> None:
    V, far = 163, 2**31
    storage = torch.empty(far + V, dtype=torch.bfloat16, device=backend.device)
    p = storage.as_strided((2, V), (far, 1))
    near, q = case(2, V, backend, torch.bfloat16)
    p.copy_(near)
    for x, y in ((p, q), (q, p)):
        found = kl_divergence(x, y, backend=backend.name)
        assert_same_bits(found, kl_divergence(x.clone(), y.clone(), backend=backend.name))


@pytest.mark.parametrize("name", sorted({"ref", "cpu"} & set(available_backends())))
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).unbind()

    def function(p: Tensor, q: Tensor) -> Tensor:
        return kl_divergence(p, q, temperature=0.6, backend=name)

    assert torch.autograd.gradcheck(function, (p.requires_grad_(), q.requires_grad_()))
    torch.testing.assert_close(function(p, q), oracle(p, q, 0.6), rtol=1e-13, atol=1e-14)


def test_opcheck_and_compile(backend: Backend) -> None:
    p, q = (x.requires_grad_() for x in case(4, 37, backend))
    if backend.name != "ref":
        op = torch.ops.fastrlhf.kl_divergence.default
        torch.library.opcheck(op, (p, q, 0.7, backend.name))
        torch.library.opcheck(op, (p.view(2, 2, 37), q.detach().view(2, 2, 37), 1.0, backend.name))

    def step(p: Tensor, q: Tensor) -> Tensor:
        return kl_divergence(2.0 * p, q, temperature=0.7, backend=backend.name)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, eager = compiled(p, q), step(p, q)
    assert_same_bits(found, eager)
    for x, y in zip(
        torch.autograd.grad(found.sum(), [p, q]),
        torch.autograd.grad(eager.sum(), [p, q]),
        strict=True,
    ):
        assert_same_bits(x, y)


@pytest.mark.not_on("ref", "the reference has second derivatives")
def test_second_derivative_raises(backend: Backend) -> None:
    p, q = case(2, 7, backend)
    assert_second_derivative_raises(lambda x: kl_divergence(x, q, backend=backend.name), p)


def test_arguments_keep_their_values(backend: Backend) -> None:
    p, q = case(3, 20, backend)
    before = p.clone(), q.clone()
    a, b = p.requires_grad_(), q.requires_grad_()
    kl_divergence(a, b, backend=backend.name).sum().backward()
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_logits": torch.zeros(2, 7).long()}, "p_logits must be fp32, bf16, fp16 or fp64"),
        ({"p_logits": torch.zeros(2, 0)}, r"p_logits must have shape \(\.\.\., V\), got \(2, 0\)"),
        ({"q_logits": torch.zeros(2, 8)}, r"q_logits must have shape \(2, 7\), got \(2, 8\)"),
        ({"q_logits": torch.zeros(2, 7).double()}, "q_logits must be torch.float32 like p_logits"),
        ({"q_logits": None}, "q_logits must be a tensor"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"temperature": torch.ones(2)}, "temperature must be a number"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"p_logits": torch.zeros(2, 7), "q_logits": torch.zeros(2, 7)} | change
    with pytest.raises(ValueError, match=message):
        kl_divergence(**arguments)
