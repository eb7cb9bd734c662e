"""The claims in words: for the terminal, and the phrases that the report shares with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastrlhf.demo.claims import Check, Claim
from fastrlhf.metrics import Interval


def print_claims(
    claims: Sequence[Claim], by_seed: Mapping[int, Sequence[bool]], console: Console
) -> None:
    """Print every claim: its comparisons, their figures with 95 % intervals, shown or not.

    Args:
        claims: judged on all seeds together.
        by_seed: for each claim's number, whether each seed alone shows it.
        console: where to.
    """
    for claim in claims:
        colour = "green" if claim.shown else "red"
        console.print(
            f"\n[bold]{claim.number}. {escape(claim.title)}[/bold]: "
            f"[{colour}]{status(claim.shown)}[/{colour}] ({escape(alone(claim, by_seed))})"
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(min_width=3)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for check in claim.checks:
            table.add_row(
                "  +" if check.holds else "  -",
                escape(check.text),
                escape(interval_text(check.value)),
                escape(f"wanted {wanted(check)}: {'holds' if check.holds else 'does NOT hold'}"),
            )
        console.print(table)
    console.print(f"\n{headline(claims)}")


def status(shown: bool) -> str:
    """Shown, or NOT shown."""
    return "shown" if shown else "NOT shown"


def wanted(check: Check) -> str:
    """Where a comparison's interval has to lie for it to hold."""
    return f"{check.wanted} {check.bound:g}"


def alone(claim: Claim, by_seed: Mapping[int, Sequence[bool]]) -> str:
    """How many seeds show a claim when judged alone."""
    seeds = by_seed.get(claim.number, ())
    return f"{sum(seeds)} of {len(seeds)} seeds alone"


def headline(claims: Sequence[Claim]) -> str:
    """How many of the claims were shown, and which were not, in a sentence or two."""
    if not claims:
        return "No claim was tested."
    missed = [claim for claim in claims if not claim.shown]
    if not missed:
        if len(claims) == 1:
            return "The one claim that this run tested was shown."
        return f"All {len(claims)} claims that this run tested were shown."
    count = f"{len(claims) - len(missed)} of the {len(claims)} claims that this run tested"
    names = "; ".join(f"{claim.number} ({claim.title})" for claim in missed)
    verb = "was" if len(claims) - len(missed) == 1 else "were"
    return f"{count} {verb} shown. Not shown: {names}."


def interval_text(value: Interval) -> str:
    """``mean [low, high]``, as many decimals as show two digits of the interval's half-width."""
    if not math.isfinite(value.mean):
        return "not measured"
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return f"{value.mean:.3f} [no interval from one unit]"
    half = (value.high - value.low) / 2
    digits = min(5, max(2, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    return f"{value:.{digits}f}"
