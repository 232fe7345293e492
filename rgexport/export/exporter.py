"""Defines what each format provides to the command line and the Python API for its export."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rgexport.errors import RequestError
from rgexport.formats import FORMATS


@dataclass(frozen=True)
class Exporter:
    """Makes the artifacts of one format.

    Attributes:
        make_options: returns the format's options; its parameters are the words of the command
            line, a `plan` and an `algorithm`, all with defaults. Raises RequestError.
        export: writes the artifact of a checkpoint, options and a target, and returns its path.
        default_target: returns the artifact's path from the model's name and the options.
    """

    make_options: Callable[..., Any]
    export: Callable[..., Path]
    default_target: Callable[[str, Any], Path]

    def require_options(self, kind: str, options: Mapping[str, object]) -> None:
        """Raises RequestError if the format has no option of one of these names."""
        known = [*inspect.signature(self.make_options).parameters]
        if unknown := options.keys() - known:
            raise RequestError(
                f"{min(unknown)} is no option of exports to {kind}; expected some of "
                f"{', '.join(name for name in known if name not in ('plan', 'algorithm'))}"
            )


def exporter_of(kind: str) -> Exporter:
    return cast(Exporter, import_module(FORMATS[kind]["export"]).EXPORTER)
