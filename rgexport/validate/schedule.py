"""Which tokens a self-check has an artifact take, and in what pieces."""

from dataclasses import dataclass

import numpy as np

from rgexport.chat.artifact_text import open_tokenizer
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.formats import format_on
from rgexport.validate.text import choose_text


@dataclass(frozen=True)
class Schedule:
    """A prefill of `chunk` tokens, of whose last `rows` logits are wanted, and `steps` more."""

    chunk: int
    rows: int
    steps: int

    @property
    def tokens(self) -> int:
        """All that are taken."""
        return self.chunk + self.steps

    @property
    def positions(self) -> int:
        """Those whose logits are compared: the last ones."""
        return self.rows + self.steps


def choose_schedule(manifest: Manifest) -> Schedule:
    """What suits the artifact's format: see `formats.expected`."""
    found: Schedule = format_on("validate", manifest.kind).schedule(manifest)
    return found


def choose_tokens(artifact: Artifact, count: int) -> np.ndarray:
    """The built-in text's first tokens, [count] int64, or random ones; repeated if need be."""
    config, has_text = artifact.manifest.config, artifact.manifest.has_tokenizer
    text = choose_text(
        open_tokenizer(artifact) if has_text else None,
        vocab_size=config.vocab_size,
        window=config.window,
        limit=count,
    )
    return np.resize(text.tokens, count)
