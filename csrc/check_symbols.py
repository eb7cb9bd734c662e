"""Refuses objects compiled for an instruction set that define weak symbols; run by the build.

    python check_symbols.py STAMP OBJECT...

An inline function or a template of outside linkage is emitted by every object that uses it, and the
linker keeps one copy, perhaps the AVX-512 one, for all of them: an older processor then crashes in
code that was never meant for it. Writes the file STAMP if all is well. Without `nm`, or where
objects are not ELF, nothing can be checked, and the stamp says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def weak_symbols(objects: list[str]) -> list[str]:
    """Lines "object: symbol" for each weak or unique symbol that the objects define."""
    listing = subprocess.run(
        ["nm", "-C", "-A", "--defined-only", *objects], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for line in listing.splitlines():
        place, _, rest = line.partition(":")
        _, kind, symbol = rest.split(maxsplit=2)
        # DW.ref.* is the compiler's own reference to its exception tables: data, the same in all.
        if kind in "WVu" and not symbol.startswith("DW.ref."):
            found.append(f"{place}: {symbol}")
    return found


def main() -> int:
    """Checks, writes the stamp, returns the exit status."""
    stamp, *objects = sys.argv[1:]
    if shutil.which("nm") is None or sys.platform != "linux":
        Path(stamp).write_text("not checked: no nm for ELF objects here\n")
        return 0
    if found := weak_symbols(objects):
        print("Weak symbols in code compiled per instruction set; see csrc/README.md:")
        print("\n".join(found))
        return 1
    Path(stamp).write_text(f"{len(objects)} objects without weak symbols\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
