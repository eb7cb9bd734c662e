"""One HTML page of a run: ``fastrlhf report --run runs/qa``.

The run is a stage's folder (metrics.jsonl, config.toml, samples.jsonl), a folder of such folders as
``fastrlhf pipeline`` makes (base, sft, start, rm, ppo, eval), or one of ``fastrlhf demo``. The page
holds the curves, last values, time and work of every stage, evaluation with its intervals, samples
and settings. It needs nothing from elsewhere, and is the same bytes for the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from fastrlhf import markup, plots
from fastrlhf.errors import UserError
from fastrlhf.runfiles import last, read_config, read_json, read_lines, series
from fastrlhf.runlog import writable_dir

ORDER = ("base", "sft", "start", "rm", "ppo", "eval")
SAMPLES = 6  # of the first iteration and of the last one
STRETCH = 4  # iterations that are averaged to a point of the KL's course

# (title, unit of y, metrics that share the axes); a metric that none names gets a panel of its own.
GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "nats", ("loss", "heldout_loss", "validation_loss")),
    ("Pairs ordered rightly", "share", ("pair_accuracy", "heldout_accuracy")),
    ("Reward model's score", "score", ("score", "reward_score")),
    ("Reward with the KL penalty", "reward a response", ("reward", "return")),
    ("KL to the reference", "nats a response", ("kl",)),
    ("Entropy", "nats a token", ("entropy",)),
    ("Response length", "tokens", ("response_length",)),
    ("Responses that end", "share", ("ended",)),
    ("Pretraining loss (ptx)", "nats a token", ("ptx_loss",)),
    ("Policy loss", "", ("policy_loss",)),
    ("KL of one update", "nats a token", ("approx_kl",)),
    ("Clipped", "share of tokens", ("policy_clip_fraction", "value_clip_fraction")),
    ("Probability ratio", "mean", ("ratio",)),
    ("Value loss", "", ("value_loss",)),
    ("Explained variance of the values", "share", ("explained_variance",)),
    ("Gradient norm", "", ("grad_norm", "policy_grad_norm", "value_grad_norm")),
    ("Learning rate", "", ("lr",)),
    ("Weight of the KL penalty", "beta", ("beta",)),
)
NO_CURVE = (
    *("step", "seconds", "flop", "epoch"),
    *("heldout_accuracy_low", "heldout_accuracy_high"),
)


@dataclass(slots=True, kw_only=True)
class ReportConfig:
    """Settings of the report."""

    run: Path
    """Folder of a stage, of a pipeline or of a demonstration."""
    out: Path | None = None
    """File to write; by default report.html in the run's folder."""


def run(config: ReportConfig) -> Path:
    """Write the page; returns its path.

    Raises:
        UserError: the folder holds no run, or a file in it is broken.
    """
    path = config.out or config.run / "report.html"
    if path.is_dir():
        raise UserError.at(path, None, None, "is a folder: name a file")
    text = demo_page(config.run) if (config.run / "demo.json").is_file() else page(config.run)
    writable_dir(path.parent)
    staging = path.with_name(path.name + ".partial")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
    Console().print(f"{path}: the report", soft_wrap=True)
    return path


def page(folder: Path) -> str:
    """The page of a stage or of a folder of stages."""
    stages = stage_folders(folder)
    name = folder.resolve().name
    logs = {stage.name: read_lines(stage / "metrics.jsonl") for stage in stages}
    parts = [
        f"<h1>{escape(name)}</h1>",
        markup.note("What this run's stages logged, measured and said.", "quiet"),
        markup.section("Stages", overview(logs)),
    ]
    for stage in stages:
        parts.append(stage_section(stage, logs[stage.name]))
    return markup.document(name, parts)


def demo_page(folder: Path) -> str:
    """The page of a demonstration; its claims are judged again."""
    # Here: the demonstration brings torch and all stages with it.
    from fastrlhf.demo.claims import by_seed, judge_claims, load_seed
    from fastrlhf.demo.page import page as demonstration

    meta = read_json(folder / "demo.json")
    folders = [folder / f"seed-{seed}" for seed in meta.get("seeds", [])]
    for missing in (f for f in folders if not (f / "results.json").is_file()):
        raise UserError.at(missing, None, None, "has no results.json: this seed is not finished")
    if not folders:
        raise UserError.at(folder / "demo.json", None, "seeds", "names no seed")
    seeds = [load_seed(seed) for seed in folders]
    return demonstration(seeds, judge_claims(seeds), by_seed(seeds), meta)


def stage_folders(folder: Path) -> list[Path]:
    """The stages' folders of a run, in the order of the method; a stage's own folder is one.

    Raises:
        UserError: there is no folder, or nothing of a run in it.
    """
    if not folder.is_dir():
        what = "a file, not a run's folder" if folder.exists() else "no such folder"
        raise UserError.at(folder, None, None, what)
    if _is_stage(folder):
        return [folder]
    found = [part for part in folder.iterdir() if part.is_dir() and _is_stage(part)]
    if not found:
        message = "holds no run: no metrics.jsonl or eval.json in it or in a folder under it"
        raise UserError.at(folder, None, None, message)
    place = {name: index for index, name in enumerate(ORDER)}
    return sorted(found, key=lambda part: (place.get(part.name, len(ORDER)), part.name))


def _is_stage(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "eval.json"))


# --- parts of the page --------------------------------------------------------------------------


def overview(logs: dict[str, list[dict[str, Any]]]) -> str:
    """A line a stage: steps, time and work."""
    lines: list[list[markup.Cell]] = []
    for name, records in logs.items():
        if records:
            numbers = [last(records, key) for key in ("step", "seconds", "flop")]
            lines.append([name, *("not logged" if n is None else n for n in numbers)])
    return markup.table(("stage", "steps", "seconds", "flop"), lines) if lines else ""


def stage_section(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    """Everything about one stage."""
    config = read_config(folder)
    kind = next(iter(config), "")
    title = folder.resolve().name
    parts = []
    if records:
        parts.append(curve_panels(records))
        parts.append(markup.fold("Last values", last_values(records)))
    elif (folder / "metrics.jsonl").is_file():
        parts.append(markup.absent("a first step; the log is empty"))
    if (folder / "eval.json").is_file():
        parts.append(evaluation(folder / "eval.json"))
    if samples := read_lines(folder / "samples.jsonl"):
        parts.append(sample_table(samples))
    if config:
        parts.append(markup.fold("Settings", markup.settings(config)))
    return markup.section(title if kind in ("", title) else f"{title} ({kind})", *parts)


def curve_panels(records: Sequence[dict[str, Any]]) -> str:
    """A panel for each group of metrics that the log has; for PPO also the KL against the score."""
    logged = list(dict.fromkeys(name for record in records for name in record))
    grouped = {name for _, _, names in GROUPS for name in names}
    rest = [(name, "", (name,)) for name in logged if name not in grouped and name not in NO_CURVE]
    pictures = []
    for title, unit, names in (*GROUPS, *rest):
        there = [name for name in names if name in logged]
        if there == ["beta"] and len(set(series(records, "beta")[1])) == 1:
            continue  # a setting, not a course
        if there:
            pictures.append(_curves(title, unit, there, records))
    if "kl" in logged and "score" in logged:
        pictures.insert(0, _kl_panel(records))
    return markup.panels(pictures, "Long curves are averaged over short stretches of steps.")


def _curves(title: str, unit: str, names: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    looks = [plots.look(name, index) for index, name in enumerate(names)]

    def paint(axes: Any) -> None:
        for name, how in zip(names, looks, strict=True):
            plots.curve(axes, *series(records, name), how)

    key = plots.legend(looks) if len(names) > 1 else ""
    about = f"{title}: {', '.join(how.label for how in looks)} over steps"
    return f"<div>{plots.panel(title, paint, x='step', y=unit, about=about)}{key}</div>"


def _kl_panel(records: Sequence[dict[str, Any]]) -> str:
    kl, score = (_stretches(series(records, name)[1]) for name in ("kl", "score"))

    def paint(axes: Any) -> None:
        plots.curve(axes, kl, score, plots.look("ppo"))

    picture = plots.panel("Score against KL", paint, x="KL to the reference (nats)", y="score")
    return f"<div>{picture}</div>"


def _stretches(values: Sequence[float]) -> list[float]:
    """Means of STRETCH values at a time."""
    parts = [values[i : i + STRETCH] for i in range(0, len(values), STRETCH)]
    return [sum(part) / len(part) for part in parts]


def last_values(records: Sequence[dict[str, Any]]) -> str:
    """The last value of every metric, and the step it was logged at."""
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    lines: list[list[markup.Cell]] = []
    for name in names:
        steps, values = series(records, name)
        lines.append([name, values[-1], steps[-1]])
    return markup.table(("metric", "last value", "at step"), lines)


def evaluation(path: Path) -> str:
    """The figures of eval.json with their intervals, drawn on a scale that like ones share."""
    found = read_json(path)
    for name, value in found.items():
        if not isinstance(value, dict) or not {"mean", "low", "high", "n"} <= value.keys():
            raise UserError.at(path, None, name, "wanted mean, low, high and n")
    spans: dict[str, list[float]] = {}
    for name, value in found.items():
        if "rate" in name or "accuracy" in name:
            spans[name] = [0.0, 1.0]
        else:
            spans.setdefault(_measure(name), []).extend((value["low"], value["high"]))
    lines: list[list[markup.Cell]] = []
    for name, value in found.items():
        estimate = (value["mean"], value["low"], value["high"])
        span = spans.get(name) or spans[_measure(name)]
        low, high = min(span), max(span)
        room = 0.1 * (high - low) if name not in spans else 0.0
        half = 0.5 if "win rate" in name else None
        bar = plots.interval_bar(estimate, low - room, high + room, half)
        text = f"{value['low']:.4f} to {value['high']:.4f}"
        lines.append([name, float(value["mean"]), text, markup.Html(bar), value["n"]])
    head = ("measure", "mean", "95 % interval", "", "n")
    return markup.table(head, lines)


def _measure(name: str) -> str:
    """What is measured, without whose it is: both models' losses share a scale."""
    return name.split(": ", 1)[-1]


def sample_table(samples: Sequence[dict[str, Any]]) -> str:
    """Some samples of the first iteration and of the last one, in the order of the file."""
    iterations = [record["iteration"] for record in samples]
    lines: list[list[markup.Cell]] = []
    for iteration in dict.fromkeys((min(iterations), max(iterations))):
        lines.append([f"iteration {iteration}"])
        some = [r for r in samples if r["iteration"] == iteration][:SAMPLES]
        lines += [
            [r["prompt"], r["response"] + ("" if r["ended"] else " ..."), float(r["score"])]
            for r in some
        ]
    caption = markup.note("A response that did not come to its end closes with dots.", "quiet")
    return "<h3>Samples</h3>" + markup.table(("prompt", "response", "score"), lines) + caption
