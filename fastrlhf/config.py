"""Configs: slotted dataclasses, filled from a TOML file, then from the command line.

A TOML file holds one table a stage (`[pretrain]`, `[sft]`, `[rm]`, `[ppo]`, ...); a field that is
itself a dataclass is a nested table (`[pretrain.model]`). The order of precedence is: the command
line, the file, the defaults of the dataclass. Unknown tables and keys, wrong types and broken TOML
end in a `UserError` that names file, line and key. Ranges are checked by each config itself, in its
`__post_init__`, through `require`.

TOML has no null: an optional field is unset by the string "None", as on the command line.

    config = parse(SFTConfig, "sft", ["--config", "run.toml", "--lr", "1e-5"], "Fine-tune.")
    save(config, out / "config.toml")        # loads again with --config
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from fastrlhf.commands import COMMANDS
from fastrlhf.errors import UserError
from fastrlhf.toml_source import Source, did_you_mean, document, read_text, table

T = TypeVar("T")


def require(condition: bool, field: str, message: str) -> None:
    """Raise a UserError that names `field` unless `condition` holds; for `__post_init__`."""
    if not condition:
        raise UserError(f"field '{field}': {message}", field=field)


def resolve(data_dir: Path | None, relative: str | Path) -> Path:
    """Return `relative` inside `data_dir`; as it is when it is absolute or no folder is given."""
    path = Path(relative).expanduser()
    return path if data_dir is None else Path(data_dir).expanduser() / path


def parse(cls: type[T], section: str, argv: Sequence[str], description: str) -> T:
    """Make a `cls` from `--config FILE`, if argv has one, and the rest of the command line.

    Args:
        cls: a dataclass. A field named `config` receives the path given to `--config`.
        section: the TOML table to read, which is also the command's name.
        argv: the arguments after the command's name.
        description: shown by `--help`.

    Raises:
        UserError: what is wrong in the file, or a value out of range.
        SystemExit: `--help` (code 0), or an unknown or malformed flag (code 2).
    """
    import tyro  # costs 0.1 s, which `fastrlhf --help` does not need to pay

    path, rest = _take_config_flag(argv)
    takes_path = any(field.name == "config" for field in dataclasses.fields(_dataclass(cls)))
    source = Source("command line", "")
    mapping: dict[str, Any] = {}
    if path is not None:
        source = Source(path, read_text(path))
        # A config that takes the path itself (the pipeline's) reads other tables through it.
        mapping = table(source, section, required=not takes_path)
    default = _unchecked(cls, mapping, source, (section,))
    if takes_path:
        if path is not None:
            object.__setattr__(default, "config", Path(path))
    else:
        description += f" --config FILE takes defaults from the table [{section}] of a TOML file."
    try:
        return tyro.cli(
            cls,
            prog=f"fastrlhf {section}",
            description=description,
            args=list(rest),
            default=default,
        )
    except UserError as error:
        if error.field is None or error.located:
            raise
        line = None if _on_command_line(error.field, rest) else source.line_of_leaf(error.field)
        if line is None:
            raise
        raise UserError(f"{source.name}:{line}: {error}", field=error.field, located=True) from None


def load(
    cls: type[T],
    section: str,
    path: str | PathLike[str],
    *,
    defaults: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> T:
    """Make a `cls` from one table of a TOML file.

    Args:
        cls: a dataclass.
        section: the table.
        path: the file.
        defaults: fields that the file beats.
        overrides: fields that beat the file.

    Raises:
        UserError: the file, a key, a type or a value is wrong, or the table is missing.
    """
    source = Source(str(path), read_text(path))
    mapping = table(source, section, required=True)
    return _checked(cls, {**(defaults or {}), **mapping, **overrides}, source, (section,))


def sections(path: str | PathLike[str]) -> list[str]:
    """Return the names of the tables of a TOML config, in the order of the file.

    Raises:
        UserError: the file cannot be read, is not TOML, or has a table that no command reads.
    """
    source = Source(str(path), read_text(path))
    return list(document(source))


def from_mapping(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """Make a `cls` from a nested mapping, with the same checks as for a file.

    Args:
        cls: a dataclass.
        mapping: fields to values; a nested dataclass is a nested mapping or an instance.
        source: a name for where the mapping came from, for the error.
    """
    return _checked(cls, dict(mapping), Source(source, ""), ())


def to_toml(config: Any, section: str | None = None) -> str:
    """Return the resolved config as TOML that `--config` reads back to an equal config.

    Args:
        config: a dataclass instance.
        section: the table's name; by default that of the command the class belongs to.
    """
    if section is None:
        name = type(config).__name__
        found = [command for command, entry in COMMANDS.items() if entry.config == name]
        if not found:
            raise ValueError(f"section: {name} belongs to no command, so name its table")
        section = found[0]
    return "\n".join(_table_lines(config, section)).lstrip("\n") + "\n"


def save(config: Any, path: str | PathLike[str], section: str | None = None) -> None:
    """Write `to_toml(config, section)` to `path`."""
    Path(path).write_text(to_toml(config, section), encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Reading


def _take_config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of argv."""
    path: str | None = None
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
            if value is None:
                raise UserError("--config: a TOML file is wanted after it", field="config")
        elif argument.startswith("--config="):
            value = argument.removeprefix("--config=")
        else:
            rest.append(argument)
            continue
        if path is not None:
            raise UserError("--config: given twice; one TOML file is wanted", field="config")
        path = value
    return path, rest


def _on_command_line(field: str, argv: Sequence[str]) -> bool:
    """Tell whether a flag of argv sets the field of that name, at any depth."""
    flags = (argument.split("=")[0].lstrip("-").replace("-", "_") for argument in argv)
    return any(flag.split(".")[-1].removeprefix("no_") == field for flag in flags)


def _dataclass(cls: Any) -> Any:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls: a dataclass is wanted, not {cls!r}")
    return cls


def _values(
    cls: type, mapping: Mapping[str, Any], source: Source, path: tuple[str, ...], checked: bool
) -> dict[str, Any]:
    """Return the fields of `cls` that `mapping` sets, converted to their types."""
    hints = typing.get_type_hints(cls)
    valid = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in valid:
            message = f"unknown key{did_you_mean(key, valid)}; valid keys: {', '.join(valid)}"
            raise source.error((*path, key), message)
    return {
        key: _convert(value, valid[key], source, (*path, key), checked)
        for key, value in mapping.items()
    }


def _checked(cls: type[T], mapping: Mapping[str, Any], source: Source, path: tuple[str, ...]) -> T:
    """Make a `cls`, whose own checks then name `source`."""
    values = _values(_dataclass(cls), mapping, source, path, checked=True)
    for field in dataclasses.fields(_dataclass(cls)):
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if field.init and no_default and field.name not in values:
            raise source.error((*path, field.name), "missing; it has no default")
    try:
        return cls(**values)
    except UserError as error:
        if error.field is None or error.located:
            raise
        message = str(error).removeprefix(f"field '{error.field}': ")
        raise source.error((*path, error.field), message) from None


def _unchecked(
    cls: type[T], mapping: Mapping[str, Any], source: Source, path: tuple[str, ...]
) -> T:
    """Make a `cls` without running its `__post_init__`, as defaults for tyro.

    The command line may still replace a value, and may have to give one: only the config that tyro
    makes in the end is checked.
    """
    import tyro

    values = _values(_dataclass(cls), mapping, source, path, checked=False)
    instance = object.__new__(cls)
    for field in dataclasses.fields(_dataclass(cls)):
        if field.name in values:
            value = values[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(instance, field.name, value)
    return instance


def _convert(value: Any, hint: Any, source: Source, path: tuple[str, ...], checked: bool) -> Any:
    """Return `value` as the type that `hint` names, or raise a UserError that names `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, arguments[0], source, path, checked)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "None"):
            return None
        return _convert_union(value, hint, source, path, checked)
    if origin is typing.Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        choices = ", ".join(repr(choice) for choice in arguments)
        close = did_you_mean(str(value), [str(choice) for choice in arguments])
        raise source.error(path, f"{value!r} is not a choice{close}; valid: {choices}")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            make = _checked if checked else _unchecked
            return make(hint, value, source, path)
    elif origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        return _convert_sequence(value, hint, source, path, checked)
    elif origin is dict and isinstance(value, Mapping):
        return {
            key: _convert(item, arguments[1], source, (*path, key), checked)
            for key, item in value.items()
        }
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (bool, int, str) and type(value) is hint:  # a bool is no int here
        return value
    elif isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, hint):
            return value
        if value in hint.__members__:
            return hint[value]
        raise source.error(path, f"{value!r} is not a choice; valid: {', '.join(hint.__members__)}")
    raise source.error(path, f"wanted {_name(hint)}, got {_name(type(value))} {value!r}")


def _convert_union(
    value: Any, hint: Any, source: Source, path: tuple[str, ...], checked: bool
) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if len(options) == 1:
        return _convert(value, options[0], source, path, checked)
    # The exact type first: 3 stays an int in `float | int`.
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return _convert(value, option, source, path, checked)
        except UserError:
            continue
    raise source.error(path, f"wanted {_name(hint)}, got {_name(type(value))} {value!r}")


def _convert_sequence(
    value: Sequence[Any], hint: Any, source: Source, path: tuple[str, ...], checked: bool
) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(value) != len(arguments):
            raise source.error(path, f"wanted {len(arguments)} values, got {len(value)}")
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    items = [
        _convert(item, kind, source, path, checked) for item, kind in zip(value, kinds, strict=True)
    ]
    return tuple(items) if origin is tuple else items


def _name(hint: Any) -> str:
    """Return a type's name as its author wrote it."""
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(option) for option in typing.get_args(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a table of {hint.__name__}"
    plain = isinstance(hint, type) and typing.get_origin(hint) is None
    return hint.__name__ if plain else str(hint).replace("typing.", "").replace("pathlib.", "")


# ---------------------------------------------------------------------------------------------
# Writing


def _table_lines(config: Any, section: str) -> list[str]:
    """Return the lines of one table, plain values first and nested tables after them."""
    lines, nested = ["", f"[{section}]"], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested += _table_lines(value, f"{section}.{field.name}")
        else:
            lines.append(f"{field.name} = {_toml_value(value, field.name)}")
    return lines + nested


def _toml_value(value: Any, name: str) -> str:
    if value is None:
        return '"None"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return json.dumps(value.name)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, (str, Path)):
        # JSON's escapes are TOML's, but TOML also wants DEL escaped and knows no surrogate pairs.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item, name) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_value(str(k), name)} = {_toml_value(v, name)}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}"
    raise TypeError(f"field '{name}': {type(value).__name__} has no TOML form")
