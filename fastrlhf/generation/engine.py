"""Continuous batching: requests in, responses out, slots refilled as sequences end.

    engine = Engine(model, slots=64)
    outcome = engine.run([Request(prompt=ids, seed=k) for k in range(8)])
    outcome[0].tokens, outcome[0].logprobs, outcome.counters.occupancy

Each turn of the loop admits what has pages (scheduler.py), computes its prompts (decoder.py), seats
sequences in free slots, and draws one token for each seated sequence, by the fused step (fused.py)
or the model's own modules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.generation.decoder import Decoder
from fastrlhf.generation.fused import Step, fused_step
from fastrlhf.generation.graphs import Steps
from fastrlhf.generation.pages import PAGE_SIZE, PagedCache, Pages, free_memory, pages_for
from fastrlhf.generation.requests import Counters, Finish, Outcome, Request, Token
from fastrlhf.generation.rows import (
    DRAWN,
    FINISHES,
    REQUEST,
    TOKEN,
    Rows,
    Settings,
    columns_of,
    filters_of,
)
from fastrlhf.generation.scheduler import (
    Admitted,
    Group,
    Scheduler,
    pages_needed,
    pages_wanted,
)
from fastrlhf.generation.stops import StopStrings
from fastrlhf.models import LanguageModel
from fastrlhf.runlog import progress as progress_bar

# Share of the memory that is free when a run begins which its cache may take: the rest is for
# prompts on their way through the model, and logits.
MEMORY_SHARE = 0.6
# Share of the same that a cache may take and still be kept for the next run: a trainer wants the
# memory in between.
KEPT_SHARE = 0.1

Stream = Callable[[list[Token]], None]


class Engine:
    """Generates responses with one model, whose parameters it reads and never copies for long."""

    def __init__(
        self,
        model: LanguageModel | PreTrainedModel,
        *,
        slots: int = 256,
        memory: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        fused: bool = True,
        pack: bool = True,
        graphs: bool = True,
        keep: bool = False,
    ) -> None:
        """Prepare a model.

        Args:
            model: the language model; its device and dtype are those of generation.
            slots: sequences that are decoded together, at most.
            memory: bytes of the cache at most; default: a share of what is free.
            tokenizer: needed for stop strings.
            fused: take the fused step where the model has one.
            pack: on a CPU, copy weights for the time of a run to the layout that is fastest to
                read; takes as much memory again as the weights.
            graphs: on a GPU, replay the fused step as a CUDA graph.
            keep: hold the cache and the graphs after a run if the cache is small beside the memory
                that was free, and take them again in the next run if they are large enough and its
                settings are the same; `release` lets them go.

        Raises:
            UnsupportedModel: a ValueError that lists what is supported.
        """
        if slots < 1:
            raise ValueError(f"slots: must be at least 1, got {slots}")
        if not isinstance(model, LanguageModel):
            model = LanguageModel(model).train(model.training)
        self.model = model
        self.slots, self.memory, self.tokenizer = slots, memory, tokenizer
        self.fused, self.pack, self.graphs, self.keep = fused, pack, graphs, keep
        self.kept: _Device | None = None
        self.decoder = Decoder(self.model)
        self.decoder.verify()

    def run(
        self,
        requests: Sequence[Request],
        *,
        stream: Stream | None = None,
        advance: Callable[[int], None] | None = None,
        progress: bool = False,
    ) -> Outcome:
        """Generate a response to each request.

        Args:
            requests: in any order; those with equal prompts share the prompt's work and memory.
            stream: called with the tokens of each step as they are drawn.
            advance: called with the number of responses just finished.
            progress: show a bar.

        Returns:
            All responses, in the order of the requests. An interrupt (Ctrl-C) ends the run early:
            what is finished is returned, and the outcome says so.

        Raises:
            ValueError: a request cannot be served; nothing has run then.
        """
        budget = self._budget()
        self._check(requests, budget)
        with progress_bar("generate", len(requests), "response", enabled=progress) as bar:
            report = advance or (lambda n: bar.advance(n))
            device = self.decoder.device
            was_training = self.model.training
            self.model.eval()
            try:
                with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                    return _Run(self, requests, budget, stream, report).outcome()
            finally:
                self.model.train(was_training)

    def release(self) -> None:
        """Let go of what `keep` holds."""
        self.kept = None

    def _check(self, requests: Sequence[Request], budget: int) -> None:
        """Refuse what cannot be served, before anything runs."""
        vocabulary = self.model.head.weight.shape[0]
        for index, request in enumerate(requests):
            length, most = len(request.prompt), request.sampling.max_new_tokens
            if length == 0:
                raise ValueError(f"prompts: number {index} is empty")
            if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
                raise ValueError(
                    f"prompts: number {index} has a token outside the vocabulary of {vocabulary}"
                )
            if length + most > self.model.context:
                raise ValueError(
                    f"prompts: one of {length} tokens and max_new_tokens={most} "
                    f"exceed the context of {self.model.context}"
                )
            if (needed := pages_needed([request])) > budget:
                raise ValueError(
                    f"prompts: number {index}, of {length} tokens, and max_new_tokens={most} need "
                    f"{needed * self.decoder.shape.page_bytes:,} bytes of cache; the budget is "
                    f"{budget * self.decoder.shape.page_bytes:,} (memory=)"
                )
            if request.sampling.stop and self.tokenizer is None:
                raise ValueError("stop: stop strings need the engine's tokenizer")

    def _budget(self) -> int:
        """Pages that the cache may have."""
        memory = self.memory
        if memory is None:
            held = 0 if self.kept is None else self.kept.bytes
            memory = int((free_memory(self.decoder.device) + held) * MEMORY_SHARE)
        return memory // self.decoder.shape.page_bytes


class _Device:
    """What a run needs on the device: cache, rows, and the step with its graphs."""

    def __init__(
        self, engine: Engine, slots: int, pages: int, context: int, settings: Settings
    ) -> None:
        decoder = engine.decoder
        self.slots, self.pages, self.context = slots, pages, context
        self.settings = settings
        cache = PagedCache(decoder.shape, pages, decoder.device)
        self.rows = Rows(slots, pages_for(context), cache, decoder.device)
        step: Step | None = None
        if engine.fused:
            step = fused_step(engine.model, rows=slots, context=context, pack=engine.pack)
        captured = engine.graphs and step is not None and decoder.device.type == "cuda"
        self.steps = Steps(self.rows, step or decoder.step, settings, captured=captured)
        # Copies of weights would be those of the last run.
        self.copies = step is not None and engine.pack and decoder.device.type == "cpu"

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return self.rows.cache.data.nbytes

    def may_stay(self) -> bool:
        """Whether it is right, and small enough, to be held between runs."""
        free = free_memory(self.rows.cache.data.device) + self.bytes
        return not self.copies and self.bytes <= KEPT_SHARE * free

    def serves(self, slots: int, pages: int, context: int, settings: Settings) -> bool:
        """Whether another run can take it over."""
        large = slots <= self.slots and pages <= self.pages and context <= self.context
        return large and settings.alike(self.settings)


class _Run:
    """One run of an engine: what is waiting, ready and seated, and the responses so far."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        budget: int,
        stream: Stream | None,
        report: Callable[[int], None],
    ) -> None:
        self.requests, self.stream, self.report = requests, stream, report
        self.decoder = engine.decoder
        device = self.decoder.device
        n = len(requests)
        slots = max(min(engine.slots, n), 1)
        count = min(pages_wanted(requests, slots), budget)
        self.settings = Settings(requests)
        context = max((len(r.prompt) + r.sampling.max_new_tokens for r in requests), default=1)
        held = engine.kept
        if held is None or not held.serves(slots, count, context, self.settings):
            size = slots, count, context
            if held is not None:  # as large as any run so far, or runs in turn never fit
                size = max(slots, held.slots), max(count, held.pages), max(context, held.context)
            engine.kept = held = None  # before more memory is taken
            held = _Device(engine, size[0], min(size[1], budget), size[2], self.settings)
        engine.kept = held if engine.keep and held.may_stay() else None
        held.steps.settings = self.settings
        self.rows, self.steps, self.cache = held.rows, held.steps, held.rows.cache
        self.rows.seated.clear()
        count = self.cache.data.shape[2]
        self.pages = Pages(count)
        self.scheduler = Scheduler(requests, self.pages, slots)
        self.slots = slots
        self.stops = StopStrings(engine.tokenizer, requests)
        self.ready: deque[tuple[Admitted, Tensor, Tensor]] = deque()
        self.counters = Counters(slots=slots, pages=count, page_bytes=self.decoder.shape.page_bytes)
        longest = max((r.sampling.max_new_tokens for r in requests), default=0)
        self.tokens = torch.zeros((n, longest), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((n, longest), device=device)
        self.lengths = [0] * n
        self.finishes: list[Finish] = ["interrupted"] * n

    def outcome(self) -> Outcome:
        """Run to the end, or to an interrupt."""
        interrupted = False
        try:
            while self.scheduler.waiting or self.ready or self.rows.count:
                self._turn()
        except KeyboardInterrupt:
            interrupted = True
        self.counters.peak_pages = self.pages.peak
        lengths = [
            0 if finish == "interrupted" else n
            for n, finish in zip(self.lengths, self.finishes, strict=True)
        ]
        return Outcome(
            tokens=self.tokens,
            logprobs=self.logprobs,
            lengths=torch.tensor(lengths, dtype=torch.int64, device=self.tokens.device),
            finishes=self.finishes,
            interrupted=interrupted,
            counters=self.counters,
        )

    def _turn(self) -> None:
        """Refill the slots, and draw a token for each seated sequence."""
        while (free := self.slots - self.rows.count) and (self.ready or self.scheduler.waiting):
            if free > len(self.ready):
                new, admitted = self.scheduler.admit(free - len(self.ready), self.counters)
                if admitted:
                    self._begin(new, admitted)
            if not self.ready:
                if not admitted:
                    break  # until a seated sequence gives its pages back
                continue  # all of them ended with their first token
            self._seat(free)
        if self.rows.count:
            self._decode()

    def _seat(self, free: int) -> None:
        chosen = [self.ready.popleft() for _ in range(min(free, len(self.ready)))]
        self.rows.seat(
            [sequence for sequence, _, _ in chosen],
            torch.stack([integers for _, integers, _ in chosen], 1),
            torch.stack([numbers for _, _, numbers in chosen], 1),
        )

    def _begin(self, new: Sequence[Group], admitted: Sequence[Admitted]) -> None:
        """Compute the prompts of new groups and draw the first tokens of admitted requests."""
        if new:
            logits = self.decoder.prefill(
                self.cache, [g.prompt for g in new], [g.table for g in new]
            )
            for group, row in zip(new, logits, strict=True):
                group.logits = row
        copies = [
            (s.source, s.pages[len(s.group.prompt) // PAGE_SIZE])
            for s in admitted
            if s.source is not None
        ]
        self.cache.copy([source for source, _ in copies], [target for _, target in copies])
        logits = torch.stack([s.group.logits for s in admitted if s.group.logits is not None])
        for group in {id(s.group): s.group for s in admitted}.values():
            if not group.waiting:
                group.logits = None
            elif group.logits is not None:
                group.logits = group.logits.clone()  # and let the other prompts' go
        integers, numbers = columns_of(
            [(s.index, self.requests[s.index]) for s in admitted], self.decoder.device
        )
        drawn = self.settings.draw(logits, integers, filters_of(integers, numbers))
        verdicts, _ = self._keep(drawn, integers)
        integers[TOKEN] = drawn[0]
        integers[DRAWN] += 1
        for place, (sequence, verdict) in enumerate(zip(admitted, verdicts, strict=True)):
            if verdict is None:
                self.ready.append((sequence, integers[:, place], numbers[:, place]))
            else:
                self._finish(sequence, verdict, 1)

    def _decode(self) -> None:
        """One step of all seated sequences."""
        n = self.rows.count
        self.counters.steps += 1
        self.counters.decoded += n
        drawn = self.steps()
        integers = self.rows.integers[:, :n]
        verdicts, counts = self._keep(drawn, integers)
        self.rows.advance(n, drawn[0])
        if any(verdicts):
            for row in range(n - 1, -1, -1):
                if (verdict := verdicts[row]) is not None:
                    self._finish(self.rows.unseat(row), verdict, counts[row])

    def _keep(
        self, drawn: tuple[Tensor, Tensor, Tensor], integers: Tensor
    ) -> tuple[list[Finish | None], list[int]]:
        """Keep the tokens drawn: why responses end with them, and how many each has now."""
        tokens, logprobs, codes = drawn
        places = (integers[REQUEST], integers[DRAWN])
        self.tokens.index_put_(places, tokens)
        self.logprobs.index_put_(places, logprobs)
        # All that the host needs to know, in one transfer.
        known = torch.stack((codes, integers[DRAWN] + 1, integers[REQUEST], tokens)).tolist()
        verdicts, indices = [FINISHES[code] for code in known[0]], known[2]
        if self.stops.wanted:
            verdicts = self.stops.judge(indices, known[3], verdicts)
        if self.stream is not None:
            self.stream(list(map(Token, indices, known[3], logprobs.tolist(), verdicts)))
        return verdicts, known[1]

    def _finish(self, sequence: Admitted, verdict: Finish, drawn: int) -> None:
        """Close a response of `drawn` tokens and give its pages back."""
        # A token drawn from logits that are no numbers is none.
        self.lengths[sequence.index] = drawn - (verdict == "error")
        self.finishes[sequence.index] = verdict
        self.pages.release(sequence.pages)
        self.report(1)
