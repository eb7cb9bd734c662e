"""Resident memory of this process, and how its peak is read. Linux only; nothing but Python."""

from __future__ import annotations

from pathlib import Path

MEMORY = Path("/proc/self")


def _status(field: str) -> int:
    for line in (MEMORY / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {MEMORY / 'status'}")


def resident() -> int:
    """Bytes of physical memory that the process holds now."""
    return _status("VmRSS")


def peak() -> int:
    """The most that it has held since the start, or since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let the peak begin anew at what is held now."""
    (MEMORY / "clear_refs").write_text("5")
