"""Which tokens a self-check has an artifact take, and in what pieces."""

from dataclasses import dataclass
from math import prod

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.manifest import Manifest
from rgexport.runtimes.engines import open_tokenizer
from rgexport.validate.text import choose_text

TOKENS, STEPS = 32, 4
"""All that are taken, and how many of them one by one."""
SMALL_MODEL = 100_000_000
"""Parameters up to which Core ML's interpreter needs less than half a second a token."""
LARGE_STEPS = 2
"""What it takes of a larger model behind a chunk: 12 s a token at 2B."""


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
    """Few tokens, but through both of an engine's paths.

    Core ML's prefill takes a whole chunk, and may give the logits of its last token only: the
    others that are compared are steps.
    """
    if not isinstance(manifest, CoreMLManifest):
        return Schedule(TOKENS - STEPS, TOKENS - STEPS, STEPS)
    length = manifest.coreml.prefill_length
    parameters = sum(prod(stored.shape) for stored in manifest.tensors.values())
    small = parameters <= SMALL_MODEL
    rows = min(length, TOKENS) if manifest.coreml.all_logits else 1
    return Schedule(length, rows, TOKENS - 1 if small else LARGE_STEPS)


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
