"""Which request gets pages and a slot, and when.

Requests pass three stations, in the order of their prompts' first appearance: waiting; ready (the
prompt is in the cache, all pages that the response may need are set aside, the first token is
drawn); seated in a slot of the decode batch. Pages are given out strictly in that order and for the
worst case, so that a sequence which has begun always finishes: nothing is ever evicted.

Requests with equal prompts form a group. Its prompt is computed once; pages that the prompt fills
are shared. A prompt whose last page is partly filled leaves it to the last sample of the group; the
ones before get copies, since each goes on writing there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastrlhf.generation.pages import PAGE_SIZE, Pages, pages_for
from fastrlhf.generation.requests import Counters, Request

# Ready sequences beyond the free slots, as a share of the slots: prompts are then computed several
# at a time, and a slot that falls free is filled from the ready ones at once.
AHEAD = 0.25


@dataclass(slots=True)
class Group:
    """Requests that share a prompt."""

    prompt: Sequence[int]
    waiting: deque[int] = field(default_factory=deque)
    """Indices of the requests without pages yet."""
    pages: list[int] = field(default_factory=list)
    """The prompt's own, once it is admitted, until its last request is."""
    table: list[int] = field(default_factory=list)
    """The same pages, for the time in which the prompt is computed."""
    logits: Tensor | None = None
    """(V,) after the prompt, once it is computed: each request's first token is drawn from it."""


@dataclass(slots=True)
class Admitted:
    """A request that has all its pages."""

    index: int
    group: Group
    pages: list[int]
    source: int | None
    """The prompt's last page, of which its page number len(prompt) // PAGE_SIZE is a copy."""


def worst_case(request: Request) -> int:
    """Pages that a request needs at most: the last token drawn is never written to the cache."""
    return pages_for(len(request.prompt) + request.sampling.max_new_tokens - 1)


class Scheduler:
    """Admission of a run's requests within a number of pages."""

    def __init__(self, requests: Sequence[Request], pages: Pages, slots: int) -> None:
        self.requests = requests
        self.pages = pages
        self.ahead = int(slots * AHEAD)
        groups: dict[tuple[int, ...], Group] = {}
        for index, request in enumerate(requests):
            key = tuple(request.prompt)
            groups.setdefault(key, Group(request.prompt)).waiting.append(index)
        self.queue = deque(groups.values())

    def admit(self, wanted: int, counters: Counters) -> tuple[list[Group], list[Admitted]]:
        """Pages for the next requests: up to `wanted` at once, and some ahead if any is wanted.

        Returns the groups whose prompts are to be computed, and the requests.
        """
        new: list[Group] = []
        admitted: list[Admitted] = []
        if wanted <= 0:
            return new, admitted
        while self.queue and len(admitted) < wanted + self.ahead:
            group = self.queue[0]
            if not self._admit_one(group, new, admitted, counters):
                break
            if not group.waiting:
                self.queue.popleft()
        return new, admitted

    def _admit_one(
        self, group: Group, new: list[Group], admitted: list[Admitted], counters: Counters
    ) -> bool:
        """Pages for the group's next request and, if it is the first, for the prompt."""
        length = len(group.prompt)
        index = group.waiting[0]
        shared = length // PAGE_SIZE
        own = worst_case(self.requests[index]) - shared
        last = len(group.waiting) == 1
        # The page that the prompt fills in part: the last request takes it over.
        partial = 1 if length % PAGE_SIZE else 0
        prompt_pages = 0 if group.pages else shared + partial
        private = own - partial if last else own
        if self.requests[index].sampling.max_new_tokens == 1:
            private = 0  # it ends with its first token, and writes nothing
        if prompt_pages + private > self.pages.free:
            return False
        if not group.pages:
            group.pages = group.table = self.pages.take(prompt_pages)
            counters.prompt_pages += prompt_pages
            counters.prefill_tokens += length
            new.append(group)
        group.waiting.popleft()
        taken = self.pages.take(private)
        source = None
        if last:
            pages, group.pages = group.pages + taken, []
        else:
            self.pages.share(group.pages[:shared])
            pages = group.pages[:shared] + taken
            if partial and private:
                source = group.pages[-1]
                counters.copied_pages += 1
        admitted.append(Admitted(index, group, pages, source))
        return True

    @property
    def waiting(self) -> bool:
        """Whether a request has no pages yet."""
        return bool(self.queue)


def pages_wanted(requests: Sequence[Request], slots: int) -> int:
    """Pages with which a run is never held up: slots and what is ready ahead, all at their most."""
    together = slots + int(slots * AHEAD)
    return sum(sorted(map(_alone, requests), reverse=True)[:together])


def pages_needed(requests: Iterable[Request]) -> int:
    """Pages without which some request could not run even alone."""
    return max(map(_alone, requests), default=0)


def _alone(request: Request) -> int:
    """A request's worst case, and a page for a copy of the prompt's last one."""
    return worst_case(request) + 1
