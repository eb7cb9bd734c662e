"""A decode step as a CUDA graph: one launch for all its kernels.

A graph is captured for a number of rows and a width of the block tables, both rounded up, and reads
and writes the same memory each time: the state of the rows (rows.py), the cache, and the model's
parameters, which may be updated in place between runs. Rows beyond those in use write nothing.
What a step draws stays in tensors of the graph until its next replay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.generation.fused import Step
from fastrlhf.generation.rows import Rows, Settings, filters_of

Drawn = tuple[Tensor, Tensor, Tensor]  # tokens, log-probs, verdicts, (B,) each


def rounded(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32 and so on: half more than n at most."""
    power = 1 << max(n - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and n <= 3 * power // 4 else power


class Steps:
    """Draws the next token of the seated sequences, by a step and its settings."""

    def __init__(self, rows: Rows, step: Step, settings: Settings, *, captured: bool) -> None:
        """captured: through CUDA graphs; else kernel by kernel."""
        self.rows, self.step, self.settings, self.captured = rows, step, settings, captured
        device = rows.integers.device
        self.active = torch.zeros((), dtype=torch.int64, device=device)
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Drawn]] = {}

    def __call__(self) -> Drawn:
        """Tokens (B,) of all rows in use, their log-probs and verdicts."""
        n = self.rows.count
        if not self.captured:
            return self.draw(n, self.rows.width, None)
        slots, pages = self.rows.tables.shape
        key = min(rounded(n), slots), min(rounded(self.rows.width), pages)
        self.active.fill_(n)
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        graph, drawn = self.graphs[key]
        graph.replay()
        tokens, logprobs, verdicts = drawn
        return tokens[:n], logprobs[:n], verdicts[:n]

    def draw(self, rows: int, width: int, active: Tensor | None) -> Drawn:
        """One step. It changes nothing but the cache, and there writes the same when repeated."""
        logits = self.step(*self.rows.batch(rows, width, active))
        integers, numbers = self.rows.integers[:, :rows], self.rows.numbers[:, :rows]
        return self.settings.draw(logits, integers, filters_of(integers, numbers))

    def _capture(self, rows: int, width: int) -> tuple[torch.cuda.CUDAGraph, Drawn]:
        """Run the step once, so that its kernels are compiled and loaded, and then record it."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.draw(rows, width, self.active)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                drawn = self.draw(rows, width, self.active)
        except RuntimeError as error:
            raise RuntimeError(
                f"the decode step of {rows} rows could not be captured as a CUDA graph "
                f"({str(error).splitlines()[0]}); Engine(..., graphs=False) does without"
            ) from error
        return graph, drawn
