"""HTML of the reports: one self-contained page, its style, tables, and names instead of paths.

No script, no font, no picture from elsewhere: a page can be mailed, and opens without a network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePosixPath, PureWindowsPath

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #ffffff; --soft: #f4f5f7;
  --line: #b9c0c8; --quiet: #5b6570; --good: #00704f; --bad: #b3400f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --page: #14171b; --soft: #1e2329;
  --line: #56606b; --quiet: #9aa5b1; --good: #3fcf9f; --bad: #ff9a62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 48rem; margin: .4rem 0; }
.lead { font-size: 1.15rem; }
.quiet, figcaption, .absent { color: var(--quiet); font-size: .9rem; }
.good { color: var(--good); font-weight: 600; white-space: nowrap; }
.bad { color: var(--bad); font-weight: 600; white-space: nowrap; }
.panels { display: grid; gap: .8rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: .4rem 0; }
.panels > svg, .panels > div > svg, figure > svg { display: block; width: 100%;
  max-width: 32rem; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
.legend svg { vertical-align: middle; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; }
tbody td, tbody th { border-bottom: 1px solid var(--line); font-weight: inherit; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.head td { background: var(--soft); font-weight: 600; padding-left: .4rem; }
.interval { vertical-align: middle; fill: var(--ink); }
.interval .scale { stroke: var(--line); } .interval .mark { stroke: var(--bad); }
.interval .range { stroke: var(--ink); stroke-width: 2.5; }
pre, code { font: .85rem/1.4 ui-monospace, Consolas, monospace; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; border-radius: 4px; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page; ``parts`` are HTML."""
    body = _numbered("\n".join(part for part in parts if part))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _numbered(body: str) -> str:
    """The same with the ids of every picture numbered through the page, so that none is twice."""
    count = 0

    def renamed(picture: re.Match[str]) -> str:
        nonlocal count
        text = picture[0]
        names = {name: f"i{count + k}" for k, name in enumerate(re.findall(r' id="(.*?)"', text))}
        count += len(names)
        return re.sub(r'( id="|#)([\w-]+)', lambda m: m[1] + names.get(m[2], m[2]), text)

    return re.sub(r"<svg.*?</svg>", renamed, body, flags=re.DOTALL)


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it (HTML)."""
    return "\n".join([f"<h2>{escape(title)}</h2>", *(part for part in parts if part)])


def note(text: str, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is a class of the style."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def absent(what: str) -> str:
    """Says that a part of the run is missing."""
    return note(f"Not in this run: {what}.", "absent")


def panels(pictures: Sequence[str], caption: str = "") -> str:
    """SVG pictures side by side as the width allows, with a caption in plain text."""
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="panels">{"".join(pictures)}</div>{told}</figure>'


class Html(str):
    """Text that is HTML already; cells of any other type are escaped."""

    __slots__ = ()


Cell = str | float | None


def table(head: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    """A table. Numbers stand to the right; None is an empty cell; a line of one cell spans all."""
    cells = []
    for line in lines:
        if len(line) == 1 and len(head) > 1:
            cells.append(f'<tr class="head"><td colspan="{len(head)}">{_text(line[0])}</td></tr>')
        else:
            cells.append("<tr>" + "".join(map(_cell, line)) + "</tr>")
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>'
        + "\n".join(cells)
        + "</tbody></table></div>"
    )


def _cell(value: Cell) -> str:
    kind = ' class="number"' if isinstance(value, (int, float)) else ""
    return f"<td{kind}>{_text(value)}</td>"


def _text(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, Html):
        return value
    return escape(value if isinstance(value, str) else figure(value))


def figure(value: float) -> str:
    """A number in four digits: 0.1234, 12.34, 1,234, 1.234e+15."""
    if not math.isfinite(value):
        return "n/a"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.3e}"


def fold(title: str, inside: str) -> str:
    """HTML that a reader may open."""
    return f"<details><summary>{escape(title)}</summary>\n{inside}\n</details>"


def settings(values: Mapping[str, object]) -> str:
    """Nested settings as lines of ``name = value``."""
    return f"<pre>{escape(chr(10).join(_settings(values, '')))}</pre>"


def _settings(values: Mapping[str, object], prefix: str) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += _settings(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {without_folders(value)}")
    return lines


def without_folders(value: object) -> str:
    """A setting as text, an absolute path cut to its last two parts: a page names no machine."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(without_folders, value)) + "]"
    text = str(value)
    for kind in (PurePosixPath, PureWindowsPath):
        if (path := kind(text)).is_absolute():
            return "/".join(path.parts[1:][-2:])
    return text
