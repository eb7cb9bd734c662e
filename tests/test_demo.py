"""The demonstration end to end at a tiny size: phases, claims, resuming, the same numbers twice."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fastrlhf.cli import main
from fastrlhf.demo import command
from fastrlhf.demo.claims import by_seed, judge_claims, load_seed
from fastrlhf.demo.miniature import SeedRun, Settings, phases, run_seed
from fastrlhf.models import ModelShape
from fastrlhf.world import WorldSizes

TINY = Settings(
    sizes=WorldSizes(
        pretrain=400,
        pretrain_heldout=40,
        probe=20,
        demonstrations=64,
        demonstrations_validation=30,
        prompts_rm=60,
        prompts_ppo=200,
        prompts_validation=30,
        prompts_test=40,
        users=40,
    ),
    shape=ModelShape(width=16, layers=1, heads=2, mlp=32, context=48, rope_theta=100.0),
    pretrain_steps=8,
    sft_epochs=2,
    start_epochs=1,
    rm_prompts=60,
    pairing_prompts=20,
    ppo_iterations=2,
)


@pytest.fixture(scope="module")
def seed_run(tmp_path_factory: pytest.TempPathFactory) -> SeedRun:
    run = SeedRun(tmp_path_factory.mktemp("demo") / "seed-3", 3, full=True, settings=TINY)
    run_seed(run)
    return run


def test_every_phase_runs_and_every_claim_is_judged(seed_run: SeedRun) -> None:
    seconds = json.loads((seed_run.out / "phases.json").read_text(encoding="utf-8"))
    assert list(seconds) == [name for name, _ in phases(seed_run)] + ["examination"]
    seed = load_seed(seed_run.out)
    claims = judge_claims([seed])
    assert [claim.number for claim in claims] == [1, 2, 3, 4, 5, 6, 7, 8]
    for claim in claims:
        for check in claim.checks:
            assert np.isfinite(check.value.mean), check
            assert check.value.low <= check.value.mean <= check.value.high
    # Zero-mean demonstrations are exact at any size of run.
    assert abs(seed.results["reward_models"]["mean_score"]["demonstrations"]) < 1e-5
    assert by_seed([seed]) == {claim.number: [claim.shown] for claim in claims}


def test_measures_are_what_they_say(seed_run: SeedRun) -> None:
    arrays = load_seed(seed_run.out).arrays
    for name in ("base", "sft", "ppo", "ppo-ptx"):
        gold = (
            2 * arrays[f"task/{name}"]
            + arrays[f"constraint/{name}"]
            - arrays[f"invented/{name}"]
            - arrays[f"rude/{name}"]
        )
        # What is left of the hidden rule is half a point for a missing end.
        assert (arrays[f"gold/{name}"] <= gold + 1e-9).all()
        assert (arrays[f"gold/{name}"] >= gold - 0.5 - 1e-9).all()
        assert ((arrays[f"probe/{name}"] >= 0) & (arrays[f"probe/{name}"] <= 1)).all()
    # An untrained model knows nothing: near log V nats a token, V = 163.
    assert 3.5 < arrays["loss/base"].sum() / arrays["tokens"].sum() < 6.0


def test_a_finished_seed_is_left_as_it_is(seed_run: SeedRun) -> None:
    before = {p: p.stat().st_mtime_ns for p in seed_run.out.rglob("*") if p.is_file()}
    run_seed(seed_run)
    assert {p: p.stat().st_mtime_ns for p in seed_run.out.rglob("*") if p.is_file()} == before


def test_the_same_seed_gives_the_same_numbers(seed_run: SeedRun, tmp_path: Path) -> None:
    again = SeedRun(tmp_path / "seed-3", 3, full=False, settings=TINY)
    run_seed(again)
    first, second = load_seed(seed_run.out), load_seed(again.out)
    assert set(second.arrays) < set(first.arrays)
    for name, values in second.arrays.items():
        np.testing.assert_array_equal(values, first.arrays[name], err_msg=name)
    assert second.results["shown"] == first.results["shown"]


def test_the_command_runs_seeds_in_processes_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The command's own processes, on a folder whose one seed is done: judged and reported again.
    out = tmp_path / "runs"
    run = SeedRun(out / "seed-5", 5, full=False, settings=TINY)
    run_seed(run)
    (run.out / "settings.json").write_text(
        json.dumps(asdict(Settings()), indent=1) + "\n", encoding="utf-8"
    )
    arguments = ["demo", "--out", str(out), "--seeds", "1", "--first-seed", "5"]
    assert main(arguments) == 2  # never over a run that is there
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    claims = json.loads((out / "claims.json").read_text(encoding="utf-8"))
    assert [claim["number"] for claim in claims] == [1, 4, 6, 7, 8]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (run.out / "settings.json").write_text("{}\n", encoding="utf-8")
    assert main([*arguments, "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_failing_seed_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    folder = out / "seed-0"
    (folder / "world").mkdir(parents=True)
    # A file where the base model's folder should be.
    (folder / "base").write_text("in the way", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"seed 0 ended with exit code 1(.|\n)*base"):
        command.run(command.DemoConfig(out=out, seeds=1, first_seed=0))
