"""Generation as the trainer's stages call it: prompts in; tokens, log-probs and lengths out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.generation.engine import Engine
from fastrlhf.generation.requests import Request, Sampling
from fastrlhf.models import LanguageModel


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
    engine: Engine | None = None,
    advance: Callable[[int], None] | None = None,
) -> Generated:
    """Sample a response to each prompt.

    prompts: N token lists, none empty. seeds: one int64 a prompt; equal seeds at equal logits draw
    equal tokens, so samples of one prompt need seeds of their own. temperature 0 is greedy.
    batch_size: sequences that are decoded together. engine: one of this very model, with slots of
    its own in place of batch_size, which may have kept its cache and graphs from an earlier call
    (``Engine(model, keep=True)``). ``advance(n)`` is called as responses are finished. Raises
    ValueError for an empty prompt, a wrong number of seeds, an engine of another model, or a prompt
    that leaves no room in the model's context; FloatingPointError where the model's logits are no
    numbers; KeyboardInterrupt as it comes.
    """
    if engine is not None and engine.model is not model:
        raise ValueError("engine: it is one of another model")
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: wanted one a prompt ({len(prompts)}), got {len(seeds)}")
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        end_token_id=eos_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    requests = [
        Request(prompt=prompt, seed=seed, sampling=sampling)
        for prompt, seed in zip(prompts, torch.as_tensor(seeds).tolist(), strict=True)
    ]
    engine = engine or Engine(model, slots=batch_size)
    outcome = engine.run(requests, advance=advance)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if broken := outcome.finishes.count("error"):
        raise FloatingPointError(
            f"generation: the model's logits are no numbers in {broken} of {len(prompts)} responses"
        )
    return Generated(*outcome.padded(pad_token_id), outcome.lengths)
