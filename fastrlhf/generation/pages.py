"""The paged cache of keys and values, and who holds which page.

A page holds the keys and values of PAGE_SIZE neighbouring tokens of a sequence, in every layer; a
sequence's pages may lie anywhere, in the order that its block table says. A page may be held by
several sequences: samples of one prompt share the pages that its tokens fill. It is free again
when the last holder lets go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens a page. Smaller pages share prompts to finer grain and waste less at a sequence's end; the
# kernels read a page of 16 tokens as fast as a longer one.
PAGE_SIZE = 16


def pages_for(tokens: int) -> int:
    """How many pages hold as many tokens."""
    return -(-tokens // PAGE_SIZE)


class Pages:
    """Which pages are free, and how many holders the others have."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.peak = 0
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """n free pages, now with one holder each. The caller has seen that there are as many."""
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._holders[page] = 1
        self.peak = max(self.peak, self.count - self.free)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; those without any are free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model keeps of a token: keys and values, one of each a layer and key-value head."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""
        return 2 * self.layers * PAGE_SIZE * self.heads * self.head_dim * self.dtype.itemsize


class PagedCache:
    """Keys and values of all layers, each (pages, PAGE_SIZE, heads, head_dim)."""

    def __init__(self, shape: CacheShape, pages: int, device: torch.device) -> None:
        size = (shape.layers, 2, pages, PAGE_SIZE, shape.heads, shape.head_dim)
        self.data = torch.zeros(size, dtype=shape.dtype, device=device)
        self.keys: list[Tensor] = [layer[0] for layer in self.data]
        self.values: list[Tensor] = [layer[1] for layer in self.data]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages, in every layer."""
        if sources:
            device = self.data.device
            index = torch.tensor(targets, device=device)
            self.data[:, :, index] = self.data[:, :, torch.tensor(sources, device=device)]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: what a small machine has
        return 4 << 30
