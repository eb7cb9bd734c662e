"""Figures of the reports: matplotlib panels as inline SVG, the same bytes for the same numbers.

    picture = panel("Score", lambda axes: curve(axes, steps, scores, "ppo"), x="step", y="score")

A panel is one set of axes of phone width; a report puts several side by side. Text, axes and grid
take the page's colours, so that a panel reads on light and on dark. Every model keeps its colour,
marker and name on all panels (``LOOKS``, after Okabe and Ito's palette, which colour-blind readers
tell apart). Legends stand beside the panels, in HTML, where they cover no data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.2, 2.9  # inches of a panel
POINTS = 80  # of a curve: more would show the noise of batches, not the course

# Stand-ins that `to_svg` turns into the page's colours.
INK, LINE = "#0a0b0c", "#0d0e0f"

# matplotlib types the keys as an endless literal.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastrlhf",  # else ids are random; `markup.document` sets pictures' ids apart
    "font.family": "DejaVu Sans",  # matplotlib's own, so that all machines measure text alike
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": False,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a model, or anything else with a name, appears on every panel."""

    label: str
    colour: str
    marker: str = "o"
    dash: str = "-"


LOOKS: dict[str, Look] = {
    "base": Look("base", "#7f7f7f", "s"),
    "prompted": Look("base, prompted", "#56B4E9", "D"),
    "sft": Look("SFT", "#0072B2", "o"),
    "start": Look("PPO's start", "#CC79A7", "P"),
    "ppo": Look("PPO", "#E69F00", "^"),
    "ppo-ptx": Look("PPO-ptx", "#009E73", "v"),
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7f7f7f")


def look(name: str, index: int = 0) -> Look:
    """The look of a name; ``index`` gives one to names that have none of their own."""
    if name in LOOKS:
        return LOOKS[name]
    return Look(name.replace("_", " "), COLOURS[index % len(COLOURS)])


# --- panels -------------------------------------------------------------------------------------


def panel(
    title: str,
    paint: Callable[[Axes], None],
    *,
    x: str = "",
    y: str = "",
    about: str = "",
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """One set of axes as inline SVG.

    Args:
        title: stands above it.
        paint: draws on the axes.
        x, y: labels of the axes, with units.
        about: the description for readers who do not see it; by default the title.
        size: width and height in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes)
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        return to_svg(figure, about or title)


def to_svg(figure: Figure, about: str) -> str:
    """A figure as an SVG element to stand in an HTML page; ``about`` describes it."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # HTML knows SVG without its namespaces, and a page may not hold one id twice.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"font: ([\d.]*)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)")
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1)


def legend(looks: Iterable[Look]) -> str:
    """The looks' names with their line and marker, as HTML to stand above panels."""
    return '<p class="legend">' + " ".join(_key(entry) for entry in looks) + "</p>"


_MARKERS = {
    "o": '<circle cx="14" cy="6" r="3.5"/>',
    "s": '<rect x="11" y="3" width="6" height="6"/>',
    "D": '<path d="M14 1.5L18.5 6L14 10.5L9.5 6z"/>',
    "^": '<path d="M14 2L18 9.5H10z"/>',
    "v": '<path d="M14 10L18 2.5H10z"/>',
    "P": '<path d="M12.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5H10v-3h2.5z"/>',
    "": "",
}
_DASHES = {"-": "", "--": ' stroke-dasharray="6 3"', ":": ' stroke-dasharray="2 2"'}


def _key(entry: Look) -> str:
    dash = _DASHES[entry.dash]
    return (
        f'<span><svg width="28" height="12" aria-hidden="true" fill="{entry.colour}">'
        f'<path d="M1 6H27" stroke="{entry.colour}" stroke-width="2"{dash}/>'
        f"{_MARKERS[entry.marker]}</svg> {escape(entry.label)}</span>"
    )


# --- what is drawn on them ----------------------------------------------------------------------

Numbers = Sequence[float] | np.ndarray


def thinned(x: Numbers, y: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """A curve as at most POINTS means of equal stretches; gaps (NaN) are left out of a mean."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = np.isfinite(b)
    a, b = a[kept], b[kept]
    if len(a) <= POINTS:
        return a, b
    parts = [np.array_split(values, POINTS) for values in (a, b)]
    return np.array([p.mean() for p in parts[0]]), np.array([p.mean() for p in parts[1]])


def curve(axes: Axes, x: Numbers, y: Numbers, how: Look, *, thin: bool = False) -> None:
    """A line over steps, averaged over short stretches where it is long; few points are marked."""
    a, b = thinned(x, y)
    axes.plot(
        a,
        b,
        color=how.colour,
        linestyle=how.dash,
        linewidth=0.7 if thin else 1.8,
        alpha=0.55 if thin else 1.0,
        marker=how.marker if len(a) <= 24 and not thin and how.marker else "None",
        markersize=3.5,
    )


def curves(axes: Axes, runs: Sequence[tuple[Numbers, Numbers]], how: Look) -> None:
    """The same curve of several seeds as thin lines, and their mean over the steps all have."""
    if len(runs) > 1:
        for x, y in runs:
            curve(axes, x, y, how, thin=True)
    curve(axes, *mean_curve(runs), how)


def mean_curve(runs: Sequence[tuple[Numbers, Numbers]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs of curves (x, y), at the x that all of them have."""
    tables = [dict(zip(x, y, strict=True)) for x, y in runs]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    means = [float(np.mean([table[step] for table in tables])) for step in shared]
    return np.array(shared, np.float64), np.array(means, np.float64)


Estimate = tuple[float, float, float]  # mean, low, high


def points(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], how: Look, *, line: bool = True
) -> None:
    """Estimates with their intervals over x, joined by a line."""
    means = np.array([e[0] for e in estimates])
    axes.errorbar(
        x,
        means,
        yerr=_arms(estimates),
        color=how.colour,
        marker=how.marker,
        linestyle=how.dash if line else "none",
        elinewidth=1.4,
        capsize=2.5,
    )


def rows(
    axes: Axes,
    labels: Sequence[str],
    series: Mapping[Look, Sequence[Estimate]],
    reference: float = 0.0,
) -> None:
    """Estimates with their intervals, one row a label from the top, one mark a series in it.

    A line stands upright at ``reference``.
    """
    at = np.arange(len(labels))[::-1]
    for index, (how, estimates) in enumerate(series.items()):
        shift = 0.32 * (0.5 * (len(series) - 1) - index)
        axes.errorbar(
            [e[0] for e in estimates],
            at + shift,
            xerr=_arms(estimates),
            color=how.colour,
            marker=how.marker,
            linestyle="none",
            elinewidth=1.6,
            capsize=2.5,
        )
    axes.axvline(reference, color=INK, linewidth=0.8)
    axes.set_yticks(at, labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.grid(axis="y", visible=False)


def bars(
    axes: Axes, groups: Sequence[str], series: Mapping[Look, Sequence[Estimate | None]]
) -> None:
    """Bars with intervals: one cluster a group, one bar a series; None leaves a gap."""
    width = 0.82 / len(series)
    for index, (how, estimates) in enumerate(series.items()):
        there = [(g, e) for g, e in enumerate(estimates) if e is not None]
        place = [g + (index - 0.5 * (len(series) - 1)) * width for g, _ in there]
        given = [e for _, e in there]
        axes.bar(place, [e[0] for e in given], width * 0.92, color=how.colour)
        axes.errorbar(
            place,
            [e[0] for e in given],
            yerr=_arms(given),
            color=INK,
            linestyle="none",
            elinewidth=1.0,
            capsize=2.0,
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)


def _arms(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, n) lengths of error bars below and above; an interval without bounds gets none."""
    arms = np.array([(m - low, high - m) for m, low, high in estimates]).reshape(-1, 2).T
    return np.where(np.isfinite(arms), np.maximum(arms, 0.0), 0.0)


def interval_bar(estimate: Estimate, low: float, high: float, mark: float | None = None) -> str:
    """A small picture for a table's cell: an interval on the scale low to high, and a mark."""
    if not all(map(math.isfinite, estimate)) or not high > low:
        return ""

    def place(value: float) -> str:
        return f"{4 + 112 * min(1.0, max(0.0, (value - low) / (high - low))):.1f}"

    mean, left, right = estimate
    tick = "" if mark is None else f'<path d="M{place(mark)} 1V17" class="mark"/>'
    return (
        '<svg width="120" height="18" viewBox="0 0 120 18" class="interval" aria-hidden="true">'
        f'<path d="M4 9H116" class="scale"/>{tick}'
        f'<path d="M{place(left)} 9H{place(right)}" class="range"/>'
        f'<circle cx="{place(mean)}" cy="9" r="3.5"/></svg>'
    )
