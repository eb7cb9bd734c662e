"""Reports of real small folders: their figures, their bytes, what they say of missing parts."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_seeds import EPISODES, ITERATIONS, KINDS, make_seed, write_metrics
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf import markup, plots
from fastrlhf.cli import main
from fastrlhf.demo import curves
from fastrlhf.demo.claims import Seed, by_seed, habit_rate, judge_claims, load_seed, win_rate
from fastrlhf.demo.measures import probe_change, text_loss_change
from fastrlhf.demo.page import command, page, write_page
from fastrlhf.demo.text import interval_text
from fastrlhf.errors import UserError
from fastrlhf.report import ReportConfig, run
from fastrlhf.runfiles import last, read_lines, series

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Checker(HTMLParser):
    """Checks that tags nest; keeps ids, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "clip-path"):
                self.references |= set(re.findall(r"#([\w-]+)", value or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str, *folders: Path) -> Checker:
    """Well-formed, self-contained, and without a path of this machine."""
    found = Checker(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert len(found.ids) == len(set(found.ids)), "an id stands twice"
    for folder in folders:
        assert str(folder) not in text
    assert not re.search(r"[\"' =](/home|/root|/tmp|/work|/Users)/", text)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long demonstration of two seeds, as its command leaves it but for the page."""
    out = tmp_path_factory.mktemp("long")
    for number in (0, 1):
        make_seed(out / f"seed-{number}", number, full=True)
    meta = {"seeds": [0, 1], "full": True, "settings": {"beta": 0.2}, "seconds": 60.0}
    (out / "demo.json").write_text(json.dumps(meta))
    return out


@pytest.fixture(scope="module")
def seeds(demo: Path) -> list[Seed]:
    return [load_seed(demo / f"seed-{number}") for number in (0, 1)]


@pytest.fixture(scope="module")
def long_page(demo: Path, seeds: list[Seed]) -> str:
    meta = json.loads((demo / "demo.json").read_text())
    return page(seeds, judge_claims(seeds), by_seed(seeds), meta)


# --- the demonstration's page -------------------------------------------------------------------


def test_the_page_is_well_formed_and_alone(long_page: str, demo: Path) -> None:
    found = check_page(long_page, demo)
    assert found.tags.count("svg") > 40
    headings = re.findall(r"<h2>(.*?)</h2>", long_page)
    assert headings == [
        "Claims",
        "Win rate against SFT",
        "Training curves",
        "KL against reward",
        "The alignment tax",
        "Habits of the answers",
        "Reward models",
        "SFT overfits by loss",
        "Sizes and work",
        "Answers side by side",
        "How to reproduce this",
        "Time and versions",
    ]
    assert "Not in this run" not in found.text


def test_the_page_shows_the_arrays_figures(long_page: str, seeds: list[Seed]) -> None:
    text = Checker(long_page).text
    for name in ("base", "prompted", "ppo", "ppo-ptx", "small-ppo", "large-base"):
        pooled = np.concatenate([seed.arrays[f"wins/{name}"] for seed in seeds])
        assert f"{pooled.mean():.4f} [" in text, name
        assert interval_text(win_rate(seeds, name)) in text
    made_up = np.concatenate(
        [s.arrays["invented/ppo"][~s.arrays["has_answer"].astype(bool)] for s in seeds]
    )
    assert habit_rate(seeds, "invented", "ppo").mean == pytest.approx(made_up.mean(), abs=1e-12)
    assert interval_text(habit_rate(seeds, "invented", "ppo")) in text
    for kind in (None, *KINDS):
        assert interval_text(text_loss_change(seeds, "ppo", kind)) in text
    assert interval_text(probe_change(seeds, "ppo-ptx", "reverse")) in text
    for claim in judge_claims(seeds):
        for check in claim.checks:
            assert check.text in text
            assert interval_text(check.value) in text
    assert "All 8 claims that this run tested were shown." in text
    assert "2 of 2 seeds alone" in text
    assert "1.65%" in text  # the paper's 60 of 3640


def test_text_loss_change_is_the_kinds_own(seeds: list[Seed]) -> None:
    total = tokens = 0.0
    for seed in seeds:
        where = seed.arrays["kind"] == "quiz"
        total += float((seed.arrays["loss/ppo"] - seed.arrays["loss/start"])[where].sum())
        tokens += float(seed.arrays["tokens"][where].sum())
    found = text_loss_change(seeds, "ppo", "quiz")
    assert found.mean == pytest.approx(total / tokens, abs=1e-12)
    assert found.n == sum(int((seed.arrays["kind"] == "quiz").sum()) for seed in seeds)


def test_the_same_numbers_give_the_same_bytes(demo: Path, tmp_path: Path, long_page: str) -> None:
    path = run(ReportConfig(run=demo, out=tmp_path / "page.html"))
    assert path.read_text(encoding="utf-8") == long_page


def test_time_stands_in_the_last_section_alone(tmp_path: Path) -> None:
    seed = make_seed(tmp_path / "seed-0", 0)
    claims, alone = judge_claims([seed]), by_seed([seed])
    one = page([seed], claims, alone, {"seconds": 60.0})
    (seed.out / "phases.json").write_text('{"pretrain": 7.0}')
    other = page([seed], claims, alone, {"seconds": 999.0})
    end = "<h2>Time and versions</h2>"
    assert one.count(end) == 1
    assert one.split(end)[0] == other.split(end)[0]
    assert one.split(end)[1] != other.split(end)[1]


def test_a_claim_that_fails_is_in_the_headline(tmp_path: Path, seeds: list[Seed]) -> None:
    turned = [
        Seed(s.out, s.results, s.arrays | {"wins/ppo": 1.0 - s.arrays["wins/ppo"]}) for s in seeds
    ]
    path = write_page(tmp_path, turned, judge_claims(turned), by_seed(turned), {"full": True})
    assert path == tmp_path / "report.html"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    found = check_page(path.read_text(encoding="utf-8"))
    assert "7 of the 8 claims that this run tested were shown. Not shown: 1 (" in found.text
    assert "NOT shown (0 of 2 seeds alone)" in found.text
    assert "Not in this run: the demonstration's settings." in found.text


def test_a_short_demonstration_says_what_it_did_not_test(tmp_path: Path) -> None:
    seed = make_seed(tmp_path / "seed-3", 3)
    text = page([seed], judge_claims([seed]), by_seed([seed]), {})
    found = check_page(text, tmp_path)
    assert "claims 2, 3 and 5, which need the long demonstration (--full)" in found.text
    assert "fastrlhf demo --seeds 1 --first-seed 3" in found.text
    assert "SFT overfits by loss" not in found.text
    assert "Figures pool one seed" in found.text


def test_missing_pieces_are_said(tmp_path: Path) -> None:
    seed = make_seed(tmp_path / "seed-0", 0)
    claims, alone = judge_claims([seed]), by_seed([seed])
    for name in ("sft", "rm", "ppo", "ppo-ptx"):
        shutil.rmtree(seed.out / name)
    (seed.out / "phases.json").unlink()
    arrays = {
        name: array
        for name, array in seed.arrays.items()
        if not name.startswith(("probe/", "wins/", "task/", "right/"))
    }
    results = seed.results | {"shown": [], "flop": {}}
    found = check_page(page([Seed(seed.out, results, arrays)], claims, alone, {}))
    said = " ".join(re.findall(r"Not in this run: (.*?)\.\s", found.text + " "))
    for piece in (
        "SFT loss",
        "Reward model: pairs ordered rightly",
        "entropy of PPO",
        "the logs of PPO and PPO-ptx",
        "probe/start",
        "win rates",
        "the verdicts of the hidden rule",
        "the reward models' accuracy",
        "the stages' work",
        "answers to show",
        "the time of phases",
    ):
        assert piece in said, piece


def test_the_hidden_rule_is_joined_to_samples(seeds: list[Seed]) -> None:
    """The fixture answers nothing up to the middle (0), and rightly from there on (2 or 3)."""
    means = curves.rule_by_iteration(seeds[0], "ppo")
    assert sorted(means) == list(range(1, ITERATIONS + 1))
    prompts = read_lines(seeds[0].out / "world" / "prompts_ppo.jsonl")[:EPISODES]
    kinds = [record["instruction"]["constraint"] for record in prompts]
    # A bare right answer keeps "brief" and no constraint, but neither "thanks" nor "quoted".
    right = np.mean([3.0 if kind in (None, "brief") else 2.0 for kind in kinds])
    assert means[1] == 0.0
    assert means[ITERATIONS] == pytest.approx(right)
    both = curves.against_kl(seeds, "ppo")
    assert both is not None
    (kl, score), (same_kl, rule) = both
    assert kl == same_kl
    assert len(kl) == len(score) == len(rule) == ITERATIONS // curves.STRETCH
    assert kl[0] == pytest.approx(0.06 * 2.5)
    assert rule[0] == 0.0
    logs = [series(read_lines(s.out / "ppo" / "metrics.jsonl"), "score")[1][:4] for s in seeds]
    assert score[0] == pytest.approx(np.mean(logs))


def test_the_command_names_the_seeds() -> None:
    assert command([0, 1], False) == "fastrlhf demo --seeds 2 --first-seed 0"
    assert command([5, 6, 7], True) == "fastrlhf demo --full --seeds 3 --first-seed 5"


def test_an_unfinished_seed_is_named(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "half")
    (tmp_path / "half" / "seed-1" / "results.json").unlink()
    with pytest.raises(UserError, match=r"seed-1: has no results\.json"):
        run(ReportConfig(run=tmp_path / "half"))


# --- any run ------------------------------------------------------------------------------------


def make_pipeline(out: Path) -> Path:
    seed = make_seed(out.parent / "made", 0)
    for stage in ("ppo", "rm", "base", "sft", "start"):
        shutil.copytree(seed.out / stage, out / stage)
    (out / "eval").mkdir()
    found = {
        "reward model accuracy on pairs": {"mean": 0.6781, "low": 0.66, "high": 0.6962, "n": 500},
        "model: loss a token of text (nats)": {"mean": 1.53, "low": 1.5, "high": 1.56, "n": 40},
        "baseline: loss a token of text (nats)": {"mean": 1.5, "low": 1.47, "high": 1.53, "n": 40},
    }
    (out / "eval" / "eval.json").write_text(json.dumps(found))
    (out / "notes").mkdir()  # not a stage
    return out


def test_a_pipelines_page(tmp_path: Path) -> None:
    out = make_pipeline(tmp_path / "qa")
    path = run(ReportConfig(run=out))
    assert path == out / "report.html"
    text = path.read_text(encoding="utf-8")
    found = check_page(text, tmp_path)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Stages",
        "base (pretrain)",
        "sft",
        "start (sft)",
        "rm",
        "ppo",
        "eval",
    ]
    for stage in ("sft", "ppo"):
        records = read_lines(out / stage / "metrics.jsonl")
        for name in ("seconds", "flop", "loss" if stage == "sft" else "score"):
            value = last(records, name)
            assert value is not None
            assert markup.figure(value) in found.text
    assert "0.6600 to 0.6962" in found.text
    assert "pretrain.data = made/world" in found.text  # of a path, its last two parts
    assert text.count('class="interval"') == 3
    samples = read_lines(out / "ppo" / "samples.jsonl")
    assert samples[-1]["response"] in found.text
    assert f"iteration {ITERATIONS}" in found.text
    before = text
    run(ReportConfig(run=out))
    assert path.read_text(encoding="utf-8") == before


def test_one_stages_page_and_a_metric_of_ones_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": i, "seconds": 2.0 * i, "loss": 1.0 / i, "my_metric": None if i == 2 else 7.25}
        for i in range(1, 4)
    ]
    write_metrics(tmp_path / "stage", rows)
    with (tmp_path / "stage" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "seco')  # killed while it wrote
    text = run(ReportConfig(run=tmp_path / "stage")).read_text(encoding="utf-8")
    found = check_page(text, tmp_path)
    assert "my metric" in found.text.replace("_", " ")
    assert "7.25" in found.text
    assert "0.3333" in found.text
    assert "not logged" in found.text  # no flop


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    write_metrics(tmp_path, [])
    text = run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")
    assert "Not in this run: a first step; the log is empty." in check_page(text).text


def test_wrong_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no"
    with pytest.raises(UserError, match=re.escape(f"{missing}: no such folder")):
        run(ReportConfig(run=missing))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'empty'}: holds no run")):
        run(ReportConfig(run=tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file, not a run's folder"):
        run(ReportConfig(run=tmp_path / "file"))
    assert main(["report", "--run", str(missing)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_metrics(tmp_path / "a", [{"step": 1, "seconds": 1.0, "loss": 1.0}])
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        run(ReportConfig(run=tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "eval.json").write_text('{"win rate": 0.5}')
    with pytest.raises(UserError, match=r"eval\.json: field 'win rate'"):
        run(ReportConfig(run=tmp_path / "b"))
    with pytest.raises(UserError, match="name a file"):
        run(ReportConfig(run=tmp_path / "b", out=tmp_path))


# --- pieces -------------------------------------------------------------------------------------


def test_text_is_escaped_and_paths_are_cut() -> None:
    found = markup.table(("a<b", "c"), [["<b>&", 1.5], [markup.Html("<i>x</i>"), None]])
    assert "a&lt;b" in found
    assert "&lt;b&gt;&amp;" in found
    assert "<i>x</i>" in found
    assert markup.without_folders("/home/someone/runs/qa/model") == "qa/model"
    assert markup.without_folders("C:\\Users\\x\\qa\\model") == "qa/model"
    assert markup.without_folders("relative/a/b") == "relative/a/b"
    assert markup.without_folders([0.9, 0.95]) == "[0.9, 0.95]"
    assert "a.b = 1" in markup.settings({"a": {"b": 1}})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (2500.0, "2,500"),
        (0.123456, "0.1235"),
        (1.234567e15, "1.235e+15"),
        (3e-5, "3.000e-05"),
        (-2.0, "-2"),
        (float("nan"), "n/a"),
        (float("inf"), "n/a"),
    ],
)
def test_figures_in_four_digits(value: float, text: str) -> None:
    assert markup.figure(value) == text


@given(st.lists(st.floats(-1e3, 1e3), max_size=400))
def test_thinning_keeps_the_level_of_a_curve(values: list[float]) -> None:
    x, y = plots.thinned(range(len(values)), values)
    assert len(x) == len(y) == min(len(values), plots.POINTS)
    assert np.all(np.diff(x) > 0)
    if values:
        assert min(values) - 1e-9 <= y.min()
        assert y.max() <= max(values) + 1e-9
    if len(values) % plots.POINTS == 0 and values:
        assert y.mean() == pytest.approx(np.mean(values), abs=1e-8)


def test_thinning_leaves_gaps_out() -> None:
    x, y = plots.thinned([1, 2, 3], [1.0, float("nan"), 3.0])
    assert x.tolist() == [1, 3]
    assert y.tolist() == [1.0, 3.0]


def test_mean_curve_is_over_shared_steps() -> None:
    x, y = plots.mean_curve([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 5.0, 6.0])])
    assert x.tolist() == [2.0, 3.0]
    assert y.tolist() == [3.0, 4.0]


def test_a_panel_takes_the_pages_colours_and_repeats_its_bytes() -> None:
    def draw(title: str) -> str:
        how = plots.look("ppo")
        return plots.panel(title, lambda axes: plots.curve(axes, [1, 2], [3, 4], how), x="step")

    one = draw("Loss & more")
    assert one == draw("Loss & more")
    assert 'aria-label="Loss &amp; more"' in one
    assert "currentColor" in one
    assert "var(--line)" in one
    assert plots.INK not in one
    assert plots.LOOKS["ppo"].colour.lower() in one
    assert 'id="' in one
    twice = check_page(markup.document("two", [one, one]))
    assert twice.references <= {*twice.ids}
    assert len(twice.references) == len(twice.ids) >= 4


def test_interval_bars_stand_where_they_should() -> None:
    bar = plots.interval_bar((0.5, 0.25, 0.75), 0.0, 1.0, 0.5)
    assert 'cx="60.0"' in bar
    assert "M32.0 9H88.0" in bar
    assert "M60.0 1V17" in bar
    assert plots.interval_bar((0.5, float("-inf"), float("inf")), 0.0, 1.0) == ""
