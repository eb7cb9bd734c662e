"""Registration: gradients, detachment, second derivatives, opcheck and torch.compile.

With an op of its own, cube(x, a) = a x^3, beside a count that has no gradient; and `lean_cube`, the
same registered by `inputs=`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrlhf_kernels._library import register, register_backward

_cube_backward = register_backward(
    "test_cube_backward(Tensor grad, Tensor x, float a, str backend) -> Tensor",
    {"cpu": lambda grad, x, a: 3.0 * a * grad * x * x},
    lambda grad, x, a, backend: torch.empty_like(x),
)


def _setup(ctx, inputs, output) -> None:
    x, a, backend = inputs
    ctx.save_for_backward(x)
    ctx.a, ctx.backend = a, backend
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _count: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return _cube_backward(grad, x, ctx.a, ctx.backend), None


cube = register(
    "test_cube(Tensor x, float a, str backend) -> (Tensor, Tensor)",
    {"cpu": lambda x, a: (a * x**3, (x > 0).sum())},
    lambda x, a, backend: (torch.empty_like(x), x.new_empty((), dtype=torch.int64)),
    setup_context=_setup,
    backward=_backward,
)


def _lean_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.a, ctx.backend = inputs[2:]


def _lean_backward(ctx, grad: Tensor | None) -> tuple[Tensor | None]:
    if grad is None:
        return (None,)
    return (_cube_backward(grad, *ctx.saved_tensors, ctx.a, ctx.backend),)


_lean_cube = register(
    "test_lean_cube(Tensor x, Tensor data, float a, str backend) -> (Tensor, Tensor)",
    {"cpu": lambda x, data, a: (a * x**3, (x > 0).sum())},
    lambda x, data, a, backend: (torch.empty_like(x), x.new_empty((), dtype=torch.int64)),
    setup_context=_lean_setup,
    backward=_lean_backward,
    inputs=(0,),
)


DATA = torch.ones(2, requires_grad=True)  # but the op says that it has no gradient


def lean_cube(x: Tensor, a: float, backend: str) -> tuple[Tensor, Tensor]:
    return _lean_cube(x, DATA, a, backend)


CUBES = pytest.mark.parametrize("cube", [cube, lean_cube], ids=["all outputs", "first output"])

double = register(
    "test_double(Tensor x, str backend) -> Tensor",
    {"cpu": lambda x: 2.0 * x},
    lambda x, backend: torch.empty_like(x),
)


@CUBES
def test_gradient(cube) -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cube(x, 2.0, "cpu")[0], (x,))
    assert not cube(x, 2.0, "cpu")[1].requires_grad


@CUBES
def test_second_derivative_raises(cube) -> None:
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(cube(x, 2.0, "cpu")[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()


def test_without_backward_results_are_detached() -> None:
    x = torch.randn(5, requires_grad=True)
    y = double(x, "cpu")
    assert torch.equal(y, 2.0 * x.detach())
    assert not y.requires_grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x = torch.randn(5, requires_grad=requires_grad)
    ops = torch.ops.fastrlhf
    torch.library.opcheck(ops.test_cube.default, (x, 2.0, "cpu"))
    torch.library.opcheck(ops.test_lean_cube.default, (x, x.detach(), 2.0, "cpu"))
    torch.library.opcheck(ops.test_double.default, (x.detach(), "cpu"))


@CUBES
def test_compiled_equals_eager(cube) -> None:
    def step(x: Tensor) -> Tensor:
        y, count = cube(2.0 * x, 0.5, "cpu")
        return (y * double(x, "cpu") / (1 + count)).sum()

    grads = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1.0, 1.0, 7, requires_grad=True)
        value = f(x)
        value.backward()
        grads.append((value.detach(), x.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@CUBES
def test_the_short_way_gives_the_dispatchers_bits(cube) -> None:
    """A graph of gradients, or a mode, makes the calls go through the dispatcher."""

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.randn(33, requires_grad=True)
    upstream = torch.randn(33)
    (short,) = torch.autograd.grad(cube(x, 2.0, "cpu")[0], x, upstream)
    (graphed,) = torch.autograd.grad(cube(x, 2.0, "cpu")[0], x, upstream, create_graph=True)
    with Seen() as seen:
        (watched,) = torch.autograd.grad(cube(x, 2.0, "cpu")[0], x, upstream)
    assert graphed.requires_grad
    assert torch.equal(short, graphed)
    assert torch.equal(short, watched)
    names = [name for name in seen.names if "cube" in name]
    assert len(names) == 2, names
    assert names[1] == "test_cube_backward.default"


@CUBES
def test_a_profiler_sees_the_op(cube) -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.profiler.profile() as profile:
        cube(x, 2.0, "cpu")[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastrlhf::test_cube", "fastrlhf::test_lean_cube"} & names, names
    assert "fastrlhf::test_cube_backward" in names


@CUBES
def test_function_modes_and_subclasses_see_the_op(cube) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Sub(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(3)
    seen: list[str] = []
    with Mode():
        cube(x, 2.0, "cpu")
    assert any("cube" in name for name in seen), seen
    seen.clear()
    assert isinstance(cube(x.as_subclass(Sub), 2.0, "cpu")[0], Sub)
    assert any("cube" in name for name in seen), seen


@CUBES
def test_no_graph_where_torch_would_record_none(cube) -> None:
    x = torch.randn(3, requires_grad=True)
    expected = 2.0 * x.detach() ** 3
    with torch._C._AutoDispatchBelowAutograd():
        below = cube(x, 2.0, "cpu")[0]
    with torch.inference_mode():
        inference = cube(x, 2.0, "cpu")[0]
        inside = cube(torch.ones(3), 2.0, "cpu")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = cube(x, 2.0, "cpu")[0]
    for y in (below, inference, autocast):
        assert torch.equal(y, expected)
    assert not below.requires_grad
    assert inference.is_inference()
    assert inside.is_inference()
    assert autocast.requires_grad


@CUBES
def test_lazy_and_fake_tensors_take_the_dispatcher(cube) -> None:
    x = torch.randn(7)
    lazy = torch._neg_view(x).requires_grad_()  # a negation that no one has carried out yet
    plain = (-x).requires_grad_()
    assert lazy.is_neg()
    upstream = torch._neg_view(torch.ones(7))
    for f in (lambda y: cube(y, 2.0, "cpu")[0], lambda y: double(y, "cpu")):
        assert torch.equal(f(lazy), f(plain))
    (of_lazy,) = torch.autograd.grad(cube(lazy, 2.0, "cpu")[0], lazy, upstream)
    (of_plain,) = torch.autograd.grad(cube(plain, 2.0, "cpu")[0], plain, -torch.ones(7))
    assert torch.equal(of_lazy, of_plain)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(7, requires_grad=True)
        (gradient,) = torch.autograd.grad(cube(fake, 2.0, "cpu")[0].sum(), fake)
    assert gradient.shape == (7,)
    assert type(gradient) is type(fake)


def test_only_the_named_inputs_have_a_gradient() -> None:
    x, data = torch.randn(4), torch.randn(4, requires_grad=True)
    assert not any(y.requires_grad for y in _lean_cube(x, data, 2.0, "cpu"))
    first, count = _lean_cube(x.requires_grad_(), data, 2.0, "cpu")
    assert first.requires_grad
    assert not count.requires_grad
    first.sum().backward()
    assert data.grad is None
    with torch.no_grad():
        assert not _lean_cube(x, data, 2.0, "cpu")[0].requires_grad


def test_backward_needs_its_context() -> None:
    with pytest.raises(ValueError, match="test_alone: backward needs setup_context"):
        register(
            "test_alone(Tensor x, str backend) -> Tensor",
            {},
            lambda x, backend: x,
            backward=_backward,
        )
