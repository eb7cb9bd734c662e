"""An iteration of PPO beside that of TRL 1.12's PPOTrainer, phase by phase.

    make trl-1.12               # TRL's, in an environment of its own
    pytest bench/bench_ppo.py

A Llama of 8.5M parameters (V = 8192, random weights, fp32) is policy, reference, reward and value
model; 32 prompts, one pass over them in one optimiser step on both sides, no pretraining loss. In
`geometric` the prompts have 8 to 128 tokens and a response ends at each token with probability
1/48, at the latest after 128: the head's row of the end token is made so. In `full` prompts of 32
are answered by 64 tokens, and none ends. TRL samples to the full length and cuts afterwards; its
time does not depend on the draws, and ours is that of what was drawn.

The ceiling is the matrix products with weights that an iteration cannot avoid (bare_products.py
says which), timed after each iteration; their number and their operations are printed. Memory is
resident memory at its peak, above what the process held before it loaded the models and above the
weights.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import beside
import pytest
from bare_products import needed, operations
from common import DEVICE, Missing, Row
from ppo_cases import write_case

EPISODES = 32
TIMED, THEIRS = 4, 2  # iterations after the first, which warms up: ours, and TRL's slower ones
CASES = {
    "geometric": ([8 + i * 120 // (EPISODES - 1) for i in range(EPISODES)], 128),
    "full": ([32] * EPISODES, 64),
}


def rows_of(case: str, shape: str, found: Any, variant: str) -> Row:
    """The row of a side's result."""
    row = Row("PPO iteration", variant, "cpu", f"{case}: {shape}", "float32")
    if isinstance(found, Missing):
        row.note = found.why
        return row
    times = [i["seconds"] for i in found["iterations"][1:]]  # the first warms up
    low, row.median_s, high = statistics.quantiles(times, n=4)
    row.iqr_s, row.rounds, row.peak_bytes = high - low, len(times), found["peak_bytes"]
    return row


@pytest.mark.skipif(DEVICE != "cpu", reason="beside TRL on a CPU")
@pytest.mark.parametrize("case", CASES)
def test_ppo(keep: Any, case: str) -> None:
    prompts, new_tokens = CASES[case]
    shape = f"{EPISODES} prompts of {min(prompts)} to {max(prompts)}, {new_tokens} at most"
    with tempfile.TemporaryDirectory() as folder:
        given = write_case(
            Path(folder), prompts, new_tokens, iterations=1 + TIMED, ends=case == "geometric"
        )
        theirs = beside.trl_1_12("ppo", given | {"iterations": 1 + THEIRS})
        found = beside.ours("ppo", given | {"bare": True})
        rows = [
            rows_of(case, shape, found, "cpu"),
            rows_of(case, shape, theirs, "TRL 1.12"),
        ]
        if case == "full":
            mixed = beside.ours("ppo", given | {"ptx_ratio": 1.0, "iterations": 1 + THEIRS})
            rows.append(rows_of(case, shape, mixed, "ours, with as many pretraining sequences"))
    phases: dict[str, Any] = {}
    for name, side in (("ours", found), ("TRL 1.12", theirs)):
        if not isinstance(side, Missing):
            timed = side["iterations"][1:]
            phases[name] = {k: statistics.median(i[k] for i in timed) for k in timed[0]}
    if not isinstance(found, Missing):
        times = found["bare"][1:]
        phases["bare products"] = {k: statistics.median(t[k] for t in times) for k in times[0]}
        sums = [sum(t.values()) for t in times]
        low, middle, high = statistics.quantiles(sums, n=4)
        bare = [needed(lengths) for lengths in found["lengths"][1:]]
        flops = statistics.median(map(operations, bare))
        counts = statistics.median(sum(map(len, each.values())) for each in bare)
        rows.append(
            Row(
                "PPO iteration", "bare products", "cpu", rows[0].shape, "float32",
                median_s=middle, iqr_s=high - low, rounds=len(sums), ceiling=True, peak_bytes=0,
            )
        )  # fmt: skip
        for row in rows[0], rows[-1]:
            row.tflop_per_s = flops / row.median_s * 1e-12
        mean = statistics.mean(n for lengths in found["lengths"][1:] for _, n in lengths)
        phases["work"] = {"mean response": mean, "products": counts, "operations": flops}
    keep(rows, phases=phases)
