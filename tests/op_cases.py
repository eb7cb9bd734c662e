"""A plain call of every op, by argument name: what the tests that go over all ops start from.

An op without a call here fails tests/test_errors_table.py.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrlhf_kernels

# Rows, sequences, time, hidden size, vocabulary: none a multiple of a vector or of a tile.
N, B, T, H, V = 23, 5, 37, 19, 251


@dataclasses.dataclass(frozen=True)
class Call:
    """An op's arguments, and the names of those that it is differentiable in, or writes.

    A call copies what the op writes in place: these copies are then its result.
    """

    op: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    written: tuple[str, ...] = ()

    def __call__(self, backend: str | None = None, **changes: Any) -> Any:
        function = getattr(fastrlhf_kernels, self.op)
        return self._result(function, {**self.arguments, **changes, "backend": backend})

    def reference(self, **changes: Any) -> Any:
        module = importlib.import_module(f"fastrlhf_kernels.{self.op}")
        return self._result(getattr(module, f"{self.op}_ref"), {**self.arguments, **changes})

    def _result(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        for name in self.written:
            if isinstance(arguments[name], Tensor):
                arguments[name] = arguments[name].clone()
        result = function(**arguments)
        return tuple(arguments[name] for name in self.written) if self.written else result


class Inputs:
    """Fixed inputs on a device. Floats are rounded to the dtype; the next ones asked for differ."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(shape, generator=self.generator)
        return x.to(self.device, self.dtype)

    def logprobs(self, *shape: int) -> Tensor:
        return -self.floats(*shape).abs()

    def near(self, x: Tensor, scale: float = 0.1) -> Tensor:
        """A neighbour of `x`, as the policy is one of its reference."""
        return x + self.floats(*x.shape, scale=scale)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def labels(self, *shape: int) -> Tensor:
        labels = self.integers(0, V, *shape)
        labels[::7] = -100
        return labels

    def mask(self) -> Tensor:
        """(B, T): rows of different length, one of them empty, one with a hole."""
        lengths = self.integers(1, T + 1, B, 1)
        lengths[2] = 0
        mask = torch.arange(T, device=self.device) < lengths
        mask[0, 1] = False
        return mask


def _rollout(x: Inputs) -> dict[str, Any]:
    logprobs = x.logprobs(B, T)
    return {
        "logprobs": logprobs,
        "ref_logprobs": x.near(logprobs),
        "values": x.floats(B, T),
        "scores": x.floats(B),
        "mask": x.mask(),
        "beta": 0.05,
    }


def _policy(x: Inputs) -> dict[str, Any]:
    old = x.logprobs(B, T)
    return {
        "logprobs": x.near(old, 0.3),
        "old_logprobs": old,
        "advantages": x.floats(B, T),
        "mask": x.mask(),
    }


def _values(x: Inputs) -> dict[str, Any]:
    old = x.floats(B, T)
    return {
        "values": x.near(old, 0.3),
        "old_values": old,
        "returns": x.near(old, 0.5),
        "mask": x.mask(),
    }


def _heads(x: Inputs) -> dict[str, Any]:
    return {
        "hidden": x.floats(N, H),
        "weight": x.floats(V, H, scale=H**-0.5),
        "labels": x.labels(N),
        "bias": x.floats(V),
    }


def _head_of_ppo(x: Inputs) -> dict[str, Any]:
    heads = _heads(x)
    return {
        **heads,
        "old_logprobs": x.logprobs(N) - 5.0,
        "advantages": x.floats(N),
        "mask": heads["labels"] >= 0,
        "entropy_coef": 0.01,
    }


def _cache(x: Inputs) -> dict[str, Any]:
    """Two heads in six pages of five slots; every seventh token is skipped."""
    slots = torch.randperm(30, generator=x.generator)[:N].to(x.device)
    slots[::7] = -1
    return {
        **{name: x.floats(N, 2, H) for name in ("k", "v")},
        **{name: x.floats(6, 5, 2, H) for name in ("k_cache", "v_cache")},
        "slots": slots,
    }


def _attention(x: Inputs) -> dict[str, Any]:
    """Six heads over two; pages of seven tokens, lengths on both sides of a page and of a split."""
    lengths = torch.tensor([0, 1, 7, 150, 300], dtype=torch.int32, device=x.device)
    return {
        "q": x.floats(B, 6, H),
        **{name: x.floats(50, 7, 2, H) for name in ("k_cache", "v_cache")},
        "block_tables": x.integers(0, 50, B, 44).int(),
        "seq_lens": lengths,
        "sinks": x.floats(6),
    }


HEADS = ("hidden", "weight", "bias")
WRITTEN = {"append_kv": ("k_cache", "v_cache")}
CALLS: dict[str, tuple[Callable[[Inputs], dict[str, Any]], tuple[str, ...]]] = {
    "append_kv": (_cache, ()),
    "decode_attention": (_attention, ()),
    "gae": (
        lambda x: {"rewards": x.floats(B, T), "values": x.floats(B, T), "mask": x.mask()},
        (),
    ),
    "gae_varlen": (
        lambda x: {
            "rewards": x.floats(60),
            "values": x.floats(60),
            "cu_seqlens": torch.tensor([0, 11, 11, 12, 60], device=x.device),
        },
        (),
    ),
    "kl_divergence": (
        lambda x: {"p_logits": x.floats(N, V), "q_logits": x.floats(N, V)},
        ("p_logits", "q_logits"),
    ),
    "kl_penalty": (
        lambda x: {
            "logprobs": x.logprobs(B, T),
            "ref_logprobs": x.logprobs(B, T),
            "estimator": "k3",
        },
        ("logprobs", "ref_logprobs"),
    ),
    "linear_cross_entropy": (_heads, HEADS),
    "linear_logprobs": (_heads, HEADS),
    "linear_ppo_loss": (_head_of_ppo, HEADS),
    "logprobs_from_logits": (
        lambda x: {"logits": x.floats(N, V), "labels": x.labels(N), "return_entropy": True},
        ("logits",),
    ),
    "policy_loss": (_policy, ("logprobs",)),
    "ranking_loss": (
        lambda x: {
            "scores": x.floats(20),
            "ranks": x.integers(0, 5, 20),
            "group_sizes": torch.tensor([9, 1, 0, 4, 6], device=x.device),
        },
        ("scores",),
    ),
    "rollout_advantages": (_rollout, ()),
    "sample": (
        lambda x: {
            "logits": x.floats(N, V),
            "seeds": x.integers(0, 2**40, N),
            "positions": x.integers(0, 1000, N),
        },
        (),
    ),
    "shape_rewards": (
        lambda x: {
            "scores": x.floats(B),
            "kl": x.floats(B, T),
            "mask": x.mask(),
            "beta": 0.05,
            "clip": 1.0,
        },
        ("scores", "kl"),
    ),
    "value_loss": (_values, ("values",)),
    "whiten": (lambda x: {"x": x.floats(B, T), "mask": x.mask()}, ()),
}


def call_of(op: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    """The op's call with floating arguments of this dtype; the same numbers in every dtype."""
    assert op in CALLS, f"tests/op_cases.py has no call of {op}"
    arguments, differentiable = CALLS[op]
    return Call(op, arguments(Inputs(dtype, device)), differentiable, WRITTEN.get(op, ()))


def floating(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with every floating tensor in another dtype."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def tensors(result: Any) -> list[Tensor]:
    """The floating tensors of an op's result, in order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    parts = result.values() if isinstance(result, dict) else result
    return [x for part in parts for x in tensors(part)]


def with_gradients(
    function: Callable[..., Any], call: Call, arguments: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of a sum of them with uneven weights."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in call.differentiable}
    results = tensors(function(**{**arguments, **leaves}))
    if not leaves:
        return results, []
    total = sum(
        (y * torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum()
        for y in results
        if y.requires_grad
    )
    return [y.detach() for y in results], list(torch.autograd.grad(total, list(leaves.values())))
