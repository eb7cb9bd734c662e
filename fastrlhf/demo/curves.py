"""The demonstration's figures that are drawn from the stages' logs: training, KL against reward.

Thin lines are seeds, a thick one is their mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fastrlhf import markup, world
from fastrlhf.demo.claims import Seed
from fastrlhf.demo.miniature import BETAS, GAMMAS
from fastrlhf.plots import INK, LOOKS, Look, curves, legend, panel
from fastrlhf.runfiles import read_lines, series

STRETCH = 4  # PPO iterations that are averaged to one point of a course over the KL

Course = tuple[list[float], list[float]]

TRAINED, HELD_OUT = Look("training", "#0072B2"), Look("held out", "#D55E00", "s")
BETA_COLOURS = ("#0D5C8C", "#56B4E9", "#CC79A7", "#7f7f7f", "#D55E00")  # of BETAS and more
GAMMA_COLOURS = ("#0D5C8C", "#56B4E9", "#CC79A7")


def variant_looks(gammas: bool) -> dict[str, Look]:
    """Names and looks of the long demonstration's PPO runs at other betas, or at other gammas."""
    if gammas:
        return {
            f"ppo-gamma-{value:g}": Look(f"gamma {value:g}", colour, "v")
            for value, colour in zip(GAMMAS, GAMMA_COLOURS, strict=False)
        }
    return {
        f"ppo-beta-{value:g}": Look(f"beta {value:g}", colour, "^")
        for value, colour in zip(BETAS, BETA_COLOURS, strict=False)
    }


def courses(seeds: Sequence[Seed], stage: str, metric: str) -> list[Course]:
    """A metric's course in every seed that logged it."""
    found = [series(read_lines(seed.out / stage / "metrics.jsonl"), metric) for seed in seeds]
    return [course for course in found if course[0]]


def _lines(*drawn: tuple[list[Course], Look]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for runs, how in drawn:
            if runs:
                curves(axes, runs, how)

    return paint


# --- training -----------------------------------------------------------------------------------


def training(seeds: Sequence[Seed]) -> str:
    """Curves of pretraining, SFT and reward model, then of PPO and PPO-ptx."""
    pictures, missing = [], []
    for what, stage, names, unit in (
        ("Pretraining loss", "base", ("loss", "heldout_loss"), "nats a token"),
        ("SFT loss", "sft", ("loss", "validation_loss"), "nats a token"),
        (
            "Reward model: pairs ordered rightly",
            "rm",
            ("pair_accuracy", "heldout_accuracy"),
            "share",
        ),
    ):
        drawn = [courses(seeds, stage, name) for name in names]
        if not any(drawn):
            missing.append(what)
            continue
        paint = _lines(*zip(drawn, (TRAINED, HELD_OUT), strict=True))
        pictures.append(panel(what, paint, x="step", y=unit))
    ppo = [LOOKS["ppo"], LOOKS["ppo-ptx"]]
    steps = []
    for what, name, unit in (
        ("Reward model's score", "score", "score"),
        ("KL to the start", "kl", "nats a response"),
        ("Entropy", "entropy", "nats a token"),
    ):
        drawn = [courses(seeds, stage, name) for stage in ("ppo", "ppo-ptx")]
        if not any(drawn):
            missing.append(f"{what.lower()} of PPO")
            continue
        steps.append(panel(what, _lines(*zip(drawn, ppo, strict=True)), x="iteration", y=unit))
    return markup.section(
        "Training curves",
        markup.note("Thin lines are seeds, the thick line is their mean."),
        (legend([TRAINED, HELD_OUT]) + markup.panels(pictures)) if pictures else "",
        (legend(ppo) + markup.panels(steps)) if steps else "",
        markup.absent(", ".join(missing)) if missing else "",
    )


# --- KL against reward --------------------------------------------------------------------------


def rule_by_iteration(seed: Seed, stage: str) -> dict[int, float]:
    """The hidden rule's mean over an iteration's kept samples; empty where none were kept.

    Prompts are joined to their instructions by the world's prompts_ppo.jsonl.
    """
    samples = read_lines(seed.out / stage / "samples.jsonl")
    prompts = seed.out / "world" / "prompts_ppo.jsonl"
    if not samples or not prompts.is_file():
        return {}
    made = world.read_world(seed.out / "world")
    asked = {
        record["prompt"]: world.Instruction.from_dict(record["instruction"])
        for record in read_lines(prompts)
    }
    scores: dict[int, list[float]] = {}
    for sample in samples:
        words = sample["response"].split()
        verdict = world.judge(made, asked[sample["prompt"]], words, sample["ended"])
        scores.setdefault(int(sample["iteration"]), []).append(verdict.score)
    return {iteration: float(np.mean(found)) for iteration, found in scores.items()}


def against_kl(seeds: Sequence[Seed], stage: str) -> tuple[Course, Course] | None:
    """(KL, score) and (KL, hidden rule) of a PPO run: means over seeds and STRETCH iterations."""
    kl, score, rule = [], [], []
    for seed in seeds:
        log = read_lines(seed.out / stage / "metrics.jsonl")
        if not log:
            return None
        kl.append(_stretches(series(log, "kl")[1]))
        score.append(_stretches(series(log, "score")[1]))
        judged = rule_by_iteration(seed, stage)
        rule.append(_stretches([judged.get(int(r["step"]), np.nan) for r in log if "kl" in r]))
    length = min(map(len, kl))
    means = [np.mean([part[:length] for part in parts], axis=0).tolist() for parts in (kl, score)]
    judged_mean = np.mean([part[:length] for part in rule], axis=0).tolist()
    return (means[0], means[1]), (means[0], judged_mean)


def _stretches(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[i : i + STRETCH])) for i in range(0, len(values), STRETCH)]


def kl_against_reward(seeds: Sequence[Seed]) -> str:
    """What PPO gains for the KL it spends: by the reward model, and by the rule it never saw."""
    parts = [_kl_pair(seeds, {name: LOOKS[name] for name in ("ppo", "ppo-ptx")}, "")]
    chosen = _chosen_beta(seeds[0].out / "ppo")
    betas = {"ppo": Look(f"beta {chosen}, chosen", LOOKS["ppo"].colour, "^")} | variant_looks(False)
    if (seeds[0].out / next(reversed(betas))).is_dir():
        parts += ["<h3>Plain PPO at other betas</h3>", _kl_pair(seeds, betas, ", by beta")]
    text = (
        f"Each mark is the mean of {STRETCH} iterations over all seeds; a course starts at the "
        "left, where the policy still is its reference."
    )
    return markup.section("KL against reward", markup.note(text), *parts)


def _chosen_beta(stage: Path) -> str:
    steps = read_lines(stage / "metrics.jsonl")
    return f"{steps[0]['beta']:g}" if steps and "beta" in steps[0] else "unknown"


def _kl_pair(seeds: Sequence[Seed], looks: dict[str, Look], extra: str) -> str:
    found = {
        how: course
        for name, how in looks.items()
        if (course := against_kl(seeds, name)) is not None
    }
    if not found:
        return markup.absent("the logs of PPO and PPO-ptx")

    def paint(which: int) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for how, pair in found.items():
                x, y = pair[which]
                axes.plot(x, y, color=how.colour, marker=how.marker, markersize=3.5, alpha=0.9)
                axes.plot(x[-1:], y[-1:], color=how.colour, marker=how.marker, markersize=8.0)

        return draw

    x = "KL to the start (nats a response)"
    pictures = [panel(f"By the reward model{extra}", paint(0), x=x, y="score")]
    rest = ""
    if any(np.isfinite(pair[1][1]).any() for pair in found.values()):
        pictures.append(panel(f"By the hidden rule{extra}", paint(1), x=x, y="hidden rule's score"))
    else:
        rest = markup.absent("samples of each iteration for the hidden rule to judge")
    caption = "The large mark is where a run ended."
    return legend(found) + markup.panels(pictures, caption) + rest


# --- the long SFT -------------------------------------------------------------------------------


def sft_overfitting(seeds: Sequence[Seed]) -> str:
    """Validation loss and reward score by epoch of the long SFT; empty where it was not run."""
    logs = [read_lines(seed.out / "sft-16" / "metrics.jsonl") for seed in seeds]
    rows = [[r for r in log if "validation_loss" in r] for log in logs]
    if not all(rows):
        return ""
    pictures = []
    for what, name, unit, colour in (
        ("Validation loss", "validation_loss", "nats a token", HELD_OUT.colour),
        ("Reward model's score of samples", "reward_score", "score", LOOKS["ppo-ptx"].colour),
    ):
        runs: list[Course] = []
        for found in rows:
            values = [float(r[name]) for r in found if r.get(name) is not None]
            runs.append(([float(epoch) for epoch in range(1, len(values) + 1)], values))
        paint = _marked_best(runs, Look(what, colour), lowest=name == "validation_loss")
        pictures.append(panel(what, paint, x="epoch", y=unit))
    text = (
        "The paper's 16 epochs with residual dropout 0.2. The dotted line marks the epoch with the "
        "best mean value."
    )
    return markup.section("SFT overfits by loss", markup.note(text), markup.panels(pictures))


def _marked_best(runs: list[Course], how: Look, *, lowest: bool) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        curves(axes, runs, how)
        length = min(len(values) for _, values in runs)
        mean = np.mean([values[:length] for _, values in runs], axis=0)
        best = int(np.argmin(mean) if lowest else np.argmax(mean)) + 1
        axes.axvline(best, color=INK, linewidth=0.8, linestyle=":")

    return paint


# --- time ---------------------------------------------------------------------------------------

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pretraining", ("pretrain", "large base")),
    ("SFT", ("sft", "start", "sft 16 epochs")),
    ("world and comparisons", ("world", "comparisons")),
    ("reward models", ("reward model", "pairings")),
    ("PPO and PPO-ptx", ("ppo", "ppo-ptx")),
    ("the small model's stages", ("small model",)),
    ("examination", ("examination",)),
)
TIME_COLOURS = ("#7f7f7f", "#0072B2", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9", "#009E73")
VARIANTS = Look("PPO at other betas and gammas", "#B8A21D", "s", "-")


def time_spent(seeds: Sequence[Seed]) -> str:
    """A bar a seed: seconds of each kind of phase; the phases themselves in a table."""
    clocks: dict[str, dict[str, float]] = {}
    for seed in seeds:
        path = seed.out / "phases.json"
        if path.is_file():
            clocks[f"seed {seed.results['seed']}"] = json.loads(path.read_text(encoding="utf-8"))
    if not clocks:
        return markup.absent("the time of phases (phases.json)")
    kind_of = {phase: kind for kind, phases in KINDS for phase in phases}
    looks = {k: Look(k, c, "s") for (k, _), c in zip(KINDS, TIME_COLOURS, strict=True)}
    looks[VARIANTS.label] = VARIANTS
    minutes = {
        kind: [
            sum(s for phase, s in clock.items() if kind_of.get(phase, VARIANTS.label) == kind) / 60
            for clock in clocks.values()
        ]
        for kind in looks
    }
    there = [kind for kind, values in minutes.items() if any(values)]

    def paint(axes: Axes) -> None:
        left = np.zeros(len(clocks))
        for kind in there:
            axes.barh(range(len(clocks)), minutes[kind], left=left, color=looks[kind].colour)
            left += minutes[kind]
        axes.set_yticks(range(len(clocks)), list(clocks))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    height = 1.0 + 0.35 * len(clocks)
    picture = panel("Time of a seed", paint, x="minutes", size=(6.0, height))
    phases = dict.fromkeys(phase for clock in clocks.values() for phase in clock)
    lines: list[list[Any]] = [
        [phase, *(clock.get(phase) for clock in clocks.values())] for phase in phases
    ]
    lines.append(["all", *(round(sum(clock.values()), 2) for clock in clocks.values())])
    table = markup.table(("phase, seconds", *clocks), lines)
    key = legend(looks[kind] for kind in there)
    return f"{key}<figure>{picture}</figure>" + markup.fold("Seconds of every phase", table)
