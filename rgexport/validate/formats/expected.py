"""What is expected of a format's artifacts, and the defaults for a format with nothing special."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.validate.identity.items import IdentityItem
from rgexport.validate.identity.text import Items, folder_items
from rgexport.validate.identity.written_files import written_files
from rgexport.validate.structure.format import Structure
from rgexport.validate.thresholds import DEQUANTIZED, Tolerance

TOKENS, STEPS = 32, 4
"""Tokens that a self-check takes, and how many of them one by one."""


@dataclass(frozen=True)
class Schedule:
    """A prefill of `chunk` tokens, of whose last `rows` logits are wanted, and `steps` more."""

    chunk: int
    rows: int
    steps: int

    @property
    def tokens(self) -> int:
        """All tokens that are taken."""
        return self.chunk + self.steps

    @property
    def positions(self) -> int:
        """The last positions, whose logits are compared."""
        return self.rows + self.steps


class Expected:
    """A format whose engine computes in the dtype of its activations."""

    has_exact = False
    """Whether the format can be exported with `--exact` and without."""
    structure: Structure | None = None
    """How its structure is read and made again; None where nothing can be compared."""

    def tolerance(self, manifest: Manifest) -> Tolerance:
        """How far an artifact may be from its dequantized reference."""
        return DEQUANTIZED[manifest.compute, manifest.rounds_activations]

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        """What a linear with this weight rounds its inputs to, a key of `site_limits.ROUNDED`."""
        return "float32"

    def attends_in_half(self, manifest: Manifest) -> bool:
        """Whether attention's scores, or keys and values, are float16."""
        return False

    def half_sums(self, manifest: Manifest) -> float:
        """Relative error of attention's result because values are added up in float16."""
        return 0.0

    def text_items(self, artifact: Artifact, tokenizer: Tokenizer | None) -> Items:
        """The items of an artifact's text side, see `identity.text`."""
        return folder_items(artifact.path, artifact.manifest.config.vocab_size, tokenizer)

    def written_items(self, artifact: Artifact) -> Iterator[IdentityItem]:
        """Compares what rgexport writes beside the model, see `identity.written_files`."""
        return written_files(artifact)

    def schedule(self, manifest: Manifest) -> Schedule:
        """Which tokens a self-check takes: few, but through both of an engine's programs."""
        return Schedule(TOKENS - STEPS, TOKENS - STEPS, STEPS)


def expected_of(kind: str) -> Expected:
    """What is expected of artifacts of a kind."""
    return cast(Expected, format_on("validate", kind))
