"""The paper's findings that a miniature can check, judged on what was measured.

Each claim is a list of comparisons, and is shown when all of them hold beyond their 95 % interval,
pooled over seeds. An interval is over test prompts, documents or quizzes; what varies from seed to
seed beyond that shows in ``by_seed``, which judges each seed alone. Nothing here can make a claim
come out: a run that does not show one says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf.demo.miniature import BETAS, GAMMAS
from fastrlhf.metrics import Interval, mean_interval, ratio_interval


@dataclass(slots=True, frozen=True)
class Seed:
    """What one seed left behind."""

    out: Path
    results: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(slots=True, frozen=True)
class Check:
    """One comparison: a measured difference that should be above 0 (or below, or near)."""

    text: str
    value: Interval
    wanted: str  # "above", "below", "not above", "not below"
    bound: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether it holds beyond the interval ("not" forms: is not refuted by the interval)."""
        if self.wanted == "above":
            return self.value.low > self.bound
        if self.wanted == "below":
            return self.value.high < self.bound
        if self.wanted == "not above":
            return self.value.low <= self.bound
        return self.value.high >= self.bound


@dataclass(slots=True, frozen=True)
class Claim:
    """A finding of the paper and how it fared here."""

    number: int
    title: str
    checks: tuple[Check, ...]

    @property
    def shown(self) -> bool:
        """Whether every comparison holds."""
        return bool(self.checks) and all(check.holds for check in self.checks)


def load_seed(out: Path) -> Seed:
    """Read results.json and arrays.npz of a seed's folder."""
    with np.load(out / "arrays.npz") as file:
        arrays = dict(file)
    return Seed(out, json.loads((out / "results.json").read_text(encoding="utf-8")), arrays)


def judge_claims(seeds: Sequence[Seed]) -> list[Claim]:
    """All claims that the seeds' runs cover, pooled over them."""
    makers: list[Callable[[Sequence[Seed]], Claim | None]] = [
        order_of_models,
        small_beats_large,
        sft_overfits,
        reward_accuracy,
        over_optimisation,
        alignment_tax,
        habits,
        bookkeeping,
    ]
    return [claim for make in makers if (claim := make(seeds)) is not None]


def by_seed(seeds: Sequence[Seed]) -> dict[int, list[bool]]:
    """For each claim's number, whether each seed alone shows it."""
    found: dict[int, list[bool]] = {}
    for seed in seeds:
        for claim in judge_claims([seed]):
            found.setdefault(claim.number, []).append(claim.shown)
    return found


# --- pooled measures ----------------------------------------------------------------------------


def pooled(seeds: Sequence[Seed], name: str) -> np.ndarray:
    """An array of all seeds, end to end."""
    return np.concatenate([seed.arrays[name] for seed in seeds])


def has(seeds: Sequence[Seed], name: str) -> bool:
    """Whether every seed measured this."""
    return all(name in seed.arrays for seed in seeds)


def win_rate(seeds: Sequence[Seed], name: str) -> Interval:
    """Win rate of a model against SFT."""
    return mean_interval(pooled(seeds, f"wins/{name}"))


def difference(seeds: Sequence[Seed], measure: str, one: str, other: str) -> Interval:
    """Mean of one model's measure less another's, paired by unit."""
    a, b = pooled(seeds, f"{measure}/{one}"), pooled(seeds, f"{measure}/{other}")
    return mean_interval(a - b)


def loss_difference(seeds: Sequence[Seed], one: str, other: str) -> Interval:
    """Loss a token of held-out text, one model's less another's, paired by document (nats)."""
    a, b = pooled(seeds, f"loss/{one}"), pooled(seeds, f"loss/{other}")
    return ratio_interval(a - b, pooled(seeds, "tokens"))


def accuracy(seeds: Sequence[Seed], model: str, label: str) -> Interval:
    """Share of decided pairs that a reward model orders as a set of labelers did."""
    right, pairs = (pooled(seeds, f"{part}/{model}/{label}") for part in ("right", "pairs"))
    return ratio_interval(right, pairs)


def habit_rate(seeds: Sequence[Seed], habit: str, model: str) -> Interval:
    """How often a habit shows, among the prompts where it can."""
    values = pooled(seeds, f"{habit}/{model}")
    where = np.ones(len(values), dtype=bool)
    if habit in ("task", "invented"):
        where = pooled(seeds, "has_answer") == (habit == "task")
    elif habit == "constraint":
        where = pooled(seeds, "constrained")
    return mean_interval(values[where])


# --- the claims ---------------------------------------------------------------------------------


def order_of_models(seeds: Sequence[Seed]) -> Claim:
    """Claim 1."""
    prompted = pooled(seeds, "wins/prompted")
    return Claim(
        1,
        "win rate against SFT: base < base prompted < SFT < PPO and PPO-ptx",
        (
            Check(
                "base prompted less base, win rate",
                mean_interval(prompted - pooled(seeds, "wins/base")),
                "above",
            ),
            Check("base prompted against SFT, win rate", mean_interval(prompted), "below", 0.5),
            Check("PPO against SFT, win rate", win_rate(seeds, "ppo"), "above", 0.5),
            Check("PPO-ptx against SFT, win rate", win_rate(seeds, "ppo-ptx"), "above", 0.5),
        ),
    )


def small_beats_large(seeds: Sequence[Seed]) -> Claim | None:
    """Claim 2."""
    if not has(seeds, "gold/large-base"):
        return None
    sizes = seeds[0].results["parameters"]
    times = sizes["large-base"] / sizes["ppo-ptx"]
    return Claim(
        2,
        f"a small aligned model beats a base model {times:.1f} times its size",
        (
            Check(
                "PPO-ptx less the large base, win rate against SFT",
                difference(seeds, "wins", "ppo-ptx", "large-base"),
                "above",
            ),
        ),
    )


def sft_overfits(seeds: Sequence[Seed]) -> Claim | None:
    """Claim 3: the last of 16 epochs against the one with the best validation loss."""
    if not has(seeds, "sft-16/loss/last"):
        return None
    loss = pooled(seeds, "sft-16/loss/last") - pooled(seeds, "sft-16/loss/best")
    score = pooled(seeds, "sft-16/score/last") - pooled(seeds, "sft-16/score/best")
    return Claim(
        3,
        "SFT validation loss overfits while the reward model's score still rises",
        (
            Check(
                "validation loss, last epoch less its best one",
                ratio_interval(loss, pooled(seeds, "sft-16/tokens")),
                "above",
            ),
            Check("reward score, last epoch less that epoch", mean_interval(score), "above"),
        ),
    )


def reward_accuracy(seeds: Sequence[Seed]) -> Claim:
    """Claim 4."""
    kwise = pooled(seeds, "right/rm-kwise/rule") - pooled(seeds, "right/rm-shuffled/rule")
    return Claim(
        4,
        "the reward model orders held-out prompts' pairs, for held-out labelers too; "
        "one K-wise element a prompt beats shuffled pairs",
        (
            Check("accuracy, labelers in training", accuracy(seeds, "rm", "own"), "above", 0.5),
            Check("accuracy, held-out labelers", accuracy(seeds, "rm", "others"), "above", 0.5),
            Check("accuracy against the hidden rule", accuracy(seeds, "rm", "rule"), "above", 0.5),
            Check(
                "K-wise less shuffled, accuracy against the hidden rule",
                ratio_interval(kwise, pooled(seeds, "pairs/rm-kwise/rule")),
                "above",
            ),
        ),
    )


def over_optimisation(seeds: Sequence[Seed]) -> Claim | None:
    """Claim 5: beta 0 against the chosen beta; the largest beta against PPO's start."""
    free, tied = f"ppo-beta-{BETAS[0]:g}", f"ppo-beta-{BETAS[-1]:g}"
    if not has(seeds, f"gold/{free}"):
        return None
    return Claim(
        5,
        "beta 0 over-optimises the reward model; a hundred times too large stays at the start",
        (
            Check(
                "reward score, beta 0 less PPO", difference(seeds, "score", free, "ppo"), "above"
            ),
            Check("hidden rule, beta 0 less PPO", difference(seeds, "gold", free, "ppo"), "below"),
            Check(
                "hidden rule, beta 100 times less PPO",
                difference(seeds, "gold", tied, "ppo"),
                "below",
            ),
        ),
    )


def alignment_tax(seeds: Sequence[Seed]) -> Claim:
    """Claim 6."""
    checks = [
        Check("text loss, PPO less its start", loss_difference(seeds, "ppo", "start"), "above"),
        Check("text loss, PPO-ptx less PPO", loss_difference(seeds, "ppo-ptx", "ppo"), "below"),
        Check("probe, PPO less its start", difference(seeds, "probe", "ppo", "start"), "below"),
        Check("probe, PPO-ptx less PPO", difference(seeds, "probe", "ppo-ptx", "ppo"), "above"),
    ]
    if has(seeds, f"loss/ppo-beta-{BETAS[1]:g}"):
        gammas = ["ppo-ptx", *(f"ppo-gamma-{gamma:g}" for gamma in GAMMAS)]
        best = min(gammas, key=lambda name: loss_difference(seeds, name, "ppo").mean)
        label = f"PPO-ptx at gamma {best.removeprefix('ppo-gamma-')}"
        label = "PPO-ptx" if best == "ppo-ptx" else label
        for beta in BETAS:
            name = f"ppo-beta-{beta:g}"
            checks.append(
                Check(
                    f"text loss, {label} less PPO at beta {beta:g}",
                    loss_difference(seeds, best, name),
                    "below",
                )
            )
    return Claim(6, "PPO pays an alignment tax, and pretraining gradients give it back", (*checks,))


def habits(seeds: Sequence[Seed]) -> Claim:
    """Claim 7."""
    checks = []
    for name, label in (("ppo", "PPO"), ("ppo-ptx", "PPO-ptx")):
        kept, made_up = pooled(seeds, "constrained"), ~pooled(seeds, "has_answer")
        for habit, where, wanted, text in (
            ("constraint", kept, "above", "constraints kept"),
            ("invented", made_up, "below", "made-up answers"),
        ):
            change = pooled(seeds, f"{habit}/{name}") - pooled(seeds, f"{habit}/sft")
            checks.append(Check(f"{text}, {label} less SFT", mean_interval(change[where]), wanted))
    return Claim(7, "constraint-following rises and made-up answers fall", (*checks,))


def bookkeeping(seeds: Sequence[Seed]) -> Claim:
    """Claim 8: zero-mean demonstrations, and what SFT, reward model and PPO cost."""
    means = [abs(seed.results["reward_models"]["mean_score"]["demonstrations"]) for seed in seeds]
    shares = [seed.results["flop"]["ppo-ptx"] / seed.results["flop"]["base"] for seed in seeds]
    sft = [seed.results["flop"]["sft"] / seed.results["flop"]["base"] for seed in seeds]
    return Claim(
        8,
        "demonstrations score 0 on average; SFT and PPO-ptx cost less than pretraining",
        (
            Check("|mean score of demonstrations|", _spread(means), "below", 0.01),
            Check("SFT's work as a share of pretraining's", _spread(sft), "below", 1.0),
            Check("PPO-ptx's work as a share of pretraining's", _spread(shares), "below", 1.0),
        ),
    )


def _spread(values: Sequence[float]) -> Interval:
    """Exact figures: their mean and range over seeds, with nothing sampled."""
    return Interval(float(np.mean(values)), min(values), max(values), len(values))
