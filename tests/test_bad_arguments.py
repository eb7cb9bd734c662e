"""Bad arguments, for every argument of every op: one ValueError of one line that names both.

Table-driven: the ops' plain calls of op_cases.py with one argument spoilt. A new op is covered by
its call, a new setting must be entered here. Labels that are out of range are an IndexError, tested
with the ops that take labels.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import call_of
from torch import Tensor

import fastrlhf_kernels
from fastrlhf_kernels import BackendUnavailable, use_backend
from fastrlhf_kernels._aot import ops

NAN, INF = math.nan, math.inf
NO_NUMBER = ("0.5", [0.5], True, 1j)
NO_FLAG = ("yes", 2, None)

# Setting -> values that no op takes. Where one op's limits differ, LIMITS says so.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "beta": (NAN, None, *NO_NUMBER),
    "clip": (-0.1, NAN, *NO_NUMBER),
    "entropy_coef": (NAN, None, *NO_NUMBER),
    "eps": (-1e-8, NAN, None, *NO_NUMBER),
    "estimator": ("k9", "", None, 3),
    "gamma": (-0.1, 1.1, NAN, None, *NO_NUMBER),
    "ignore_index": (1.5, "0", None),
    "lam": (-0.1, 1.1, NAN, None, *NO_NUMBER),
    "logit_scale": (NAN, INF, None, *NO_NUMBER),
    "masked": ("cut", "", None, 3),
    "min_p": (-0.1, 1.1, NAN, None, *NO_NUMBER),
    "normalizer": (0.0, -1.0, NAN, torch.ones(1), torch.tensor(1j), *NO_NUMBER),
    "return_entropy": NO_FLAG,
    "scale": (NAN, INF, *NO_NUMBER),
    "score_clip": (0.0, -1.0, NAN, *NO_NUMBER),
    "shift_mean": NO_FLAG,
    "softcap": (0.0, -1.0, NAN, INF, *NO_NUMBER),
    "temperature": (-1.0, NAN, None, torch.ones(2, 2, 2), *NO_NUMBER),
    "top_k": (-1, 1.5, None, "3"),
    "top_p": (0.0, 1.1, NAN, None, *NO_NUMBER),
    "unbiased": NO_FLAG,
    "whiten": NO_FLAG,
    "window": (0, -1, 1.5, "3", True),
}
LIMITS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("logprobs_from_logits", "temperature"): (0.0,),
    ("linear_logprobs", "temperature"): (0.0,),
    ("linear_ppo_loss", "temperature"): (0.0,),
    ("kl_divergence", "temperature"): (0.0,),
    ("policy_loss", "clip"): (None,),
    ("linear_ppo_loss", "clip"): (None,),
    ("shape_rewards", "beta"): (INF,),
    ("shape_rewards", "clip"): (0.0,),
}
# Optional tensors that the plain calls leave out, and whose place is taken by this argument's.
ABSENT = {"value_mask": "mask"}
# Given to all, and process groups, which torch.distributed checks.
NOT_HERE = {"backend", "group"}


# Their length is data, which other checks compare with the values' (of offsets and sizes).
FREE_LENGTH = {("gae_varlen", "cu_seqlens"), ("ranking_loss", "group_sizes")}
# K labels a row are as good as one.
FREE_DIMS = {("logprobs_from_logits", "labels")}
OTHERS_THAT_GIVE_THE_SHAPE = {
    ("append_kv", "k_cache"),
    ("decode_attention", "k_cache"),
    ("shape_rewards", "kl"),
    ("linear_cross_entropy", "weight"),
    ("linear_logprobs", "weight"),
    ("linear_ppo_loss", "weight"),
}


def parameters(op: str) -> list[str]:
    return list(inspect.signature(getattr(fastrlhf_kernels, op)).parameters)


def spoilt_tensors(x: Tensor, first: bool) -> Iterator[tuple[str, Any]]:
    """What is wrong, and the argument that is wrong in this way."""
    yield "list", x.tolist()
    yield "array", x.numpy()
    if not first:
        yield "None", None
    yield "meta", x.to("meta")
    yield "dims", x[..., None].expand(*x.shape, 2)
    if not first:
        yield "shape", x[: max(len(x) - 1, 0)]
        yield "longer", torch.cat([x, x])
    yield "complex", x.to(torch.complex64)
    if x.dtype == torch.int64:
        yield "float", x.float()
        yield "bool", x.bool()
    elif x.is_floating_point():
        yield "integer", x.long()
        yield "bool", x.bool()


def gives_the_shape(op: str, name: str) -> bool:
    """Other arguments are compared with its shape and device: the error may name one of them."""
    return name == parameters(op)[0] or (op, name) in OTHERS_THAT_GIVE_THE_SHAPE


def cases() -> list[pytest.param]:
    found = []
    for op in ops():
        call = call_of(op)
        names = parameters(op)
        for name in names:
            argument = call.arguments.get(name, call.arguments.get(ABSENT.get(name, "")))
            if isinstance(argument, Tensor):
                optional = inspect.signature(getattr(fastrlhf_kernels, op)).parameters[name]
                for what, value in spoilt_tensors(argument, name == names[0]):
                    if value is None and optional.default is None:
                        continue
                    if what in ("shape", "longer") and (op, name) in FREE_LENGTH:
                        continue
                    if what == "dims" and (op, name) in FREE_DIMS:
                        continue
                    found.append(pytest.param(op, name, value, id=f"{op}-{name}-{what}"))
            elif name not in NOT_HERE:
                for value in SETTINGS[name] + LIMITS.get((op, name), ()):
                    shown = "tensor" if isinstance(value, Tensor) else value
                    found.append(pytest.param(op, name, value, id=f"{op}-{name}-{shown}"))
    return found


def named(op: str, name: str, message: str) -> None:
    assert len(message.splitlines()) == 1, message
    assert message.startswith(f"{op}: "), message
    if not gives_the_shape(op, name):
        assert re.search(rf"\b{name}\b", message), message
        return
    assert any(re.search(rf"\b{other}\b", message) for other in parameters(op)), message


@pytest.mark.parametrize(("op", "name", "value"), cases())
def test_a_bad_argument_is_named(op: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^") as raised:
        call_of(op)(**{name: value})
    named(op, name, str(raised.value))


@pytest.mark.parametrize("op", ops())
def test_backends(op: str) -> None:
    call = call_of(op)
    for wrong in ("gpu", "CPU"):
        message = f"backend must be one of ref, cpu, triton, cuda, got {wrong!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            call(wrong)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="'cuda'"):
            call("cuda")


@pytest.mark.parametrize("op", ops())
def test_a_tensor_argument_of_fp64_is_refused_where_it_is_not_computed(op: str) -> None:
    if "triton" not in fastrlhf_kernels.available_backends():
        pytest.skip("no Triton here")
    with pytest.raises(ValueError, match=rf"^{op}: backend 'triton' does not compute in fp64"):
        call_of(op, torch.float64)("triton")


def test_use_backend() -> None:
    message = "backend must be one of ref, cpu, triton, cuda, got 'gpu'"
    with pytest.raises(ValueError, match=message), use_backend("gpu"):
        pass


def test_every_argument_is_covered() -> None:
    for op in ops():
        tensors = {n for n, x in call_of(op).arguments.items() if isinstance(x, Tensor)}
        left = set(parameters(op)) - tensors - set(SETTINGS) - set(ABSENT) - NOT_HERE
        assert not left, f"{op}: {left} are not in tests/test_bad_arguments.py"
