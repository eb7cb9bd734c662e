"""The errors that end a command: what the user gave was wrong, or training has diverged.

`fastrlhf.cli.main` turns a `UserError` into one line on stderr and exit code 2, and a
`NonFiniteLoss` into one line and exit code 3. Any other exception is a defect of this program and
keeps its traceback.
"""

from __future__ import annotations

from os import PathLike


class UserError(Exception):
    """Bad input: a file, a setting or a record. The message is one line and names what was wrong.

    Attributes:
        field: the field at fault, where there is one.
        located: whether the message already names a file.
    """

    def __init__(self, message: str, *, field: str | None = None, located: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.located = located

    @classmethod
    def at(
        cls, path: str | PathLike[str], line: int | None, field: str | None, message: str
    ) -> UserError:
        """Make `path:line: field 'x': message`, less the parts that are None.

        Args:
            path: the file, or a name for where the value came from.
            line: the line in it, counted from 1.
            field: the field at fault.
            message: what is wrong and what was wanted.
        """
        place = f"{path}" if line is None else f"{path}:{line}"
        subject = "" if field is None else f"field '{field}': "
        return cls(f"{place}: {subject}{message}", field=field, located=True)


class NonFiniteLoss(Exception):
    """A loss or a gradient norm became NaN or infinite: going on would only spoil the weights."""

    @classmethod
    def at(
        cls,
        stage: str,
        step: int,
        checkpoint: str | PathLike[str] | None,
        quantity: str = "loss",
    ) -> NonFiniteLoss:
        """Say which stage and step it was, and what is left to go on from.

        Args:
            stage: the command's name, for example "ppo".
            step: the optimiser step in which it was met.
            checkpoint: the last checkpoint written before it, or None.
            quantity: what was not finite.
        """
        if checkpoint is None:
            rest = "no checkpoint was written before it"
        else:
            rest = f"the last good checkpoint is {checkpoint}"
        return cls(f"{stage}: the {quantity} is not finite at step {step}; {rest}")
