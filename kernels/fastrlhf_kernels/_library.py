"""Registers an op with torch.library, once, so that eager, compiled and tested are the same path.

An op is a schema whose last argument is `str backend`, a dict from backend to implementation, and a
fake that gives its outputs' shapes. The implementation gets the other arguments, in order.

What a call costs above its work, in microseconds on the 2-core EPYC of bench/NOTES.md: through the
dispatcher 8, an autograd.Function of one input 3, of ten inputs 5. Hence:

- the autograd key is filled by hand (`torch.library.register_autograd` costs 7 more);
- a call on plain CPU or CUDA tensors does what the dispatcher would come to, and not by way of it.
  Where anything else is to be done (a mode, a profiler, a fake tensor, a subclass, tracing, a lazy
  negation), the dispatcher does it: `_is_plain`;
- an op whose first output alone is differentiable gives its Function nothing but the inputs that
  have a gradient (`inputs=`).
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
_after_inplace_keyset = torch._C._after_ADInplaceOrView_keyset
_any_requires_grad = torch._C._any_requires_grad
_increment_version = torch._C._increment_version
_included_keys = torch._C._dispatch_tls_local_include_set
_excluded_keys = torch._C._dispatch_tls_local_exclude_set
_dispatch_keys = torch._C._dispatch_keys
_is_grad_enabled = torch.is_grad_enabled
_is_profiling = torch._C._autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling
_function_modes = torch._C._len_torch_function_stack
_functorch_is_active = torch._C._are_functorch_transforms_active


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


_DEVICES = ("CPU", "CUDA")
_INPLACE = "ADInplaceOrView"  # of every tensor but those of inference mode
# The keys of a plain tensor, in inference mode and out of it.
_PLAIN = frozenset(
    _keys(device, f"Autocast{device}", *more)
    for device in _DEVICES
    for more in ((), (_INPLACE, f"Autograd{device}"))
)
# What torch adds to every call's keys, in inference mode and out of it; a mode adds more.
_PLAIN_INCLUDED = frozenset((_keys("BackendSelect"), _keys("BackendSelect", _INPLACE)))
# What Autograd's keys of all devices share; below Autograd, torch takes it from the keys of a call.
_AUTOGRAD = _keys("AutogradCPU") & _keys("AutogradCUDA")
_TENSORS = frozenset((Tensor, torch.nn.Parameter))

Op = Callable[..., Any]
Compute = Callable[[Any, tuple[Any, ...]], Any]  # below Autograd: (keys, None if plain; arguments)


def register(
    schema: str,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., tuple[Any, ...]] | None = None,
    inputs: tuple[int, ...] | None = None,
    mutated: tuple[int, ...] = (),
) -> Op:
    """Registers `fastrlhf::<name>` and returns a function that calls it, by position.

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
        inputs: the cheaper way, for an op whose only differentiable output is its first: the
            positions of the arguments that have a gradient, tensors all. `backward` is then a
            function of (ctx, gradient of the first output or None), which returns gradients for
            these alone; `ctx.needs_input_grad` speaks of these alone, after two entries of no
            meaning. The other outputs are detached; setup_context may save but not mark them.
        mutated: the positions of the arguments that are written in place, `Tensor(a!)` in the
            schema; such an op returns nothing, `-> ()`, and has no gradient.
    """
    name, op, compute = _define(schema, implementations, fake, mutated)
    if backward is None:
        return _fill_autograd_key(name, op, compute)
    if setup_context is None:
        raise ValueError(f"{name}: backward needs setup_context")
    make_context, make_gradients = setup_context, backward

    if inputs is not None:
        autograd = _of_first_output(compute, make_context, make_gradients, inputs)
        return _fill_autograd_key(name, op, compute, autograd)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = compute(keyset, args)
            make_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return (None, *make_gradients(ctx, *grads), None)

    return _fill_autograd_key(name, op, compute, _of_all(Differentiable, compute))


def register_backward(
    schema: str, implementations: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> Op:
    """Registers the op that computes another op's gradient; differentiating it raises."""
    name, op, compute = _define(schema, implementations, fake)

    class OnceDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            return compute(keyset, args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no derivative: second derivatives are not supported "
                "(backend='ref' has them)"
            )

    return _fill_autograd_key(name, op, compute, _of_all(OnceDifferentiable, compute))


def _define(
    schema: str,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    mutated: tuple[int, ...] = (),
) -> tuple[str, Op, Compute]:
    """The op's name, the op, and how its Autograd key computes it."""

    def run(*args: Any) -> Any:
        return implementations[args[-1]](*args[:-1])

    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    # What autograd has saved of an argument it must know to have been written since.
    def write(keyset: Any, *args: Any) -> Any:
        _increment_version([args[i] for i in mutated])
        return op.redispatch(keyset & _after_inplace_keyset, *args)

    if mutated:
        _library.impl(name, write, "ADInplaceOrView", with_keyset=True)

    def compute(keyset: Any, args: tuple[Any, ...]) -> Any:
        with _below_autograd():
            if keyset is None:
                if mutated:
                    _increment_version([args[i] for i in mutated])
                return run(*args)
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    return name, op, compute


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would go from these arguments to Autograd and from there to us.

    It is always right to say no: the dispatcher then does what is to be done.
    """
    if _is_profiling() or _function_modes() or _included_keys().raw_repr() not in _PLAIN_INCLUDED:
        return False
    for x in args:
        if isinstance(x, Tensor) and (
            type(x) not in _TENSORS or _dispatch_keys(x).raw_repr() not in _PLAIN
        ):
            return False
    return not _is_grad_enabled() or not _excluded_keys().raw_repr() & _AUTOGRAD


def _fill_autograd_key(
    name: str, op: Op, compute: Compute, autograd: Callable[..., Any] | None = None
) -> Op:
    """Gives the op its Autograd kernel and returns how to call the op from Python."""

    def detached(keyset: Any, *args: Any) -> Any:
        return compute(keyset, args)

    kernel = detached if autograd is None else autograd
    _library.impl(name, kernel, "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if _is_compiling() or not _is_plain(args):
            return op(*args)
        return kernel(None, *args)

    return call


def _applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its part in Python, which is there for functorch alone."""
    # mypy knows no descriptors of torch._C.
    bare: Callable[..., Any] = vars(torch._C._FunctionBase)["apply"].__get__(None, function)

    def apply(*args: Any) -> Any:
        return function.apply(*args) if _functorch_is_active() else bare(*args)

    return apply


def _of_all(function: type[torch.autograd.Function], compute: Compute) -> Callable[..., Any]:
    """The Autograd kernel of an op whose `function` takes the keys and all arguments."""
    apply = _applier(function)

    def autograd(keyset: Any, *args: Any) -> Any:
        if _is_grad_enabled() and _any_requires_grad(*args):
            return apply(keyset, *args)
        return compute(keyset, args)

    return autograd


def _of_first_output(
    compute: Compute,
    make_context: Callable[[Any, tuple[Any, ...], Any], None],
    make_gradients: Callable[..., tuple[Any, ...]],
    inputs: tuple[int, ...],
) -> Callable[..., Any]:
    """The Autograd kernel of an op whose first output is differentiable, in these `inputs`."""

    class FirstDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, args: tuple[Any, ...], output: Any, *inputs: Tensor) -> Tensor:
            ctx.set_materialize_grads(False)
            make_context(ctx, args, output)
            first: Tensor = output if isinstance(output, Tensor) else output[0]
            return first

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
            return (None, None, *make_gradients(ctx, grad))

    apply = _applier(FirstDifferentiable)

    def autograd(keyset: Any, *args: Any) -> Any:
        output = compute(keyset, args)
        if _is_grad_enabled():
            differentiable = [args[i] for i in inputs]
            if _any_requires_grad(*differentiable):
                if isinstance(output, Tensor):
                    return apply(args, output, *differentiable)
                return apply(args, output, *differentiable), *output[1:]
        return output

    return autograd
