"""Commands as functions of one typed object: each field of its dataclass is a click parameter.

@dataclass(frozen=True)
class GreetArguments:
name: str = argument()
times: int = option("--times", default=1, help="How often.")

@command(GreetArguments)
def greet(arguments: GreetArguments) -> None: ...
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import click

from rgexport import progress
from rgexport.choices import FloatPrecision, Quality, SizeName
from rgexport.errors import RequestError
from rgexport.printing import print_result

if TYPE_CHECKING:
    from rgexport.griffin.checkpoint import Checkpoint

Arguments = TypeVar("Arguments")
_PARAMETER, _GROUP = "parameter", "group"
_PATH = click.Path(path_type=Path)


def option(
    *flags: str,
    least: float | None = None,
    most: float | None = None,
    show_default: bool = True,
    **attributes: Any,
) -> Any:
    """Declares a field as an option; click's type follows from the field's.

    Args:
        flags: such as `-o` and `--output`.
        least: smallest value of a whole number, or exclusive lower limit of a float.
        most: largest value.
        show_default: whether the help shows the default.
        attributes: further arguments of `click.Option`.
    """
    has_value = attributes.get("default") is not None and "flag_value" not in attributes
    attributes["show_default"] = show_default and has_value
    if least is not None:
        kind = click.FloatRange if isinstance(least, float) else click.IntRange
        attributes["type"] = kind(least, most, min_open=isinstance(least, float))
    return field(metadata={_PARAMETER: (click.Option, flags, attributes)})


def argument(**attributes: Any) -> Any:
    """Declares a field as a positional argument, which is required if its type has no None."""
    return field(metadata={_PARAMETER: (click.Argument, (), attributes)})


def group(arguments: type[Any]) -> Any:
    """Declares a field that holds the options of another dataclass."""
    return field(metadata={_GROUP: arguments})


def command(
    arguments: type[Arguments], *, parent: click.Group | None = None
) -> Callable[[Callable[[Arguments], int | None]], click.Command]:
    """Makes a function a command with `--verbose` and the parameters that `arguments` declares."""

    def decorate(run: Callable[[Arguments], int | None]) -> click.Command:
        def call(**values: Any) -> int | None:
            return run(_filled(arguments, values))

        click_command = click.Command(
            run.__name__,
            callback=call,
            params=[*_parameters(arguments), _verbose_option()],
            help=inspect.getdoc(run),
        )
        if parent is not None:
            parent.add_command(click_command)
        return click_command

    return decorate


def verbose(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--verbose` to a group."""
    return click.option("-v", "--verbose", **_VERBOSE)(function)


def help_if_alone(context: click.Context) -> None:
    """Prints the help of a group that no command came after."""
    if context.invoked_subcommand is None:
        print_result(context.get_help())


def _set_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    progress.verbose = progress.verbose or value


_VERBOSE: dict[str, Any] = {
    "is_flag": True,
    "expose_value": False,
    "callback": _set_verbose,
    "help": "More detail.",
}


def _verbose_option() -> click.Option:
    return click.Option(("-v", "--verbose"), **_VERBOSE)


def _parameters(arguments: type[Any]) -> Iterator[click.Parameter]:
    for declared in fields(arguments):
        if inner := declared.metadata.get(_GROUP):
            yield from _parameters(inner)
            continue
        kind, flags, attributes = declared.metadata[_PARAMETER]
        inferred = _inferred(kind, declared.type)
        yield kind((*flags, declared.name), **inferred | attributes)


def _inferred(kind: type[click.Parameter], annotation: Any) -> dict[str, Any]:
    """Returns the attributes of a click parameter that follow from the type of its field."""
    attributes: dict[str, Any] = {}
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (member for member in get_args(annotation) if member is not NoneType)
        attributes["required"] = False
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
        attributes |= {"nargs": -1} if kind is click.Argument else {"multiple": True}
    if get_origin(annotation) is Literal:
        names = get_args(annotation)
        return attributes | {"type": _Word(names), "metavar": "|".join(names)}
    if annotation is bool:
        return {"is_flag": True} | ({"default": None} if attributes else {})
    return attributes | {"type": _PATH if annotation is Path else annotation}


class _Word(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A choice that refuses other words as the core does."""

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        if value not in self.choices:
            name = parameter.opts[-1] if parameter else "the option"
            expected = ", ".join(map(str, self.choices))
            raise RequestError(f"{name} is {value!r}; expected one of {expected}")
        return value


def _filled(arguments: type[Arguments], values: dict[str, Any]) -> Arguments:
    return arguments(
        **{
            declared.name: _filled(declared.metadata[_GROUP], values)
            if _GROUP in declared.metadata
            else values[declared.name]
            for declared in fields(arguments)  # type: ignore[arg-type]
        }
    )


def _turn_kernels_off(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from rgexport.kernels.onnx.library import without_kernels

        context.with_resource(without_kernels())


@dataclass(frozen=True)
class CheckpointArguments:
    """The checkpoint that a command reads."""

    model: str | None = option("-m", "--model", help="A folder, a DeepMind .pt file, or a hub id.")
    size: SizeName | None = option(
        "--size", help="Instead of -m: a released model, or the demo model."
    )
    window: int | None = option(
        "--window", help="A smaller window; or the window of a DeepMind file. [default: 2048]"
    )
    soft_cap: float | None = option(
        "--soft-cap", help="The cap of the logits of a DeepMind file. [default: 30]"
    )
    adapter: Path | None = option(
        "--adapter", help="The folder of a LoRA adapter (PEFT) to merge into the model."
    )

    def open(self) -> "Checkpoint":
        """Opens the checkpoint, see `open_checkpoint`."""
        from rgexport.griffin.checkpoint import open_checkpoint

        return open_checkpoint(
            self.model,
            size=self.size,
            window=self.window,
            soft_cap=self.soft_cap,
            adapter=self.adapter,
        )


@dataclass(frozen=True)
class ClusterArguments:
    """The machines that share a command's computation."""

    cluster: str | None = option(
        "--cluster",
        metavar="ADDRESS",
        help="A Dask scheduler, such as tcp://host:8786, whose workers share the work.",
    )


@dataclass(frozen=True)
class ExportArguments(ClusterArguments):
    """The options that all formats share."""

    plan: Path | None = option(
        "--plan",
        help="A JSON file with the storage of every tensor, as `inspect --json` prints it.",
    )
    quality: Quality | None = option(
        "--quality",
        help="How levels are chosen: rounding to nearest, clip search, or GPTQ by a calibration.",
    )
    calibration: Path | None = option(
        "--calibration", help="A file of `rgexport calibrate`, for --quality best."
    )
    output: Path | None = option(
        "-o", "--output", help="The folder. [default: ./MODEL-PRECISION-FORMAT]"
    )
    force: bool = option("--force", help="Replace an existing output.")
    no_check: bool = option("--no-check", help="Skip the self-check of the artifact.")


@dataclass(frozen=True)
class ForeignArguments:
    """Permission to run graphs of other programs."""

    allow_foreign: bool = option(
        "--allow-foreign",
        help="Run ONNX graphs with ops that rgexport does not write, from someone you trust.",
    )


@dataclass(frozen=True)
class NativeArguments(ForeignArguments):
    """The kernels that an engine may use; the option takes effect while the command runs."""

    no_native: bool = option(
        "--no-native",
        callback=_turn_kernels_off,
        help="Use only the engine's own kernels, as with RGEXPORT_NO_NATIVE=1.",
    )


@dataclass(frozen=True)
class ThreadsArguments:
    """The processors that an engine uses."""

    threads: int | None = option(
        "--threads", least=1, most=256, help="[default and maximum: one per usable processor]"
    )


@dataclass(frozen=True)
class StatePrecisionArguments:
    """The precision of state files."""

    state_precision: FloatPrecision | None = option(
        "--state-precision",
        help="Precision of state files. [default: what the engine computes with]",
    )


@dataclass(frozen=True)
class LookupArguments:
    """Whether replies are drafted by prompt lookup."""

    lookup: bool = option(
        "--no-lookup",
        flag_value=False,
        default=True,
        help="Turn prompt lookup off: write one token a step.",
    )


def port_option(default: int) -> Any:
    """Declares the port of a server."""
    return option(
        "--port",
        least=0,
        most=65535,
        default=default,
        help="The port to listen on; 0 takes a free one.",
    )
