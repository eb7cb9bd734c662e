"""The demonstration's report: one self-contained page that anyone can open.

    write_page(out, seeds, judge_claims(seeds), by_seed(seeds), meta)

What was shown and what was not comes first, then the figures behind it. The same numbers give the
same bytes, but for the last section: time and versions.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from fastrlhf import markup
from fastrlhf.demo import curves, measures
from fastrlhf.demo.claims import Check, Claim, Seed
from fastrlhf.demo.examine import SHOWN_MODELS
from fastrlhf.demo.text import alone, headline, interval_text, status, wanted
from fastrlhf.plots import LOOKS, interval_bar
from fastrlhf.runfiles import read_config

ALL_CLAIMS = range(1, 9)
PACKAGES = ("fastrlhf", "torch", "triton", "transformers", "accelerate", "numpy", "matplotlib")
STAGE_CONFIGS = ("base", "sft", "start", "rm", "ppo", "ppo-ptx")
LIMITS = (
    "A miniature cannot show what people think of real models, nor the truthfulness, toxicity or "
    "bias of real models: its language has 163 words and its labelers are simulated. What it tests "
    "is the order of models and the direction of effects, not the paper's percentages."
)


def write_page(
    out: Path,
    seeds: Sequence[Seed],
    claims: Sequence[Claim],
    by_seed: dict[int, list[bool]],
    meta: dict[str, Any],
) -> Path:
    """Write ``out/report.html``.

    Args:
        out: the demonstration's folder.
        seeds: what each seed left; at least one.
        claims: judged on all seeds together.
        by_seed: for each claim's number, whether each seed alone shows it.
        meta: of the run: "seeds" (their numbers), "full" (whether it was the long one),
            "settings" (nested), "seconds" (wall clock); what is missing is said to be.

    Returns:
        The page's path.
    """
    path = out / "report.html"
    staging = path.with_suffix(".partial")
    staging.write_text(page(seeds, claims, by_seed, meta), encoding="utf-8")
    staging.replace(path)
    return path


def page(
    seeds: Sequence[Seed],
    claims: Sequence[Claim],
    by_seed: Mapping[int, Sequence[bool]],
    meta: Mapping[str, Any],
) -> str:
    """The page as HTML; see ``write_page``."""
    parts = [
        "<h1>InstructGPT in miniature</h1>",
        markup.note(headline(claims), "lead"),
        markup.note(_untested(claims)) if _untested(claims) else "",
        markup.note(_counted(seeds)),
        markup.note(LIMITS, "quiet"),
        markup.section("Claims", claims_table(claims, by_seed)),
        measures.win_rates(seeds),
        curves.training(seeds),
        curves.kl_against_reward(seeds),
        measures.tax(seeds),
        measures.habits(seeds),
        measures.reward_model_accuracy(seeds),
        curves.sft_overfitting(seeds),
        measures.work(seeds),
        answers(seeds),
        reproduce(seeds, meta),
        machine(seeds, meta),
    ]
    return markup.document("InstructGPT in miniature", parts)


def _untested(claims: Sequence[Claim]) -> str:
    tested = {claim.number for claim in claims}
    rest = [str(number) for number in ALL_CLAIMS if number not in tested]
    if not rest:
        return ""
    names = rest[0] if len(rest) == 1 else f"{', '.join(rest[:-1])} and {rest[-1]}"
    claim, verb = ("claim", "needs") if len(rest) == 1 else ("claims", "need")
    return f"Not tested here: {claim} {names}, which {verb} the long demonstration (--full)."


def _counted(seeds: Sequence[Seed]) -> str:
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return (
        f"Figures pool {count}: worlds, models and samples of their own. Square brackets are 95 % "
        "intervals over test prompts, documents or quizzes."
    )


# --- claims -------------------------------------------------------------------------------------


def claims_table(claims: Sequence[Claim], by_seed: Mapping[int, Sequence[bool]]) -> str:
    """Every claim with its comparisons: figure, interval, what was wanted, whether it holds."""
    lines: list[list[markup.Cell]] = []
    for claim in claims:
        verdict = _verdict(claim.shown, status(claim.shown))
        lines.append(
            [
                markup.Html(
                    f"{claim.number}. {escape(claim.title)}: {verdict} "
                    f'<span class="quiet">({escape(alone(claim, by_seed))})</span>'
                )
            ]
        )
        for check in claim.checks:
            lines.append(
                [
                    check.text,
                    interval_text(check.value),
                    markup.Html(_bar(check)),
                    wanted(check),
                    markup.Html(_verdict(check.holds, "holds" if check.holds else "does not hold")),
                ]
            )
    if not lines:
        return markup.absent("a claim that it could test")
    head = ("comparison", "figure, 95 % interval", "", "wanted", "")
    return markup.table(head, lines)


def _verdict(good: bool, text: str) -> str:
    return f'<span class="{"good" if good else "bad"}">{text}</span>'


def _bar(check: Check) -> str:
    """The interval on a scale that takes in the bound, which is the mark."""
    value = check.value
    low, high = min(value.low, check.bound), max(value.high, check.bound)
    room = 0.1 * (high - low)
    return interval_bar((value.mean, value.low, value.high), low - room, high + room, check.bound)


# --- answers ------------------------------------------------------------------------------------


def answers(seeds: Sequence[Seed]) -> str:
    """Prompts of the first seed with the models' answers side by side, and the rule's scores."""
    shown = seeds[0].results.get("shown", [])
    if not shown:
        return markup.section("Answers", markup.absent("answers to show"))
    lines: list[list[markup.Cell]] = []
    for record in shown:
        said = [record["answers"].get(name) for name in SHOWN_MODELS]
        lines.append(
            [
                record["prompt"],
                record["right"],
                *(None if one is None else _said(one) for one in said),
            ]
        )
    head = ("prompt", "right answer", *(LOOKS[name].label for name in SHOWN_MODELS))
    return markup.section(
        "Answers side by side",
        markup.note(
            f"The first prompts of each kind of task in the test file of seed "
            f"{seeds[0].results['seed']}, and each model's first sample; in brackets the hidden "
            "rule's score, which runs from -2.5 to 3."
        ),
        markup.table(head, lines),
    )


def _said(answer: Mapping[str, Any]) -> str:
    return f"{answer['text'] or '(nothing)'} ({answer['score']:g})"


# --- settings, machine --------------------------------------------------------------------------


def reproduce(seeds: Sequence[Seed], meta: Mapping[str, Any]) -> str:
    """The command, the seeds, the settings of every stage."""
    numbers = [seed.results["seed"] for seed in seeds]
    parts = [
        f"<pre>{escape(command(numbers, bool(meta.get('full'))))}</pre>",
        markup.note(
            f"Seeds: {', '.join(map(str, numbers))}. A seed fixes the world, the weights, the "
            "order of data and every sample. Another processor or version of torch rounds "
            "differently, and PPO magnifies it: figures then move somewhat beyond their intervals."
        ),
    ]
    if meta.get("settings"):
        parts.append(markup.fold("What the demonstration fixes", markup.settings(meta["settings"])))
    else:
        parts.append(markup.absent("the demonstration's settings"))
    configs = {name: read_config(seeds[0].out / name) for name in STAGE_CONFIGS}
    for name, config in configs.items():
        if config:
            parts.append(markup.fold(f"All settings of {name}", markup.settings(_bare(config))))
    return markup.section("How to reproduce this", *parts)


def _bare(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings without the folders it was run in."""
    return {
        table: {name: value for name, value in fields.items() if name not in ("out", "data")}
        for table, fields in config.items()
        if isinstance(fields, Mapping)
    }


def command(seeds: Sequence[int], full: bool) -> str:
    """The command line that runs these seeds."""
    words = ["fastrlhf demo"]
    if full:
        words.append("--full")
    words.append(f"--seeds {len(seeds)} --first-seed {seeds[0]}")
    return " ".join(words)


def machine(seeds: Sequence[Seed], meta: Mapping[str, Any]) -> str:
    """Time and versions: all that differs between two runs of the same numbers."""
    parts = [curves.time_spent(seeds)]
    if meta.get("seconds"):
        parts.append(markup.note(f"The last command took {meta['seconds'] / 60:.1f} minutes."))
    lines: list[list[markup.Cell]] = [["Python", platform.python_version()]]
    lines += [[name, _version(name)] for name in PACKAGES]
    lines.append(["processor", f"{platform.machine()}, {os.cpu_count()} logical cores"])
    parts.append(markup.table(("what", "version"), lines))
    return markup.section("Time and versions", *parts)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
