"""What a format defines for the comparison of structures."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rgexport.errors import one_line
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.scheme import Plan
from rgexport.validate.structure.elements import Element

if TYPE_CHECKING:
    from rgexport.export.program import StepProgram


@dataclass(frozen=True)
class Recipe:
    """Everything that an exporter makes a graph of; the weights' values are not part of it.

    Attributes:
        kind: the format, a key of `formats.FORMATS`.
        config: the model's.
        plan: in the order in which tensors are stored.
        options: those of the format that change a graph, as JSON has them.
    """

    kind: str
    config: GriffinConfig
    plan: Plan
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 of all fields, without the algorithms that chose the weights' levels."""
        plan = [(name, _layout(scheme.to_dict())) for name, scheme in self.plan.items()]
        fields = self.kind, self.config.to_dict(), plan, self.options
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Structure(ABC):
    """How the structure of a format's artifacts is read, and how it is made again."""

    extra = "export"
    """The extra that `lower` needs."""

    @abstractmethod
    def recipe(self, manifest: Manifest) -> Recipe:
        """What the graph of an artifact was made of."""

    @abstractmethod
    def made_by(self, artifact: Artifact) -> set[str]:
        """Programs and versions that its manifest and graph name, such as `rgexport 0.1.0`."""

    @abstractmethod
    def read(self, artifact: Artifact) -> Iterator[Element]:
        """The structure of an artifact's files.

        Raises:
            RequestError: a file cannot be read.
        """

    @abstractmethod
    def lower(self, recipe: Recipe) -> Iterator[Element]:
        """The structure that this version writes.

        Raises:
            ModuleNotFoundError: the extra is missing.
            RequestError: it writes none for that recipe.
        """

    def defaults(self, config: GriffinConfig, gates: Collection[str]) -> Iterator[Recipe]:
        """The recipes of a model's named precisions, with default options, for fingerprints.

        None where nobody needs them. `gates` are the matrices that the checkpoint has in bfloat16.

        Raises:
            ModuleNotFoundError: the extra is missing.
        """
        yield from ()


def maker(created_with: Mapping[str, str | int]) -> str:
    """The version of rgexport that a manifest or an environment names."""
    return one_line(f"rgexport {created_with.get('rgexport', 'of no version')}")


@lru_cache(maxsize=2)
def traced(config: GriffinConfig, activation: str) -> "StepProgram":
    """The step program of a model, which all its precisions share.

    Raises:
        ModuleNotFoundError: torch is missing.
    """
    from rgexport.export.trace import trace

    return trace(config, activation)


def _layout(fields: Any) -> Any:
    """A scheme's fields without its algorithm."""
    if isinstance(fields, dict):
        return {key: _layout(value) for key, value in fields.items() if key != "algorithm"}
    return [_layout(value) for value in fields] if isinstance(fields, list) else fields
