"""Commands as functions of one typed object: each field of its dataclass is a click parameter.

`BuildArguments` of `commands.publish` is a small example.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from shutil import get_terminal_size
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import click

from rgexport import progress
from rgexport.choices import ARTIFACT_FORMS, FloatPrecision, Quality, SizeName, plan_advice
from rgexport.commands.defaults import source_of
from rgexport.errors import RequestError
from rgexport.printing import print_result

if TYPE_CHECKING:
    from rgexport.griffin.checkpoint import Checkpoint

Arguments = TypeVar("Arguments")
CONTEXT = {"help_option_names": ["-h", "--help"]}
"""Settings of every command and group."""


class _NarrowHelp(click.HelpFormatter):
    """Fits terminals of 40 columns, where click would write 50."""

    def __init__(self, **_widths: int | None) -> None:
        super().__init__(width=min(get_terminal_size().columns, 80) - 2)

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, col_max if self.width >= 60 else 8, col_spacing)


click.Context.formatter_class = _NarrowHelp
_PARAMETER = "parameter"
_PATH = click.Path(path_type=Path)
PATH_OR_ID = click.Path()
"""A path, which shells complete, or a hub id: a text, as a `Path` would lose a leading `./`."""


def option(
    help: str = "",
    *flags: str,
    least: float | None = None,
    most: float | None = None,
    show_default: bool = True,
    **attributes: Any,
) -> Any:
    """Declares a field as an option; its flag follows from the field's name, its type from its own.

    A flag such as `--file` in `flags` replaces that name, one such as `-f` is added. The smallest
    value is `least`, which a float must exceed. `attributes` are further arguments of click.Option.
    """
    has_value = attributes.get("default") is not None and "flag_value" not in attributes
    attributes |= {"help": help, "show_default": show_default and has_value}
    if least is not None:
        kind = click.FloatRange if isinstance(least, float) else click.IntRange
        attributes["type"] = kind(least, most, min_open=isinstance(least, float))
        attributes.setdefault("metavar", "NUMBER" if isinstance(least, float) else "INTEGER")
    return field(metadata={_PARAMETER: (click.Option, flags, attributes)})


def argument(**attributes: Any) -> Any:
    """Declares a field as a positional argument, which is required if its type has no None."""
    return field(metadata={_PARAMETER: (click.Argument, (), attributes)})


def model_option(help: str, metavar: str) -> Any:
    """Declares `-m`, which names a model or an artifact."""
    return option(help, "-m", type=PATH_OR_ID, metavar=metavar)


def group() -> Any:
    """Declares a field that holds the options of another dataclass, its type."""
    return field()


def command(
    arguments: type[Arguments], *, parent: click.Group | None = None
) -> Callable[[Callable[[Arguments], int | None]], click.Command]:
    """Makes a function a command with `-v`, `-q` and the parameters that `arguments` declares."""

    def decorate(run: Callable[[Arguments], int | None]) -> click.Command:
        help_text = inspect.getdoc(run) or ""
        click_command = click.Command(
            run.__name__,
            callback=lambda **values: run(_filled(arguments, _chosen(values))),
            params=[*_parameters(arguments), VERBOSE, QUIET],
            help=help_text,
            short_help=help_text.partition("\n")[0],  # click would cut it
            context_settings=CONTEXT,
        )
        if parent is not None:
            parent.add_command(click_command)
        return click_command

    return decorate


def shared(arguments: object, target: type[Any]) -> dict[str, Any]:
    """Returns the values of `arguments` that `target`, another dataclass, has fields for."""
    names = {field.name for field in fields(target)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def help_if_alone(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        print_result(context.get_help())


def _progress_flag(name: str, help: str) -> click.Option:
    def switch_on(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        setattr(progress, name, getattr(progress, name) or value)

    flags = [f"-{name[0]}", f"--{name}"]
    return click.Option(flags, is_flag=True, expose_value=False, callback=switch_on, help=help)


VERBOSE = _progress_flag("verbose", "Show more detail.")
QUIET = _progress_flag("quiet", "Show results, warnings and errors alone.")


def _parameters(arguments: Any) -> Iterator[click.Parameter]:
    for declared in fields(arguments):
        if is_dataclass(declared.type):
            yield from _parameters(declared.type)
            continue
        kind, flags, attributes = declared.metadata[_PARAMETER]
        if kind is click.Option and not any(flag.startswith("--") for flag in flags):
            flags = *flags, f"--{declared.name.replace('_', '-')}"
        yield kind((*flags, declared.name), **_inferred(kind, declared.type) | attributes)


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
    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        if value not in self.choices:
            name = parameter.opts[-1] if parameter else "the option"
            expected = ", ".join(map(str, self.choices))
            source = source_of(context, parameter) if context and parameter else ""
            advice = plan_advice(str(value)) if name == "--precision" else ""
            raise RequestError(f"{name} is {value!r}; expected one of {expected}{advice}{source}")
        return value


def _chosen(values: dict[str, Any]) -> dict[str, Any]:
    """Empties what defaults name, where the command line names a model, artifact or size."""
    names = [name for name in ("named", "model", "size") if values.get(name)]
    source = click.get_current_context().get_parameter_source
    defaults = [name for name in names if source(name) is click.core.ParameterSource.DEFAULT_MAP]
    empty = {name: () if isinstance(values[name], tuple) else None for name in defaults}
    return values if names == defaults else values | empty


def _filled(arguments: Any, values: dict[str, Any]) -> Any:
    return arguments(
        **{
            declared.name: _filled(declared.type, values)
            if is_dataclass(declared.type)
            else values[declared.name]
            for declared in fields(arguments)
        }
    )


def _turn_kernels_off(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from rgexport.kernels.onnx.library import without_kernels

        context.with_resource(without_kernels())


@dataclass(frozen=True)
class CheckpointArguments:
    named: str | None = argument(metavar="[MODEL]", type=PATH_OR_ID)
    model: str | None = model_option(
        "Another way to give MODEL: a folder, a .pt file, a hub id, demo, 2b, 9b, …", "MODEL"
    )
    size: SizeName | None = option("Instead of MODEL: a released model, or the demo model.")
    window: int | None = option(
        "Attention window in tokens, at most the model's. [default: the model's; DeepMind's "
        "files: 2048]"
    )
    soft_cap: float | None = option("Soft cap of the logits, for DeepMind's files. [default: 30]")
    adapter: Path | None = option("The folder of a LoRA adapter (PEFT) to merge into the model.")

    def open(self) -> "Checkpoint":
        from rgexport.griffin.checkpoint import open_checkpoint

        if self.named is not None and self.model is not None:
            raise RequestError("MODEL was given twice, as an argument and by -m; leave one out")
        options = {n: value for n, value in vars(self).items() if n not in ("named", "model")}
        return open_checkpoint(self.named if self.model is None else self.model, **options)


@dataclass(frozen=True)
class ArtifactsArguments:
    named: tuple[str, ...] = argument(metavar="[ARTIFACT]...", type=PATH_OR_ID)
    model: tuple[str, ...] = model_option("Another way to give an ARTIFACT.", "ARTIFACT")

    @property
    def artifacts(self) -> list[str]:
        """Raises RequestError if no artifact is named."""
        if paths := [*self.named, *self.model]:
            return paths
        raise RequestError(f"an artifact is needed: {ARTIFACT_FORMS}")


@dataclass(frozen=True)
class ArtifactArguments(ArtifactsArguments):
    named: tuple[str, ...] = argument(metavar="[ARTIFACT]", type=PATH_OR_ID)

    @property
    def artifact(self) -> str:
        """Raises RequestError unless one artifact is named."""
        if len(paths := self.artifacts) > 1:
            raise RequestError(
                f"one artifact is needed, {len(paths)} were given: {', '.join(paths)}"
            )
        return paths[0]


@dataclass(frozen=True)
class ClusterArguments:
    cluster: str | None = option(
        "A Dask scheduler, such as tcp://host:8786, whose workers share the work.",
        metavar="ADDRESS",
    )


@dataclass(frozen=True)
class ExportArguments(ClusterArguments):
    plan: Path | None = option(
        "A JSON file with the storage of every tensor, as `inspect --json` prints it."
    )
    quality: Quality | None = option(
        "Choice of the levels: rounding to nearest, clip search, or GPTQ by a calibration."
    )
    calibration: Path | None = option("A file of `rgexport calibrate`, for --quality best.")
    output: Path | None = option("The folder to write. [default: ./MODEL-PRECISION-FORMAT]", "-o")
    force: bool = option("Replace an existing output.")
    no_check: bool = option("Skip the self-check of the artifact.")
    json: bool = option("Print the artifact's path, size and self-check as JSON.")


@dataclass(frozen=True)
class ForeignArguments:
    allow_foreign: bool = option(
        "Run ONNX graphs with ops that rgexport does not write, from someone you trust."
    )


@dataclass(frozen=True)
class NativeArguments(ForeignArguments):
    """The kernels that an engine may use; the option takes effect while the command runs."""

    no_native: bool = option(
        "Use only the engine's own kernels, as with RGEXPORT_NO_NATIVE=1.",
        callback=_turn_kernels_off,
    )


@dataclass(frozen=True)
class ThreadsArguments:
    threads: int | None = option(
        "Number of threads. [default and maximum: one per usable processor]",
        "-t",
        least=1,
        most=256,
    )


@dataclass(frozen=True)
class StatePrecisionArguments:
    state_precision: FloatPrecision | None = option(
        "Precision of state files. [default: what the engine computes with]"
    )


@dataclass(frozen=True)
class LookupArguments:
    lookup: bool = option(
        "Turn prompt lookup off: write one token a step.",
        "--no-lookup",
        flag_value=False,
        default=True,
    )


def port_option(default: int) -> Any:
    return option(
        "The port to listen on; 0 takes a free one.", least=0, most=65535, default=default
    )
