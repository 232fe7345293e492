"""Defines what each format provides to the command line and the Python API for its export."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rgexport.artifacts.artifact import Artifact
from rgexport.errors import RequestError
from rgexport.formats import format_on


@dataclass(frozen=True)
class Exporter:
    """Makes the artifacts of one format.

    Attributes:
        make_options: returns the format's options; its parameters are the words of the command
            line, a `plan` and an `algorithm`, all with defaults. Raises RequestError.
        export: writes the artifact of a checkpoint, options and a target, and returns its path.
        default_target: returns the artifact's path from the model's name and the options.
        narrow: returns an artifact with another attention window, and its graph as bytes; None if
            the graph has no window, or the engine sets it.
    """

    make_options: Callable[..., Any]
    export: Callable[..., Path]
    default_target: Callable[[str, Any], Path]
    narrow: Callable[[Artifact, int], tuple[Artifact, bytes]] | None = None

    def require_options(self, kind: str, options: Mapping[str, object]) -> None:
        """Raises RequestError if the format has no option of one of these names."""
        known = [*inspect.signature(self.make_options).parameters]
        if unknown := options.keys() - known:
            raise RequestError(
                f"{min(unknown)} is no option of exports to {kind}; expected some of "
                f"{', '.join(name for name in known if name not in ('plan', 'algorithm'))}"
            )


def exporter_of(kind: str) -> Exporter:
    """Returns the exporter of a format; imports torch and the format's converter."""
    return cast(Exporter, format_on("export", kind))


def default_target(model: str, precision: str, kind: str, profile: str = "cpu") -> Path:
    """Returns the folder of an artifact whose user names none."""
    words = [model, precision, kind]
    if profile != "cpu":
        words.append(profile)
    return Path("-".join(words))
