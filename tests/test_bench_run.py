"""bench/: what cannot be timed keeps its row, the run's files, the targets, the plots."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bare_products
import common
import peers
import plots
import pytest
import run
import targets
import torch
from common import Missing, measure
from test_bench_report import record, row
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def rows_of(**variants: Any) -> dict[str, common.Row]:
    found = measure(
        "an op",
        variants,
        shape="N=1",
        dtype=torch.float32,
        oracle=torch.ones(1, dtype=torch.float64),
        tolerance=1e-3,
        ceilings={"a bound": lambda: None},
        rounds=3,
    )
    return {r.variant: r for r in found}


def exhausted() -> torch.Tensor:
    raise torch.OutOfMemoryError("no room")


def broken() -> torch.Tensor:
    raise TypeError("a peer's signature\nhas changed")


def test_what_cannot_be_timed_keeps_its_row() -> None:
    rows = rows_of(
        cpu=lambda: torch.ones(1),
        wrong=lambda: torch.full((1,), 1.5),
        nan=lambda: torch.full((1,), torch.nan),
        absent=Missing("not installed"),
        large=exhausted,
        broken=broken,
    )
    assert rows["cpu"].note is None
    assert rows["cpu"].median_s is not None
    assert rows["cpu"].max_error == 0.0
    assert not rows["cpu"].ceiling
    assert rows["a bound"].ceiling
    assert rows["a bound"].median_s is not None
    assert {name: r.note for name, r in rows.items() if r.median_s is None} == {
        "wrong": "WRONG: off by 0.5",
        "nan": "WRONG: off by nan",
        "absent": "not installed",
        "large": "out of memory",
        "broken": "failed: TypeError: a peer's signature",
    }
    printed = common.table(list(rows.values()))
    assert "large: out of memory" in printed
    assert "absent: not installed" in printed


def test_a_peer_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.find("no_such_package.there", "f") == Missing("not installed")
    gone = peers.find("torch.nn.functional", "no_such_function")
    assert isinstance(gone, Missing)
    assert gone.why.startswith("does not import: ")
    assert peers.find("torch.nn.functional", "softmax") is torch.nn.functional.softmax
    monkeypatch.setattr(peers, "WANTED", False)
    assert peers.find("torch.nn.functional", "softmax") == peers.NOT_ASKED_FOR
    calls = peers.each({"a": abs, "b": peers.NEEDS_GPU}, lambda f: f(-2))
    assert calls["b"] is peers.NEEDS_GPU
    assert not isinstance(calls["a"], Missing)
    assert calls["a"]() == 2


def test_a_slow_variant_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(common, "SLOW", 0.05)

    def slow() -> torch.Tensor:
        calls.append(time.sleep(0.06))
        return torch.ones(1)

    rows = rows_of(cpu=lambda: torch.ones(1), slow=slow)
    assert len(calls) == 1
    assert rows_of(cpu=slow)["cpu"].rounds == 3  # ours is timed with care
    assert rows["slow"].rounds == 1
    assert rows["slow"].median_s is not None
    assert rows["slow"].median_s >= 0.06
    assert rows["cpu"].rounds == 3


def test_memory_alone() -> None:
    def call() -> torch.Tensor:
        return torch.empty(1 << 20).sum()

    (only,) = measure("an op", {"cpu": call}, shape="N=1", dtype=torch.float32, rounds=0)
    assert only.median_s is None
    assert only.note is None
    assert only.peak_bytes is not None
    assert 4 << 20 <= only.peak_bytes < 5 << 20
    assert "cpu: 4.2 MB at most" in common.table([only])


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SECONDS", 0.0)
    calls = {"cpu": lambda: None, "peer": lambda: None}
    times = common.interleave(calls, 15)
    counts = {name: len(found) for name, found in times.items()}
    assert counts == {"cpu": common.LEAST_ROUNDS, "peer": 1}
    monkeypatch.setattr(common, "LONG", 0.0)
    counts = {name: len(found) for name, found in common.interleave(calls, 15).items()}
    assert counts == {"cpu": 3, "peer": 1}
    assert common.quartiles(times["peer"]) == (times["peer"][0],) * 3


def test_order_names_benchmarks() -> None:
    assert set(run.ORDER) == set(run.names())
    assert "" not in run.machine().split("-")


def test_run_keeps_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole run in a process of its own; then one without time, which keeps the file."""

    def benchmarks(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "bench" / "run.py"), "shape_rewards", "--no-peers"]
        command += ["--results", str(tmp_path), "--machine", "here", *flags]
        path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    first = benchmarks()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "measured: shape_rewards" in first.stdout
    kept = (tmp_path / "here" / "shape_rewards.json").read_text()
    assert json.loads(kept)["left_out"] == 0
    rows = [r for b in json.loads(kept)["benchmarks"] for r in b["extra_info"]["rows"]]
    assert {r["variant"] for r in rows} >= {"cpu", "PyTorch"}
    second = benchmarks("--seconds", "0")
    assert second.returncode == 3
    assert "not begun: shape_rewards" in second.stdout
    assert "--rest goes on with these" in second.stdout
    assert (tmp_path / "here" / "shape_rewards.json").read_text() == kept
    here = ["--results", str(tmp_path), "--machine", "here"]
    assert run.main(["shape_rewards", "--rest", *here]) == 0
    assert "measured before: shape_rewards" in capsys.readouterr().out
    assert (tmp_path / "here" / "shape_rewards.json").read_text() == kept


def test_the_rest_is_what_has_no_result_of_this_commit(tmp_path: Path) -> None:
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    path = tmp_path / "whiten.json"
    assert not run.measured_now(path)
    for text, now in ((commit, True), ("0" * 40, False)):
        path.write_text(json.dumps({"commit_info": {"id": text}}))
        assert run.measured_now(path) == now
    path.write_text(json.dumps({"commit_info": {"id": commit}, "left_out": 1}))
    assert not run.measured_now(path)
    path.write_text("{")
    assert not run.measured_now(path)


def test_results_that_time_has_cut_short_replace_no_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "whiten.json"
    for left_out, kept in ((2, 2), (1, 1), (0, 0), (3, 0), (0, 0)):
        run.keep({"left_out": left_out}, path)
        assert json.loads(path.read_text()) == {"left_out": kept}


def test_run_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run.main(["whitn"])
    assert left.value.code == 2
    assert "no benchmark 'whitn' (did you mean whiten?)" in capsys.readouterr().err


def benchmark(*rows: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"extra_info": {"rows": list(rows), **extra}}


def verdicts(*benchmarks: dict[str, Any], gpu: bool = False) -> dict[str, list[str]]:
    info = {"gpu": "A GPU"} if gpu else {}
    return {line[0]: line[1:] for line in targets.judge(benchmarks, info)}


def test_targets() -> None:
    wide, other = {"shape": "B=512 T=8192"}, {"shape": "B=512 T=1024"}
    found = verdicts(
        benchmark(row("cpu", 1.0, **wide), row("loop (verl's)", 40.0, **wide)),
        benchmark(row("cpu", 1.0, **other), row("loop (verl's)", 14.0, **other)),
        benchmark(calls=[{"op": "a", "over_us": 12.0}, {"op": "floor: b", "over_us": 99.0}]),
    )
    assert found["gae against verl's loop"] == [
        "at least 15",
        "14 (B=512 T=1024, float32)",
        "**no**",
    ]
    assert found["a loss's call with gradient, over its bare work"] == [
        "at most 20 us",
        "12 us (a)",
        "yes",
    ]
    assert found["ranking_loss, 64 prompts, against vectorised torch"][1:] == [
        "not yet measured",
        "",
    ]
    assert set(found).isdisjoint(
        {"log-probs against TRL's kernel", "decode_attention against flash-attn"}
    )
    assert "decode_attention against flash-attn" in verdicts(gpu=True)


def test_scratch_leaves_gradients_out() -> None:
    same = {"op": "linear_logprobs", "shape": "N=2048 H=512 V=50257 forward+backward"}
    gradients = 4 * 512 * (2048 + 50257)
    found = verdicts(
        benchmark(
            row("cpu", 1.0, peak_bytes=gradients + 10, **same),
            row(targets.NAIVE, 1.0, peak_bytes=gradients + 200, **same),
        )
    )
    assert found["linear_logprobs, scratch over that of plain PyTorch"][1].startswith("0.05 ")


def test_a_variant_without_a_time_is_no_measurement() -> None:
    rows = [row("cpu", 1.0, shape="B=512 T=8192")]
    missing = row("loop (verl's)", 1.0, shape="B=512 T=8192") | {"median_s": None, "note": "gone"}
    assert verdicts(benchmark(*rows, missing))["gae against verl's loop"][1] == "not yet measured"


def test_plots(tmp_path: Path) -> None:
    folder = tmp_path / "box"
    folder.mkdir()
    head = {"op": "memory of a head", "peak_bytes": 1 << 20}
    text = record(
        [row("cpu", 1e-3), row("TRL", 46e-3), row("torch.compile", 0.7e-3), row("cpu, slow", 1.0)],
        [row("cpu", 1.0, shape="N=256 H=8 V=9", **head)],
        [row("cpu", 2.0, shape="N=512 H=8 V=9", **head)],
    )
    run = json.loads(text)
    run["benchmarks"][0]["extra_info"]["phases"] = {
        "ours": {"seconds": 4.0, "collect: sample": 1.0, "update value": 2.5},
        "TRL 1.12": {"seconds": 12.0, "sample": 3.0},
        "bare products": {"sample": 0.5, "reference": 0.5, "update policy": 1.0},
        "work": {"products": 9},
    }
    (folder / "a.json").write_text(json.dumps(run))
    assert plots.main(["--results", str(tmp_path)]) == 0
    for name in ("ceilings", "others", "memory", "iteration"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (folder / "a.json").write_text("{")
    assert plots.main(["--results", str(tmp_path)]) == 2


def test_bare_products_are_those_of_a_model() -> None:
    """transformers' Llama does the operations that one policy's update is said to need."""
    prompt, response, layers = 5, 3, 2
    needed = bare_products.needed([(prompt, response)], layers)
    model = LlamaForCausalLM(LlamaConfig(**bare_products.CONFIG, num_hidden_layers=layers))
    ids = torch.arange(prompt + response - 1)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=response).logits.sum().backward()
    done = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert bare_products.operations({"policy": needed["update policy"]}) == done
    assert 3 * bare_products.operations({"once": needed["reference"]}) == done
    # The first new token is drawn from the prompt's last hidden state, the last one is not read.
    sampled = needed["sample"]
    assert sum(p.rows for p in sampled if p.weight == "policy head") == response
    assert sum(p.rows for p in sampled if p.weight == "policy 0 out") == prompt + response - 1


def test_bare_products_are_timed_in_a_process_of_their_own() -> None:
    with bare_products.Timer() as timer:
        assert timer.process is None  # not begun for nothing
        for lengths in [(5, 3), (2, 1)], [(4, 4)]:
            seconds = timer(lengths)
            assert seconds.keys() == bare_products.needed(lengths).keys()
            assert all(s > 0 for s in seconds.values())
    assert timer.process is not None
    assert timer.process.returncode == 0


@pytest.mark.parametrize("name", run.names())
def test_every_benchmark_imports(name: str) -> None:
    importlib.import_module(f"bench_{name}")
