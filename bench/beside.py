"""A trainer of ours beside TRL's: both in processes of their own, on a case that is written down.

TRL's PPO left it after 1.12, so that it takes an environment beside the one with today's TRL:
`make trl-1.12` makes it, and FASTRLHF_TRL_1_12 may name the Python of another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from common import Missing

BENCH = Path(__file__).resolve().parent
TRL_1_12 = Path(
    os.environ.get("FASTRLHF_TRL_1_12", BENCH.parent / ".venv" / ".trl-1.12" / "bin" / "python")
)
SECONDS = 300  # a side that takes longer has gone wrong
# Nothing is fetched, and threads are torch's choice on both sides.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def run_side(python: Path | str, script: str, what: str, case: dict[str, Any]) -> Any:
    """What `script` (our_side.py or trl_side.py) finds for a case; Missing where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "case.json", Path(folder) / "result.json"
        given.write_text(json.dumps(case))
        command = [str(python), str(BENCH / script), what, str(given), str(found)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Missing(f"failed: no result after {SECONDS} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return Missing(f"failed: {last[:100]}")
        return json.loads(found.read_text())


def ours(what: str, case: dict[str, Any]) -> Any:
    """A trainer of ours on a case."""
    return run_side(sys.executable, "our_side.py", what, case)


def trl(what: str, case: dict[str, Any]) -> Any:
    """A trainer of the TRL that is installed here on a case."""
    if not peers.WANTED:
        return peers.NOT_ASKED_FOR
    if importlib.util.find_spec("trl") is None:
        return Missing("not installed")
    return run_side(sys.executable, "trl_side.py", what, case)


def trl_1_12(what: str, case: dict[str, Any]) -> Any:
    """A trainer of TRL 1.12 on a case."""
    if not peers.WANTED:
        return peers.NOT_ASKED_FOR
    if not TRL_1_12.exists():
        return Missing("not installed: make trl-1.12")
    return run_side(TRL_1_12, "trl_side.py", what, case)
