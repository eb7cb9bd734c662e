"""A model's own modules over the paged cache: prompts, and one token a sequence.

Any decoder that takes transformers' attention interface runs here; prompts of every model do.
`Decoder.prefill` gives the logits after each prompt, `Decoder.step` those after one more token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrlhf import llama
from fastrlhf.batching import cut_by_length, pad
from fastrlhf.generation.attention import (
    Batch,
    UnsupportedModel,
    check_model,
    paged,
    place,
)
from fastrlhf.generation.pages import PAGE_SIZE, CacheShape, PagedCache, pages_for
from fastrlhf.models import LanguageModel
from fastrlhf_kernels._decode_step import rope_append_native

# Prompt tokens that go through the model at once, padding counted: enough for matrix products to
# run at full speed, and hidden states of a few MB.
PREFILL_TOKENS = 4096

# Families whose results are compared with transformers' own in tests/test_generation_models.py. Any
# other is compared when a generator is made for it.
TESTED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")


class Decoder:
    """A language model whose attention reads and writes the paged cache."""

    def __init__(self, model: LanguageModel) -> None:
        check_model(model.model)
        self.model = model
        self.device = next(model.parameters()).device
        config = model.model.config
        heads = int(config.num_attention_heads)
        self.shape = CacheShape(
            layers=int(config.num_hidden_layers),
            heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            dtype=next(model.parameters()).dtype,
        )
        # One row of prompts end to end, where there is a kernel for it.
        self.packed = (
            self.device.type == "cuda"
            and self.shape.dtype in (torch.bfloat16, torch.float16)
            and config.model_type in TESTED
        )

    def prefill(
        self, cache: PagedCache, prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Compute prompts, their keys and values to the pages of their tables; logits (N, V)."""
        logits: list[Tensor] = []
        order: list[int] = []
        lengths = [len(p) for p in prompts]
        compute = self._prefill_packed if self.packed else self._prefill_padded
        blocks = llama.runs_packed(self.model.model, max(lengths))
        if blocks:
            compute = self._prefill_blocks
        for indices in cut_by_length(lengths, PREFILL_TOKENS, self.device, padded=not blocks):
            part = [prompts[i] for i in indices]
            pages = [tables[i] for i in indices]
            logits.append(self.model.logits(compute(cache, part, pages)))
            order += indices
        place_of = torch.tensor(order, device=self.device).argsort()
        return torch.cat(logits)[place_of]

    def _prefill_padded(
        self, cache: PagedCache, prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Hidden states (N, H) at the last tokens of prompts, a row each, padded on the right."""
        ids, lengths = pad(prompts, 0)
        block_tables, _ = pad(tables, 0)
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        block_tables = block_tables.to(self.device, torch.int32)
        column = torch.arange(ids.shape[1], device=self.device)
        inside = column < lengths[:, None]
        slots = place(block_tables, torch.where(inside, column, 0))
        batch = Batch(
            cache=cache,
            slots=torch.where(inside, slots, -1).flatten(),
            block_tables=block_tables,
            seq_lens=lengths.to(torch.int32),
            longest=ids.shape[1],
        )
        positions = column.expand_as(ids)
        hidden = self._hidden(ids, positions, batch)
        return hidden[torch.arange(len(ids), device=self.device), lengths - 1]

    def _prefill_blocks(
        self, cache: PagedCache, prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """The same, prompts end to end, by the blocks that Llama-like models are trained with."""
        lengths = torch.tensor([len(p) for p in prompts])
        positions, slots = _slots(prompts, tables)

        def keep(layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
            rope_append_native(
                qkv, positions, slots, cos, sin, None, cache.keys[layer], cache.values[layer], 0.0
            )

        ids = torch.tensor([token for prompt in prompts for token in prompt])
        hidden = llama.hidden_states(self.model.model, ids, lengths, keep)
        return hidden[lengths.cumsum(0) - 1]

    def _prefill_packed(
        self, cache: PagedCache, prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """The same, prompts end to end in one row."""
        lengths = torch.tensor([len(p) for p in prompts])
        ends = lengths.cumsum(0)
        positions, slots = _slots(prompts, tables)
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        batch = Batch(
            cache=cache,
            slots=slots.to(self.device),
            block_tables=torch.empty((0, 0), dtype=torch.int32, device=self.device),
            seq_lens=lengths.to(self.device, torch.int32),
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).to(self.device, torch.int32),
            longest=int(lengths.max()),
        )
        hidden = self._hidden(ids[None].to(self.device), positions[None].to(self.device), batch)
        return hidden[0, (ends - 1).to(self.device)]

    def step(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Logits (B, V) after one more token (B,) a sequence, at positions (B,)."""
        hidden = self._hidden(tokens[:, None], positions[:, None], batch)
        return self.model.logits(hidden[:, 0])

    def _hidden(self, ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        with paged(self.model.model):
            out = self.model.hidden_states(
                ids, position_ids=positions, use_cache=False, paged=batch
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    @torch.inference_mode()
    def verify(self) -> None:
        """Compare with the model's own forward on a few tokens, unless tests have done so.

        Raises:
            UnsupportedModel: the logits are others.
        """
        config = self.model.model.config
        if config.model_type in TESTED:
            return
        tokens = [i % config.vocab_size for i in (5, 1, 7, 3, 2)]
        wanted = self.model.model(torch.tensor([tokens], device=self.device)).logits[0, -2:].float()
        cache = PagedCache(self.shape, 1, self.device)
        last = torch.tensor([4], device=self.device)
        batch = Batch(
            cache=cache,
            slots=last,
            block_tables=torch.zeros((1, 1), dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor([5], dtype=torch.int32, device=self.device),
        )
        first = self.prefill(cache, [tokens[:4]], [[0]])
        second = self.step(torch.tensor([tokens[4]], device=self.device), last, batch)
        found = torch.cat([first, second]).float()
        # Rounding of bf16 moves logits by less than this share; a mask or positions that are not
        # taken over move them by about as much as they are.
        if not float((found - wanted).abs().max()) <= 0.1 * float(wanted.abs().max()):
            raise UnsupportedModel(
                self.model.model, "through the attention interface its logits are others"
            )


def _slots(
    prompts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Position and slot of each token of prompts end to end, both (N,) int64 on the CPU."""
    found = []
    for prompt, pages in zip(prompts, tables, strict=True):
        assert len(pages) >= pages_for(len(prompt))
        positions = torch.arange(len(prompt))
        table = torch.tensor(pages)[positions // PAGE_SIZE]
        found.append(torch.stack([positions, table * PAGE_SIZE + positions % PAGE_SIZE]))
    positions, slots = torch.cat(found, 1)
    return positions, slots
