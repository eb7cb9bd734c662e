"""Claims on arrays that we made: they hold when the arrays say so, and only then."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from demo_seeds import Effects, make_seed
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastrlhf.demo.claims import Check, Claim, Seed, by_seed, judge_claims, win_rate
from fastrlhf.demo.text import alone, headline, interval_text, print_claims, wanted
from fastrlhf.metrics import Interval, mean_interval


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Seed]:
    out = tmp_path_factory.mktemp("demo")
    return [make_seed(out / f"seed-{n}", n, full=True) for n in (0, 1)]


def shown(found: list[Claim]) -> dict[int, bool]:
    return {claim.number: claim.shown for claim in found}


def changed(seed: Seed, **arrays: np.ndarray) -> Seed:
    """The same seed with some arrays replaced; a name's __ stands for its slash."""
    renamed = {name.replace("__", "/"): a for name, a in arrays.items()}
    assert renamed.keys() <= seed.arrays.keys()
    return Seed(seed.out, seed.results, seed.arrays | renamed)


def test_a_run_that_shows_everything(seeds: list[Seed]) -> None:
    assert shown(judge_claims(seeds)) == dict.fromkeys(range(1, 9), True)
    assert by_seed(seeds) == {number: [True, True] for number in range(1, 9)}


def test_the_short_demonstration_tests_five(tmp_path: Path) -> None:
    found = judge_claims([make_seed(tmp_path / "seed-0", 0)])
    assert shown(found) == dict.fromkeys((1, 4, 6, 7, 8), True)
    assert len({check.text for check in found[2].checks}) == 4  # no variants to compare


def test_figures_are_those_of_the_pooled_arrays(seeds: list[Seed]) -> None:
    ppo = np.concatenate([seed.arrays["wins/ppo"] for seed in seeds])
    claims = {claim.number: claim for claim in judge_claims(seeds)}
    check = next(c for c in claims[1].checks if c.text.startswith("PPO against SFT"))
    assert check.value == mean_interval(ppo)
    assert check.value.mean == pytest.approx(ppo.mean(), abs=1e-12)
    assert check.value.n == len(ppo)
    tokens = np.concatenate([seed.arrays["tokens"] for seed in seeds])
    change = np.concatenate([seed.arrays["loss/ppo"] - seed.arrays["loss/start"] for seed in seeds])
    assert claims[6].checks[0].value.mean == pytest.approx(change.sum() / tokens.sum(), abs=1e-12)
    changes = [s.arrays["constraint/ppo"] - s.arrays["constraint/sft"] for s in seeds]
    kept = np.concatenate([c[s.arrays["constrained"]] for c, s in zip(changes, seeds, strict=True)])
    assert claims[7].checks[0].value.mean == pytest.approx(kept.mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("number", "effects"),
    [
        (1, {"wins": {"ppo": 0.45}}),
        (1, {"wins": {"prompted": 0.05}}),
        (2, {"wins": {"large-base": 0.9}}),
        (4, {"kwise_gain": -0.1}),
        (5, {"gold": {"ppo-beta-0": 2.9}}),
        (5, {"score": {"ppo-beta-0": 0.1}}),
        (6, {"loss": {"ppo": -0.1}}),
        (6, {"loss": {"ppo-ptx": 0.3}}),
        (7, {"wins": {"ppo": 0.4}}),
    ],
)
def test_a_claim_turns_with_the_arrays(
    tmp_path: Path, number: int, effects: dict[str, object]
) -> None:
    other = Effects()
    for name, value in effects.items():
        if isinstance(value, dict):
            getattr(other, name).update(value)
        else:
            setattr(other, name, value)
    seed = make_seed(tmp_path / "seed-0", 0, full=True, effects=other)
    assert shown(judge_claims([seed]))[number] is False


def test_overfitting_and_bookkeeping_turn_too(seeds: list[Seed]) -> None:
    seed = seeds[0]
    swapped = changed(
        seed,
        **{
            "sft-16/loss/last": seed.arrays["sft-16/loss/best"],
            "sft-16/loss/best": seed.arrays["sft-16/loss/last"],
        },
    )
    assert shown(judge_claims([swapped]))[3] is False
    off = {"mean_score": {"demonstrations": 0.2}}
    results = seed.results | {"reward_models": seed.results["reward_models"] | off}
    assert shown(judge_claims([Seed(seed.out, results, seed.arrays)]))[8] is False


def test_by_seed_judges_each_alone(seeds: list[Seed]) -> None:
    against = changed(seeds[1], wins__ppo=1.0 - seeds[1].arrays["wins/ppo"])
    alone_ = by_seed([seeds[0], against, seeds[1]])
    assert alone_[1] == [True, False, True]
    assert alone_[4] == [True, True, True]


def test_an_interval_that_touches_its_bound_shows_nothing() -> None:
    value = Interval(0.6, 0.5, 0.7, 10)
    assert not Check("x", value, "above", 0.5).holds
    assert Check("x", value, "above", 0.49).holds
    assert not Check("x", value, "below", 0.7).holds
    assert Check("x", value, "below", 0.71).holds
    unknown = Interval(float("nan"), float("nan"), float("nan"), 0)
    assert not Check("x", unknown, "above").holds
    assert not Check("x", unknown, "below").holds


def test_no_check_no_claim() -> None:
    assert not Claim(1, "nothing", ()).shown


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_win_rate_is_the_mean_with_its_interval(values: list[float]) -> None:
    found = win_rate([Seed(Path(), {}, {"wins/ppo": np.array(values)})], "ppo")
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.low <= found.mean <= found.high
    assert found.high - found.mean == pytest.approx(found.mean - found.low, abs=1e-9)


# --- in words -----------------------------------------------------------------------------------


def printed(found: list[Claim], seeds: dict[int, list[bool]]) -> str:
    stream = io.StringIO()
    print_claims(found, seeds, Console(file=stream, width=250))
    return stream.getvalue()


def test_printed_claims_say_what_holds(seeds: list[Seed]) -> None:
    against = [changed(seed, wins__ppo=1.0 - seed.arrays["wins/ppo"]) for seed in seeds]
    found = judge_claims(against)
    text = printed(found, by_seed(against))
    value = win_rate(against, "ppo")
    line = next(line for line in text.splitlines() if "PPO against SFT" in line)
    assert interval_text(value) in line
    assert "wanted above 0.5: does NOT hold" in line
    assert "1. win rate against SFT" in text
    assert "NOT shown (0 of 2 seeds alone)" in text
    assert "8. demonstrations score 0 on average" in text
    last = text.splitlines()[-2:]
    assert "7 of the 8 claims that this run tested were shown. Not shown: 1" in " ".join(last)
    every = printed(judge_claims(seeds), by_seed(seeds))
    assert "NOT" not in every
    assert every.count("shown (2 of 2 seeds alone)") == 8


def test_headlines() -> None:
    good = Claim(1, "one", (Check("x", Interval(1.0, 0.9, 1.1, 9), "above"),))
    bad = Claim(2, "two", (Check("x", Interval(1.0, 0.9, 1.1, 9), "below"),))
    assert headline([]) == "No claim was tested."
    assert headline([good]) == "The one claim that this run tested was shown."
    assert headline([good, good]) == "All 2 claims that this run tested were shown."
    assert headline([good, bad]) == (
        "1 of the 2 claims that this run tested was shown. Not shown: 2 (two)."
    )
    assert alone(good, {1: [True, False, True]}) == "2 of 3 seeds alone"
    assert wanted(bad.checks[0]) == "below 0"


def test_interval_text_shows_two_digits_of_the_half_width() -> None:
    assert interval_text(Interval(0.6628, 0.6508, 0.6748, 9)) == "0.663 [0.651, 0.675]"
    assert interval_text(Interval(1.5, 1.2, 1.8, 9)) == "1.50 [1.20, 1.80]"
    assert interval_text(Interval(0.012345, 0.0119, 0.01279, 9)) == "0.01235 [0.01190, 0.01279]"
    assert interval_text(Interval(0.02, 0.02, 0.02, 1)) == "0.0200 [0.0200, 0.0200]"
    assert interval_text(Interval(0.5, float("-inf"), float("inf"), 1)).startswith("0.500 [no ")
    nothing = float("nan")
    assert interval_text(Interval(nothing, nothing, nothing, 0)) == "not measured"
