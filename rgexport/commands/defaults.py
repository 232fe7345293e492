"""Reads defaults of options from the user's configuration file and from `RGEXPORT_` variables."""

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from rgexport.errors import RequestError
from rgexport.files.paths import read_text

FILE_VARIABLE = "RGEXPORT_CONFIG"
"""Another configuration file; empty for none."""

Settings = Mapping[str, Any]
Defaults = dict[str, Any]
"""A command's parameter → default, or a command of a group → its `Defaults`."""


def read_defaults(group: click.Group) -> Defaults:
    """Returns click's `default_map`: variables go before the file, a command's table before all's.

    Raises RequestError for a file that is no TOML, and for a name that no command knows.
    """
    path, settings = _read_file()
    return _of_group(group, settings, {}, "RGEXPORT", str(path))


def source_of(context: click.Context, parameter: click.Parameter) -> str:
    """Returns where a wrong value was set, to end an error's line; empty for the command line."""
    source = parameter.name and context.get_parameter_source(parameter.name)
    if source is not click.core.ParameterSource.DEFAULT_MAP:
        return ""
    return f" (from a variable RGEXPORT_… or {_path()}, which set defaults)"


def _path() -> Path | None:
    path = os.environ.get(FILE_VARIABLE, str(Path(click.get_app_dir("rgexport")) / "config.toml"))
    return Path(path) if path else None


def _read_file() -> tuple[Path | None, dict[str, Any]]:
    path = _path()
    if path is None or not (path.exists() or FILE_VARIABLE in os.environ):
        return path, {}
    try:
        return path, tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is not TOML: {error}") from None


def _of_group(
    group: click.Group, settings: Settings, inherited: Settings, variable: str, source: str
) -> Defaults:
    """Returns the defaults of each command; `settings` has a table for each, or values for all."""
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    shared = {name: value for name, value in settings.items() if name not in tables}
    if unknown := tables.keys() - group.commands.keys():
        expected = ", ".join(sorted(group.commands))
        raise RequestError(f"{source}: [{min(unknown)}] is no command; expected one of {expected}")
    known = {name for command in _commands(group) for name in _options(command)}
    if wrong := {_named(name) for name in shared} - known:
        raise RequestError(f"{source}: no command has an option --{min(wrong)}; correct its name")
    defaults: Defaults = {}
    for name, command in group.commands.items():
        read: Callable[..., Defaults] = _of_command
        if isinstance(command, click.Group):
            read = _of_group
        defaults[name] = read(
            command,
            tables.get(name, {}),
            {**inherited, **shared},
            f"{variable}_{name.replace('-', '_').upper()}",
            f"{source}: [{name}]",
        )
    return defaults


def _of_command(
    command: click.Command, settings: Settings, inherited: Settings, variable: str, source: str
) -> Defaults:
    options = _options(command)
    if unknown := {_named(name) for name in settings} - options.keys():
        raise RequestError(
            f"{source} has no option --{min(unknown)}; expected some of "
            f"{', '.join(f'--{name}' for name in options)}"
        )
    values = {_named(name): value for name, value in {**inherited, **settings}.items()}
    for name, option in options.items():
        text = os.environ.get(f"{variable}_{name.replace('-', '_').upper()}")
        if text is not None:
            values[name] = option.type.split_envvar_value(text) if option.multiple else text
    return {
        str(option.name): _value(option, values[name])
        for name, option in options.items()
        if name in values
    }


def _value(option: click.Option, value: Any) -> Any:
    if option.multiple and not isinstance(value, list | tuple):
        return [value]
    if option.is_flag and option.flag_value is False and not option.secondary_opts:
        return not click.BOOL.convert(value, option, None)  # such as --no-lookup, of `lookup`
    return value


def _options(command: click.Command) -> dict[str, click.Option]:
    """Returns the options of a command by their long names, without the dashes."""
    return {
        flag.removeprefix("--"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in parameter.opts
        if flag.startswith("--")
    }


def _named(name: str) -> str:
    return name.replace("_", "-")


def _commands(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _commands(command)
        else:
            yield command
