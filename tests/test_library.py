"""Registration: gradients, detachment, second derivatives, opcheck and torch.compile.

With an op of its own, cube(x, a) = a x^3, beside a count that has no gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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

double = register(
    "test_double(Tensor x, str backend) -> Tensor",
    {"cpu": lambda x: 2.0 * x},
    lambda x, backend: torch.empty_like(x),
)


def test_gradient() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cube(x, 2.0, "cpu")[0], (x,))
    assert not cube(x, 2.0, "cpu")[1].requires_grad


def test_second_derivative_raises() -> None:
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
    torch.library.opcheck(cube, (x, 2.0, "cpu"))
    torch.library.opcheck(double, (x.detach(), "cpu"))


def test_compiled_equals_eager() -> None:
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


def test_backward_needs_its_context() -> None:
    with pytest.raises(ValueError, match="test_alone: backward needs setup_context"):
        register(
            "test_alone(Tensor x, str backend) -> Tensor",
            {},
            lambda x, backend: x,
            backward=_backward,
        )
