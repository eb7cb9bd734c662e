"""How the time of a PPO iteration grows as prompts, responses and layers double.

    pytest bench/bench_ppo_scaling.py

The trainer of bench_ppo.py, from 16 prompts of 32 tokens, 32 new tokens and 5 layers on; no
response ends early. TFLOP/s counts the matrix products that cannot be avoided (bare_products.py):
where the time grows as they do it stays the same. Memory is not told: all cases run in one process,
which may still hold what earlier ones gave back.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import our_side
import pytest
from bare_products import needed, operations
from common import DEVICE, Row
from ppo_cases import write_case

# Prompts, new tokens, layers.
SIZES = [
    (16, 32, 5),
    (32, 32, 5),
    (64, 32, 5),
    (16, 64, 5),
    (16, 128, 5),
    (16, 32, 10),
    (16, 32, 20),
]
TIMED = 2


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU's; bench/ppo_iteration.py is for a GPU")
@pytest.mark.parametrize(("prompts", "new_tokens", "layers"), SIZES)
def test_scaling(keep: Any, prompts: int, new_tokens: int, layers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lengths = [32] * prompts
        case = write_case(
            Path(folder), lengths, new_tokens, iterations=1 + TIMED, ends=False, layers=layers
        )
        found = our_side.train_ppo(case)
    times = [i["seconds"] for i in found["iterations"][1:]]
    flops = operations(needed([(32, new_tokens)] * prompts, layers))
    row = Row(
        "PPO scaling",
        "cpu",
        "cpu",
        f"{prompts} prompts of 32, {new_tokens} new tokens, {layers} layers",
        "float32",
        median_s=statistics.median(times),
        iqr_s=max(times) - min(times),
        rounds=TIMED,
        tflop_per_s=flops / statistics.median(times) * 1e-12,
    )
    keep([row])
