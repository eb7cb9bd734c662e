"""One seed of the demonstration, as a process: ``python -m fastrlhf.demo.worker JSON``.

JSON: {"out": folder, "seed": int, "full": bool, "threads": int}. Started by
``fastrlhf.demo.command``, which reads this process's output from the seed's log.txt.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path

import torch

from fastrlhf.demo.miniature import SeedRun, run_seed

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Run the seed that the argument names."""
    if sys.platform == "linux":
        # A killed parent must not leave a worker behind that writes under a resumed run.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments.pop("threads"))
    arguments["out"] = Path(arguments["out"])
    run_seed(SeedRun(**arguments))


if __name__ == "__main__":
    main()
