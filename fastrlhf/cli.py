"""The command line: `fastrlhf <command> [--config FILE] [flags]`.

Exit codes: 0 done; 2 bad input, one line on stderr that says what; 3 the loss became non-finite;
130 interrupted. Anything else is a defect and shows its traceback.

A command's module is imported only when it runs, so that `fastrlhf --help` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from fastrlhf.commands import COMMANDS, Command
from fastrlhf.config import parse
from fastrlhf.errors import NonFiniteLoss, UserError

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# What the user's disk, folder or permissions can cause; other OSErrors are not theirs to mend.
_USER_ERRNO = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        argv: the arguments after the program's name; by default those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return EXIT_USER_ERROR
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(version())
        return 0
    if name not in COMMANDS:
        return _fail(_unknown(name))
    try:
        _run(name, COMMANDS[name], rest)
    except UserError as error:
        return _fail(str(error))
    except NonFiniteLoss as error:
        return _fail(str(error), EXIT_NON_FINITE)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from the last checkpoint"
        return _fail("interrupted" + (hint if COMMANDS[name].resumable else ""), EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone: keep Python from complaining at exit as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _USER_ERRNO:
            raise
        return _fail(_os_message(error))
    return 0


def usage() -> str:
    """Return the text of `fastrlhf --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: fastrlhf <command> [--config FILE] [flags]",
        "",
        "Reinforcement learning from human feedback, as in InstructGPT.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "fastrlhf <command> --help lists a command's flags. --config takes their defaults from the",
        "table of the command's name in a TOML file. fastrlhf --version prints the version.",
    ]
    return "\n".join(lines)


def version() -> str:
    """Return the version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("fastrlhf")
    except metadata.PackageNotFoundError:
        return "unknown: fastrlhf is run from a folder, not installed"


def _run(name: str, command: Command, argv: Sequence[str]) -> None:
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "fastrlhf", "fastrlhf_kernels"):
            raise
        raise UserError(
            f"'fastrlhf {name}' needs the package '{package}': pip install 'fastrlhf[train]'"
        ) from None
    description = f"{command.summary[0].upper()}{command.summary[1:]}."
    config = parse(getattr(module, command.config), name, argv, description)
    module.run(config)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown command '{name}'{hint}; valid: {', '.join(COMMANDS)}"


def _os_message(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename is not None else what


def _fail(message: str, code: int = EXIT_USER_ERROR) -> int:
    """Print `error: message` as one line on stderr and return the code."""
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
