"""The peers' functions as benchmarks call them, or `Missing`: why one cannot be had here.

TRL and Liger install beside this project (`pip install "fastrlhf[bench]"`); verl, OpenRLHF and
cut-cross-entropy bring pins of their own, and are compared where someone has installed them.
`pytest bench --no-peers` leaves all of them out: importing them takes longer than small benchmarks.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from common import DEVICE, Missing, Variant
from torch import Tensor

WANTED = True  # conftest.py sets it
NOT_ASKED_FOR = Missing("not asked for (--no-peers)")
NEEDS_GPU = Missing("needs a GPU")

Function = Callable[..., Any]


def find(module: str, name: str) -> Function | Missing:
    """A peer's function, by where it is imported from."""
    if not WANTED:
        return NOT_ASKED_FOR
    package = module.split(".", 1)[0]
    if importlib.util.find_spec(package) is None:
        return Missing("not installed")
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return Missing(f"does not import: {error}")
    return function


def each(functions: Mapping[str, Function | Missing], call: Function) -> dict[str, Variant]:
    """`call` of each function, as variants; what is missing stays so."""
    return {
        name: f if isinstance(f, Missing) else partial(call, f) for name, f in functions.items()
    }


def trl_selective_log_softmax() -> Function | Missing:
    """(logits, labels) -> log-probs."""
    return find("trl.trainer.utils", "selective_log_softmax")


def trl_chunked_head() -> Function | Missing:
    """(hidden, weight, labels, whether with entropy) -> (log-probs, entropy or None)."""
    found = find("trl.trainer.utils", "_ChunkedLogProbFunction")
    if isinstance(found, Missing):
        return found
    apply = found.apply  # type: ignore[attr-defined]

    def head(h: Tensor, w: Tensor, y: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        outputs = ("entropy",) if entropy else ()
        logprobs, found, *_ = apply(h, w, None, y, 1.0, 32768, None, 1.0, outputs)
        return logprobs, found

    return head


def verl_logprobs() -> Function | Missing:
    """(logits, labels) -> log-probs."""
    return find("verl.utils.torch_functional", "logprobs_from_logits")


def openrlhf_logprobs() -> Function | Missing:
    """(logits, labels) -> log-probs."""
    return find("openrlhf.models.utils", "log_probs_from_logits")


def verl_gae() -> Function | Missing:
    """(rewards, values, mask, gamma, lam) -> (whitened advantages, returns)."""
    return find("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")


def liger_cross_entropy() -> Function | Missing:
    """(hidden, weight, labels) -> the mean loss."""
    name = "liger_fused_linear_cross_entropy"
    found = find("liger_kernel.transformers.functional", name)
    return found if isinstance(found, Missing) or DEVICE == "cuda" else NEEDS_GPU


def cut_cross_entropy() -> Function | Missing:
    """(hidden, weight, labels) -> the mean loss."""
    found = find("cut_cross_entropy", "linear_cross_entropy")
    return found if isinstance(found, Missing) or DEVICE == "cuda" else NEEDS_GPU


def flash_decode() -> Function | Missing:
    """(q, key cache, value cache, block tables, lengths) -> attention over the pages."""
    found = find("flash_attn", "flash_attn_with_kvcache")
    if isinstance(found, Missing):
        return found

    def decode(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return found(q[:, None], k, v, cache_seqlens=lengths, block_table=tables)[:, 0]

    return decode
