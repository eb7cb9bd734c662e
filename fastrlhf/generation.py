"""Generation with a KV cache: prompts in; tokens, log-probs and lengths out.

Every token is drawn by ``fastrlhf_kernels.sample`` from (seed of the sequence, position in the
response), so what is drawn from given logits does not depend on the batch. Prompts are batched in
order of length and padded on the left; sequences that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from fastrlhf.batching import pad
from fastrlhf.models import LanguageModel
from fastrlhf_kernels import sample

# A batch is compacted when this share of its rows has ended: copying the cache costs about as
# much as a decode step of the rows that are saved by it.
COMPACT_AT = 0.25


class Generated(NamedTuple):
    """Responses of N prompts, in the order of the prompts; R is the longest response."""

    tokens: Tensor
    """(N, R) int64: the end token included where there is one, the pad token after it."""
    logprobs: Tensor
    """(N, R) fp32: under softmax(logits / temperature), before any filter; 0 after the end."""
    lengths: Tensor
    """(N,) int64: tokens of each response, the end token counted."""

    def ended(self, eos_token_id: int) -> Tensor:
        """(N,) bool: whether the response closes with the end token."""
        last = self.tokens.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0]
        return (last == eos_token_id) & (self.lengths > 0)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    seeds: Sequence[int] | Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    batch_size: int = 256,
    advance: Callable[[int], None] | None = None,
) -> Generated:
    """Sample a response to each prompt.

    prompts: N token lists, none empty. seeds: one int64 a prompt; equal seeds at equal logits draw
    equal tokens, so samples of one prompt need seeds of their own. temperature 0 is greedy.
    ``advance(n)`` is called as responses are finished. Raises ValueError for an empty prompt, a
    wrong number of seeds, or a prompt that leaves no room in the model's context.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: wanted one a prompt ({len(prompts)}), got {len(seeds)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    device = next(model.parameters()).device
    lengths = [len(p) for p in prompts]
    if prompts and min(lengths) == 0:
        raise ValueError(f"prompts: number {lengths.index(0)} is empty")
    if prompts and max(lengths) + max_new_tokens > model.context:
        raise ValueError(
            f"prompts: one of {max(lengths)} tokens and max_new_tokens={max_new_tokens} "
            f"exceed the context of {model.context}"
        )
    n = len(prompts)
    tokens = torch.full((n, max_new_tokens), pad_token_id, dtype=torch.int64, device=device)
    logprobs = torch.zeros((n, max_new_tokens), device=device)
    counts = torch.zeros(n, dtype=torch.int64, device=device)
    seeds = torch.as_tensor(seeds, dtype=torch.int64).to(device)
    filters: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    was_training = model.training
    model.eval()
    order = sorted(range(n), key=lambda i: (-lengths[i], i))
    for first in range(0, n, batch_size):
        rows = torch.tensor(order[first : first + batch_size], device=device)
        ids, sizes = pad(
            [prompts[i] for i in order[first : first + batch_size]], pad_token_id, left=True
        )
        ids, sizes = ids.to(device), sizes.to(device)
        width = ids.shape[1]
        mask = torch.arange(width, device=device) >= (width - sizes)[:, None]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.model.config)
        alive = torch.ones(len(rows), dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            out = model.hidden_states(
                ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            logits = model.logits(out.last_hidden_state[:, -1])
            drawn = sample(logits, seeds[rows], torch.full_like(rows, step), **filters)
            live = rows[alive]
            tokens[live, step] = drawn.tokens[alive]
            logprobs[live, step] = drawn.logprobs[alive]
            counts[live] += 1
            ending = alive & (drawn.tokens == eos_token_id)
            alive = alive & ~ending
            if advance is not None and (ended := int(ending.sum())):
                advance(ended)
            left = int(alive.sum())
            if left == 0 or step == max_new_tokens - 1:
                break
            ids, position_ids = drawn.tokens[:, None], position_ids[:, -1:] + 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            if left <= len(rows) * (1.0 - COMPACT_AT):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, ids, mask = rows[keep], ids[keep], mask[keep]
                position_ids, alive = position_ids[keep], alive[keep]
        if advance is not None and (unfinished := int(alive.sum())):
            advance(unfinished)
    model.train(was_training)
    longest = max(int(counts.max()), 1) if n else 0
    return Generated(tokens[:, :longest], logprobs[:, :longest], counts)
