"""Registers an op with torch.library, once, so that eager, compiled and tested are the same path.

An op is a schema whose last argument is `str backend`, a dict from backend to implementation, and a
fake that gives its outputs' shapes. The implementation gets the other arguments, in order.

The autograd key is filled by hand: `torch.library.register_autograd` costs 22 us for a call with
gradient on the machine this was written on, this 15 us, the same op without gradient 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastrlhf"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd_keyset = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad

Op = Callable[..., Any]


def register(
    schema: str,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., tuple[Any, ...]] | None = None,
) -> Op:
    """Registers `fastrlhf::<name>` and returns it, ready to be called.

    Args:
        schema: "name(Tensor x, ..., str backend) -> ...", without defaults or keyword-only
            arguments.
        implementations: backend name -> function of all arguments but the backend. It returns new
            contiguous tensors, never its inputs or views of them.
        fake: function of all arguments, which returns empty tensors like the results.
        setup_context: function of (ctx, inputs, output); as for torch.library.register_autograd.
        backward: function of (ctx, *gradients of the outputs), which returns a gradient or None
            for each argument but the backend. It calls an op made by `register_backward`.
            Without it the results are detached.
    """

    def run(*args: Any) -> Any:
        return implementations[args[-1]](*args[:-1])

    name, op = _define(schema, run, fake)

    if backward is None:
        _fill_autograd_key(name, op, None)
        return op
    if setup_context is None:
        raise ValueError(f"{name}: backward needs setup_context")
    make_context, make_gradients = setup_context, backward

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with _below_autograd():
                output = op.redispatch(keyset & _after_autograd_keyset, *args)
            make_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return (None, *make_gradients(ctx, *grads), None)

    _fill_autograd_key(name, op, Differentiable)
    return op


def register_backward(
    schema: str, implementations: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> Op:
    """Registers the op that computes another op's gradient; differentiating it raises."""

    def run(*args: Any) -> Any:
        return implementations[args[-1]](*args[:-1])

    name, op = _define(schema, run, fake)

    class OnceDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with _below_autograd():
                return op.redispatch(keyset & _after_autograd_keyset, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no derivative: second derivatives are not supported "
                "(backend='ref' has them)"
            )

    _fill_autograd_key(name, op, OnceDifferentiable)
    return op


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> tuple[str, Any]:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return name, getattr(getattr(torch.ops, NAMESPACE), name).default


def _fill_autograd_key(name: str, op: Any, function: type[torch.autograd.Function] | None) -> None:
    apply = None if function is None else function.apply

    def autograd(keyset: Any, *args: Any) -> Any:
        if apply is not None and torch.is_grad_enabled() and _any_requires_grad(*args):
            return apply(keyset, *args)
        with _below_autograd():
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
