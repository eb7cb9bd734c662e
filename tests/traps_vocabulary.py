"""Traps of the ops over a vocabulary: log-probs, the linear heads, sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from oracle import assert_same_bits
from torch import Tensor
from traps import INF, NAN, Op, close, noise, trap

from fastrlhf_kernels import SampleOutput

# ---- log-probs


def naive_online(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """An online maximum over blocks, without a guard for a block of nothing but -inf."""
    m = torch.full(logits.shape[:1], -INF, device=logits.device)
    total = torch.zeros_like(m)
    for block in logits.float().split(64, dim=1):
        larger = torch.maximum(m, block.amax(1))
        total = total * (m - larger).exp() + (block - larger[:, None]).exp().sum(1)
        m = larger
    return logits.gather(1, labels[:, None])[:, 0] - m - total.log()


@trap("logprobs_from_logits", naive_online)
def first_block_of_nothing_but_minus_infinity(op: Op, device: str) -> None:
    logits = noise(2, 4200)
    logits[0, :4100] = -INF
    labels = torch.tensor([4150, 3])
    wanted = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    close(op(logits.to(device), labels.to(device)), wanted)


def naive_entropy(logits: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)  # 0 * -inf


@trap("logprobs_from_logits", naive_entropy)
def entropy_beside_minus_infinity(op: Op, device: str) -> None:
    logits = torch.tensor([[0.0, 0.0, -INF, -INF]], device=device)
    _, entropy = op(logits, torch.tensor([0], device=device), return_entropy=True)
    close(entropy, torch.tensor([math.log(2.0)]))


def naive_log_softmax(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


@trap("logprobs_from_logits", naive_log_softmax)
def certainty_keeps_its_digits(op: Op, device: str) -> None:
    """p -> 1: the log-prob is minus what is left, and so is the gradient's largest entry."""
    logits = torch.full((1, 101), -25.0, device=device)
    logits[0, 7] = 0.0
    logits.requires_grad_()
    logprob = op(logits, torch.tensor([7], device=device))
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    left = 100 * math.exp(-25.0)
    close(logprob, torch.tensor([-math.log1p(left)]))
    close(gradient[0, 7], torch.tensor(left / (1 + left)))


def naive_scale_first(logits: Tensor, labels: Tensor, temperature: float, **_: Any) -> Tensor:
    """The temperature folded into the load, before the maximum is subtracted."""
    return naive_log_softmax(logits.float() * (1.0 / temperature), labels)


@trap("logprobs_from_logits", naive_scale_first)
def offset_of_1e4(op: Op, device: str) -> None:
    logits, labels = noise(3, 97) + 1e4, torch.tensor([1, 50, 96])
    wanted = (logits.double() / 0.7).log_softmax(1).gather(1, labels[:, None])[:, 0]
    close(op(logits.to(device), labels.to(device), temperature=0.7), wanted, 1e-6, 1e-6)


def naive_whole_tiles(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return naive_log_softmax(logits[:, : max(logits.shape[1] // 16 * 16, 1)], labels)


@trap("logprobs_from_logits", naive_whole_tiles)
def one_token_and_primes(op: Op, device: str) -> None:
    for V in (1, 2, 13, 1021):
        logits, labels = noise(2, V), torch.tensor([0, V // 3])
        wanted = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
        close(op(logits.to(device), labels.to(device)), wanted, 1e-5, 1e-7)


def naive_int32_offsets(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    N, V = logits.shape
    rows = []
    for n in range(N):
        offset = (n * logits.stride(0) + 2**31) % 2**32 - 2**31  # what 32 bits keep
        if offset < 0:  # before the tensor: a crash, or whatever lies there
            return torch.full((N,), NAN)
        rows.append(logits.as_strided((V,), (1,), offset))
    return naive_log_softmax(torch.stack(rows), labels)


@trap("logprobs_from_logits", naive_int32_offsets)
def second_row_past_two_to_31(op: Op, device: str) -> None:
    V = 41
    buffer = torch.empty(2**31 + V, dtype=torch.bfloat16, device=device)  # pages unread are not had
    logits = buffer.as_strided((2, V), (2**31, 1))
    logits.copy_(noise(2, V))
    labels = torch.tensor([3, 40], device=device)
    close(op(logits, labels), naive_log_softmax(logits.double(), labels))


class ReadsUpstreamAsIfDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return naive_log_softmax(logits, labels)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        n = labels.numel()
        memory = upstream.as_strided((upstream.untyped_storage().nbytes() // 4,), (1,), 0)
        past_the_end = torch.full((n,), NAN)
        dense = torch.cat([memory, past_the_end])[:n, None]
        one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
        return dense * (one_hot - logits.softmax(1)), None


def naive_dense_upstream(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return ReadsUpstreamAsIfDense.apply(logits, labels)


@trap("logprobs_from_logits", naive_dense_upstream)
def upstream_gradient_of_stride_0(op: Op, device: str) -> None:
    logits = noise(5, 17).to(device).requires_grad_()
    labels = torch.tensor([0, 4, 8, 12, 16], device=device)
    (gradient,) = torch.autograd.grad(op(logits, labels).sum(), logits)  # sum's is expanded
    one_hot = torch.nn.functional.one_hot(labels, 17)
    close(gradient, one_hot - logits.detach().double().softmax(1), 1e-5, 1e-7)


def naive_maximum_of_all(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    shifted = logits - logits.max()
    return shifted.gather(1, labels[:, None])[:, 0] - shifted.exp().sum(1).log()


@trap("logprobs_from_logits", naive_maximum_of_all)
def a_row_has_the_bits_that_it_has_alone(op: Op, device: str) -> None:
    logits, labels = noise(33, 1031).to(device), torch.arange(33, device=device)
    logits *= torch.linspace(1.0, 9.0, 33, device=device)[:, None]
    together = op(logits, labels)
    for n in (0, 16, 32):
        assert_same_bits(op(logits[n : n + 1], labels[n : n + 1])[0], together[n])


def naive_any_label(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return naive_log_softmax(logits, labels.clamp(0, logits.shape[1] - 1))


@trap("logprobs_from_logits", naive_any_label)
def labels_out_of_range(op: Op, device: str) -> None:
    if device != "cpu":
        return  # the check would wait for the GPU: in debug mode only
    for label in (5, -1, 2**40):
        raised = None
        try:
            op(noise(2, 5), torch.tensor([0, label]))
        except IndexError as error:
            raised = error
        assert str(label) in str(raised)


# ---- the heads


def naive_head(hidden: Tensor, weight: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """Ignored rows multiplied away after the product."""
    valid = (labels != -100).float()
    logits = hidden @ weight.T
    return naive_log_softmax(logits, labels.clamp(min=0)) * valid


@trap("linear_logprobs", naive_head)
def nan_in_an_ignored_row(op: Op, device: str) -> None:
    hidden, weight = noise(4, 6).to(device), noise(11, 6, seed=1).to(device).requires_grad_()
    hidden[1] = NAN
    labels = torch.tensor([3, -100, 10, 0], device=device)
    found = op(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert float(found[1].detach()) == 0.0
    assert bool(gradient.isfinite().all())


def naive_mean(hidden: Tensor, weight: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels)


@trap("linear_cross_entropy", naive_mean)
def every_label_ignored(op: Op, device: str) -> None:
    hidden, weight = noise(4, 6).to(device), noise(11, 6, seed=1).to(device).requires_grad_()
    loss = op(hidden, weight, torch.full((4,), -100, device=device))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(loss.detach()) == 0.0
    assert bool((gradient == 0).all())


# ---- sampling


def naive_sample(logits: Tensor, seeds: Tensor, positions: Tensor, top_k: int = 0, **_: Any) -> Any:
    """Inverse CDF over fp32 probabilities, top-k by threshold, so that ties are all kept."""
    logits = logits.float()
    if top_k:
        limit = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < limit, -INF)
    p = (logits - logits[:, :1]).exp()  # the first logit, not the largest
    generator = torch.Generator().manual_seed(int(seeds[0]))
    u = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    tokens = torch.searchsorted((p / p.sum(1, keepdim=True)).cumsum(1), u)[:, 0]
    logp = logits.log_softmax(1).gather(1, tokens.clamp(max=logits.shape[1] - 1)[:, None])[:, 0]
    return SampleOutput(tokens, logp, logp)


@trap("sample", naive_sample)
def exactly_k_where_logits_tie(op: Op, device: str) -> None:
    logits = torch.zeros(64, 8, device=device)
    n = torch.arange(64, device=device)
    tokens = op(logits, n, n, top_k=3).tokens
    assert int(tokens.max()) < 3  # ties go to the lower id


@trap("sample", naive_sample)
def tokens_after_a_block_of_minus_infinity(op: Op, device: str) -> None:
    logits = torch.full((16, 2100), -INF, device=device)
    logits[:, 2050:2060] = 3.0
    n = torch.arange(16, device=device)
    found = op(logits, n, n)
    assert bool(((found.tokens >= 2050) & (found.tokens < 2060)).all())
    close(found.logprobs, torch.full((16,), -math.log(10.0)))
