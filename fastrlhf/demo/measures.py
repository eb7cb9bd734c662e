"""The demonstration's figures that are drawn from what was measured (arrays.npz, results.json).

Every figure pools the seeds and carries a 95 % interval over test prompts, documents or quizzes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from fastrlhf import markup
from fastrlhf.demo.claims import (
    Seed,
    accuracy,
    habit_rate,
    has,
    loss_difference,
    pooled,
    win_rate,
)
from fastrlhf.demo.curves import variant_looks
from fastrlhf.demo.text import interval_text
from fastrlhf.metrics import Interval, mean_interval, ratio_interval
from fastrlhf.plots import INK, LOOKS, Estimate, Look, bars, legend, panel, points, rows

SIZES = ("small-", "", "large-")
SIZE_NAMES = {"small-": "small", "": "base size", "large-": "large"}
MODELS = ("base", "prompted", "sft", "ppo", "ppo-ptx")
# The paper's own work in petaflop/s-days at 175B: SFT, PPO-ptx, against GPT-3's pretraining.
PAPER_WORK = {"base": 3640.0, "sft": 4.9, "ppo-ptx": 60.0}


def _estimate(value: Interval) -> Estimate:
    return value.mean, value.low, value.high


# --- win rates ----------------------------------------------------------------------------------


def win_rates(seeds: Sequence[Seed]) -> str:
    """Win rate against SFT by model size, as in the paper's figure 1."""
    sizes: dict[str, int] = seeds[0].results["parameters"]
    drawn: dict[str, list[tuple[int, Interval]]] = {}
    for name in MODELS:
        for prefix in SIZES:
            model = prefix + name
            # The prompted base model is the base model under another prompt.
            weights = sizes.get(model.replace("prompted", "base"))
            if weights is not None and has(seeds, f"wins/{model}"):
                drawn.setdefault(name, []).append((weights, win_rate(seeds, model)))
            elif weights is not None and model == "sft":
                half = Interval(0.5, 0.5, 0.5, 0)  # the baseline: half by definition
                drawn.setdefault(name, []).append((weights, half))
    if drawn.keys() <= {"sft"}:
        return markup.section("Win rate against SFT", markup.absent("win rates"))
    ticks = {p: sizes[p + "base"] for p in SIZES if p + "base" in sizes}

    def paint(axes: Axes) -> None:
        axes.axhline(0.5, color=INK, linestyle="--", linewidth=0.9)
        for index, (name, values) in enumerate(drawn.items()):
            # A small shift of each line keeps error bars apart on the logarithmic axis.
            shift = 1.03 ** (index - 0.5 * (len(drawn) - 1))
            points(
                axes,
                [weights * shift for weights, _ in values],
                [_estimate(value) for _, value in values],
                LOOKS[name],
            )
        axes.set_xscale("log")
        labels = [f"{weights / 1e6:.2f}M\n{SIZE_NAMES[p]}" for p, weights in ticks.items()]
        axes.set_xticks(list(ticks.values()), labels)
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(ticks.values()) / 1.3, max(ticks.values()) * 1.3)
        axes.set_ylim(0.0, max(1.0, axes.get_ylim()[1]))

    picture = panel(
        "Win rate against the base-size SFT model",
        paint,
        x="parameters (logarithmic)",
        y="win rate",
        size=(6.0, 3.8),
    )
    lines: list[list[markup.Cell]] = [
        [LOOKS[name].label, weights, "the baseline" if value.n == 0 else interval_text(value)]
        for name, values in drawn.items()
        for weights, value in values
    ]
    return markup.section(
        "Win rate against SFT",
        markup.note(
            "The hidden rule judges answers to prompts of users that no stage has seen; a tie "
            "counts half. After the paper's figure 1; bars are 95 % intervals."
        ),
        legend(LOOKS[name] for name in drawn),
        f"<figure>{picture}</figure>",
        markup.fold(
            "The figures as a table", markup.table(("model", "parameters", "win rate"), lines)
        ),
    )


# --- the alignment tax --------------------------------------------------------------------------


def text_loss_change(seeds: Sequence[Seed], model: str, kind: str | None) -> Interval:
    """Loss a token of held-out text less that of PPO's start, over documents of a kind or all."""
    change = pooled(seeds, f"loss/{model}") - pooled(seeds, "loss/start")
    tokens = pooled(seeds, "tokens")
    where = np.ones(len(tokens), bool) if kind is None else pooled(seeds, "kind") == kind
    return ratio_interval(change[where], tokens[where])


def probe_change(seeds: Sequence[Seed], model: str, task: str | None) -> Interval:
    """Probability of the right answer less that of PPO's start, over quizzes of a task or all."""
    change = pooled(seeds, f"probe/{model}") - pooled(seeds, "probe/start")
    where = np.ones(len(change), bool) if task is None else pooled(seeds, "probe_task") == task
    return mean_interval(change[where])


def tax(seeds: Sequence[Seed]) -> str:
    """What PPO costs on text and quizzes, by kind; in the long demonstration by beta and gamma."""
    title = "The alignment tax"
    names = ("start", "ppo", "ppo-ptx")
    needed = [f"{part}/{name}" for part in ("loss", "probe") for name in names]
    if missing := [name for name in needed if not has(seeds, name)]:
        return markup.section(title, markup.absent("the arrays " + ", ".join(missing)))
    looks = [LOOKS["ppo"], LOOKS["ppo-ptx"]]
    pictures, lines = [], list[list[markup.Cell]]()
    for what, change, groups, unit in (
        ("Held-out text: loss", text_loss_change, "kind", "change in nats a token"),
        ("Quizzes: right answer", probe_change, "probe_task", "change in probability"),
    ):
        kinds: list[str | None] = [None, *sorted(set(pooled(seeds, groups).tolist()))]
        found = {
            how: [change(seeds, name, kind) for kind in kinds]
            for how, name in zip(looks, ("ppo", "ppo-ptx"), strict=True)
        }
        labels = ["all", *(str(kind) for kind in kinds[1:])]
        pictures.append(panel(what, _row_painter(labels, found), x=unit, size=(4.2, 3.2)))
        lines.append([f"{what}, {unit}"])
        lines += [
            [label, *(interval_text(values[at]) for values in found.values())]
            for at, label in enumerate(labels)
        ]
    head = ("kind", "PPO less its start", "PPO-ptx less its start")
    return markup.section(
        title,
        markup.note(
            "Change from the model that PPO starts from. Worse is to the right for the loss of "
            "held-out pretraining text, and to the left for the probability of right quiz answers."
        ),
        legend(looks),
        markup.panels(pictures),
        markup.fold("The figures as a table", markup.table(head, lines)),
        reward_against_loss(seeds),
    )


def _row_painter(
    labels: Sequence[str], found: dict[Look, list[Interval]], reference: float = 0.0
) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        estimates = {how: [_estimate(v) for v in values] for how, values in found.items()}
        rows(axes, labels, estimates, reference)

    return paint


def reward_against_loss(seeds: Sequence[Seed]) -> str:
    """Reward against text loss for every beta and gamma; empty in the short demonstration."""
    betas, gammas = variant_looks(False), variant_looks(True)
    if not all(has(seeds, f"loss/{name}") for name in (*betas, *gammas)):
        return ""
    plain = {"ppo": "chosen"} | {name: how.label.split()[-1] for name, how in betas.items()}
    ptx = {"ppo-ptx": "chosen"} | {name: how.label.split()[-1] for name, how in gammas.items()}
    families = (
        (replace(LOOKS["ppo"], label="PPO, by its beta"), plain, (5, -10), "left"),
        (replace(LOOKS["ppo-ptx"], label="PPO-ptx, by its gamma"), ptx, (-5, 5), "right"),
    )

    def paint(measure: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for how, members, shift, side in families:
                for name, label in members.items():
                    loss = loss_difference(seeds, name, "start")
                    value = mean_interval(pooled(seeds, f"{measure}/{name}"))
                    axes.errorbar(
                        loss.mean,
                        value.mean,
                        xerr=[[loss.mean - loss.low], [loss.high - loss.mean]],
                        yerr=[[value.mean - value.low], [value.high - value.mean]],
                        color=how.colour,
                        marker=how.marker,
                        elinewidth=1.0,
                    )
                    axes.annotate(
                        label,
                        (loss.mean, value.mean),
                        xytext=shift,
                        textcoords="offset points",
                        horizontalalignment=side,
                        fontsize=7.5,
                    )
            axes.axvline(0.0, color=INK, linewidth=0.8)
            axes.margins(x=0.15, y=0.12)

        return draw

    x = "text loss less the start's (nats a token)"
    size = (4.6, 3.4)
    pictures = [
        panel("Reward model's score", paint("score"), x=x, y="score", size=size),
        panel("Hidden rule", paint("gold"), x=x, y="score", size=size),
    ]
    text = "Up is better, left is less tax. The question is which reward costs which text loss."
    return (
        "<h3>Reward against text loss, by beta and gamma</h3>"
        + markup.note(text)
        + legend(how for how, *_ in families)
        + markup.panels(pictures)
    )


# --- habits -------------------------------------------------------------------------------------

HABITS = {
    "task": "task right",
    "constraint": "constraint kept",
    "invented": "made-up answer",
    "rude": "rude",
}


def habits(seeds: Sequence[Seed]) -> str:
    """How often answers are right, keep constraints, make things up, are rude."""
    models = [m for m in MODELS if all(has(seeds, f"{habit}/{m}") for habit in HABITS)]
    if not models:
        return markup.section("Habits", markup.absent("the verdicts of the hidden rule"))
    found = {m: {habit: habit_rate(seeds, habit, m) for habit in HABITS} for m in models}

    def paint(shown: Sequence[str]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            series = {LOOKS[m]: [_estimate(found[m][habit]) for habit in shown] for m in models}
            bars(axes, [HABITS[habit] for habit in shown], series)
            axes.set_ylim(bottom=0.0)

        return draw

    kept, broken = ("task", "constraint"), ("invented", "rude")
    lines: list[list[markup.Cell]] = [
        [LOOKS[m].label, *(interval_text(found[m][habit]) for habit in HABITS)] for m in models
    ]
    return markup.section(
        "Habits of the answers",
        markup.note(
            "Share of answers, each where it can occur: task right where there is an answer, "
            "constraint kept where one was asked for, made-up answers where there is none."
        ),
        legend(LOOKS[m] for m in models),
        markup.panels(
            [
                panel("Wanted", paint(kept), y="share of answers"),
                panel("Not wanted", paint(broken), y="share of answers"),
            ]
        ),
        markup.fold("The figures as a table", markup.table(("model", *HABITS.values()), lines)),
    )


# --- reward models ------------------------------------------------------------------------------

JUDGES = {"own": "own labelers", "others": "held-out labelers", "rule": "hidden rule"}
REWARD_MODELS = {
    "rm": Look("reward model", "#0072B2", "o"),
    "rm-kwise": Look("few prompts, K-wise", "#009E73", "v"),
    "rm-shuffled": Look("few prompts, pairs shuffled", "#D55E00", "s"),
}


def reward_model_accuracy(seeds: Sequence[Seed]) -> str:
    """Pairs ordered rightly, against each set of judges, and how far labelers agree."""
    title = "Reward models"
    models = [m for m in REWARD_MODELS if all(has(seeds, f"right/{m}/{j}") for j in JUDGES)]
    if not models:
        return markup.section(title, markup.absent("the reward models' accuracy"))
    found = {m: [accuracy(seeds, m, judge) for judge in JUDGES] for m in models}
    agreement = float(np.mean([s.results["reward_models"]["agreement"] for s in seeds]))
    looks = {REWARD_MODELS[m]: values for m, values in found.items()}
    picture = panel(
        "Pairs of held-out prompts ordered rightly",
        _row_painter(list(JUDGES.values()), looks, agreement),
        x="share of decided pairs",
        size=(5.2, 2.9),
    )
    lines: list[list[markup.Cell]] = [
        [REWARD_MODELS[m].label, *map(interval_text, values)] for m, values in found.items()
    ]
    lines.append(["labelers agree with each other", f"{agreement:.3f}", None, None])
    return markup.section(
        title,
        markup.note(
            "The upright line is how often two simulated labelers agree on a pair that both "
            f"decided: {agreement:.3f}. Chance is 0.5. K-wise and shuffled models saw the same few "
            "prompts once."
        ),
        legend(looks),
        f"<figure>{picture}</figure>",
        markup.table(("model", *JUDGES.values()), lines),
    )


# --- sizes and work -----------------------------------------------------------------------------

STAGES = {
    "base": "pretraining",
    "sft": "SFT",
    "start": "PPO's start",
    "rm": "reward model",
    "ppo": "PPO",
    "ppo-ptx": "PPO-ptx",
    "sft-16": "SFT, 16 epochs",
}


def work(seeds: Sequence[Seed]) -> str:
    """Size of every model and the work of its stage, against pretraining at the same size."""
    sizes: dict[str, int] = seeds[0].results["parameters"]
    flop = {
        name: float(np.mean([seed.results["flop"][name] for seed in seeds]))
        for name in seeds[0].results["flop"]
        if all(name in seed.results["flop"] for seed in seeds)
    }
    lines: list[list[markup.Cell]] = []
    for prefix in SIZES:
        whole = flop.get(prefix + "base")
        stages = [stage for stage in STAGES if prefix + stage in flop]
        if stages:
            lines.append([SIZE_NAMES[prefix]])
        for stage in stages:
            spent = flop[prefix + stage]
            paper = None if prefix else PAPER_WORK.get(stage)
            lines.append(
                [
                    STAGES[stage],
                    sizes.get(prefix + stage),
                    spent,
                    None if whole is None else f"{spent / whole:.2%}",
                    None if paper is None else f"{paper / PAPER_WORK['base']:.2%}",
                ]
            )
    if not lines:
        return markup.section("Sizes and work", markup.absent("the stages' work"))
    head = ("stage", "parameters", "flop", "share of pretraining", "the paper's share, 175B")
    return markup.section(
        "Sizes and work",
        markup.note(
            "Two flop a weight and token forward, six with the backward pass, attention's own "
            "products left out; mean over seeds. All models of PPO are counted."
        ),
        markup.table(head, lines),
    )
