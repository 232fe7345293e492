"""The tolerances of a format, and how its graphs are read and made again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import one_line
from rgexport.formats import format_on
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.schemes.registry import Plan
from rgexport.validate.checks import DEQUANTIZED, INT8, Tolerance
from rgexport.validate.identity import IdentityItem
from rgexport.validate.structure.elements import Element
from rgexport.validate.text_items import Items, folder_items
from rgexport.validate.written_files import written_files

if TYPE_CHECKING:
    from rgexport.export.program import StepProgram
    from rgexport.griffin.checkpoint import Checkpoint

TOKENS, STEPS = 32, 4
"""Tokens that a self-check takes, and how many of them one by one."""


class Schedule(NamedTuple):
    """A prefill of `chunk` tokens that compares the last `rows`, and `steps` single tokens."""

    chunk: int
    rows: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    """Everything that an exporter makes a graph of, except the weights' values."""

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


class Expected:
    """A format's properties: it computes in its activations' dtype, and has no graph to compare."""

    has_exact = False
    """Whether the format can be exported with `--exact` and without."""
    extra = "export"
    """The extra that `lower` needs."""

    def tolerance(self, manifest: Manifest) -> Tolerance:
        return INT8 if manifest.rounds_activations else DEQUANTIZED[manifest.compute]

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        """The dtype, a key of `site_limits.ROUNDED`, of the inputs of a linear with this weight."""
        return "float32"

    def attends_in_half(self, manifest: Manifest) -> bool:
        """Whether attention's scores, or keys and values, are float16."""
        return False

    def half_sums(self, manifest: Manifest) -> float:
        """Relative error of attention's result because values are added up in float16."""
        return 0.0

    def text_items(self, artifact: Artifact, tokenizer: Tokenizer | None) -> Items:
        """The items of an artifact's text side, see `identity`."""
        return folder_items(artifact.path, artifact.manifest.config.vocab_size, tokenizer)

    def written_items(self, artifact: Artifact) -> Iterator[IdentityItem]:
        return written_files(artifact)

    def schedule(self, manifest: Manifest) -> Schedule:
        """The tokens of a self-check: few, but through both of an engine's programs."""
        return Schedule(TOKENS - STEPS, TOKENS - STEPS, STEPS)

    def recipe(self, manifest: Manifest) -> Recipe | None:
        """The recipe of an artifact's graph; None if graphs of this format are not compared."""
        return None

    def writers(self, artifact: Artifact) -> set[str]:
        """Programs and versions that its manifest and graph name, such as `rgexport 0.1.0`."""
        return {version_text(artifact.manifest.created_with)}

    def read(self, artifact: Artifact) -> Iterator[Element]:
        """Reads the structure of an artifact; raises RequestError if a file cannot be read."""
        raise NotImplementedError

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        """Makes the structure that this version writes; raises ImportError without the extra."""
        raise NotImplementedError

    def default_recipes(self, checkpoint: "Checkpoint") -> Iterator[Recipe]:
        """The recipes of a checkpoint's graphs in named precisions."""
        yield from ()


def expected_of(kind: str) -> Expected:
    return cast(Expected, format_on("validate", kind))


def version_text(created_with: Mapping[str, str | int]) -> str:
    return one_line(f"rgexport {created_with.get('rgexport', 'of no version')}")


@lru_cache(maxsize=2)
def traced(config: GriffinConfig, activation: str) -> "StepProgram":
    """Traces a model, for all its precisions; raises ModuleNotFoundError without torch."""
    from rgexport.export.trace import trace

    return trace(config, activation)


def _layout(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {key: _layout(value) for key, value in fields.items() if key != "algorithm"}
    return [_layout(value) for value in fields] if isinstance(fields, list) else fields
