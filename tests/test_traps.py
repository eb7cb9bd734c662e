"""Each trap is held against an implementation that falls into it, and against every backend.

A check that a naive implementation passes proves nothing. So here each check runs twice: it must
fail on the naive function beside it, which is what one writes first, and pass on ours. The op's own
tests go over more inputs; this is the proof that such tests can fail. What holds every op to which
trap, beside this file, is in tests/test_<op>.py under names with these words:

    NaN under a mask             reaches_nothing, ignored_rows
    nothing valid                nothing_valid, nothing_decided, none_and_one, ignored_rows
    -inf, first blocks of it     infinite_logits, impossible_tokens, probability_zero
    p -> 1, offsets of 1e4       near_certainty, large_offsets, keeps_its_digits, explained_variance
    V = 1, primes, tails         matches_definition, wide_rows, about_the_tiles, one_token
    past 2^31 elements           offsets_past_two_to_31
    strides, upstream's too      strides, layouts, expanded_gradients, upstream
    other rows, threads, reruns  do_not_depend_on_the_batch, repeats, thread_count
    labels out of range          labels_out_of_range
    a cache's unused slots       not_attended_to, harms_no_neighbour, slots_past_the_cache
    gaps of 100 and 1e4          finite_for_finite_input, large_gaps, the_clamp_of_the_log_ratio
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import traps_cache
import traps_tokens
import traps_upstream
import traps_vocabulary
from op_cases import call_of, tensors
from oracle import Backend, assert_same_bits, backends_for, instruction_set
from torch import Tensor
from traps import NAN, TRAPS, Trap

import fastrlhf_kernels
from fastrlhf_kernels._aot import ops

MODULES = (traps_cache, traps_tokens, traps_upstream, traps_vocabulary)  # their import fills TRAPS


def cases() -> list[pytest.param]:
    return [
        pytest.param(one, *param.values, id=f"{one.op}-{one.name}-{param.id}", marks=param.marks)
        for one in TRAPS
        if one.op in ops()
        for param in backends_for(one.op)
        if param.values[0].name not in one.not_on
    ]


@pytest.mark.parametrize("one", TRAPS, ids=lambda one: f"{one.op}-{one.name}")
def test_a_naive_implementation_falls_into_the_trap(one: Trap) -> None:
    with pytest.raises(AssertionError):
        one.check(one.naive, "cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of Triton's interpreter
@pytest.mark.parametrize(("one", "backend"), cases())
def test_ours_does_not(one: Trap, backend: Backend) -> None:
    function = getattr(fastrlhf_kernels, one.op)
    with instruction_set(backend.isa):
        one.check(partial(function, backend=backend.name), backend.device)


def masked_calls() -> list[pytest.param]:
    """Every op that takes a mask, on every backend; new ops too, by their call in op_cases.py."""
    return [
        pytest.param(op, *param.values, id=f"{op}-{param.id}", marks=param.marks)
        for op in ops()
        if "mask" in call_of(op).arguments
        for param in backends_for(op)
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("op", "backend"), masked_calls())
def test_masks_of_every_op(op: str, backend: Backend) -> None:
    """NaN under the mask changes no bit; int and float masks are bool ones; nothing valid: zeros.

    `old_logprobs` and such are shaped like the mask, and so are spoilt; `hidden` is, row by row.
    """
    call = call_of(op, torch.float32, backend.device)
    mask = call.arguments["mask"]
    with instruction_set(backend.isa):
        wanted = tensors(call(backend.name))
        spoilt = {
            name: x.masked_fill(~mask if x.shape == mask.shape else ~mask[..., None], NAN)
            for name, x in call.arguments.items()
            if isinstance(x, Tensor)
            and x.is_floating_point()
            and x.shape[: mask.dim()] == mask.shape
        }
        assert spoilt
        others = (3 * mask.int(), 256 * mask.int(), -0.5 * mask.float())  # 256 is 0 in a byte
        for changes in (spoilt, *({"mask": other} for other in others)):
            for x, y in zip(tensors(call(backend.name, **changes)), wanted, strict=True):
                assert_same_bits(x, y)
        for x in tensors(call(backend.name, mask=torch.zeros_like(mask))):
            assert bool((x == 0).all())
