"""What is evaluated: an artifact in its engine, or a checkpoint in the float32 reference."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.opening import means_artifact, open_artifact
from rgexport.files.hashing import hash_file
from rgexport.griffin.config import GriffinConfig
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.session import Session

if TYPE_CHECKING:
    from rgexport.griffin.checkpoint import Checkpoint


@dataclass(frozen=True)
class Subject:
    """A model that can be opened.

    Attributes:
        label: its name in tables.
        config: its shape.
        opened: the artifact or the checkpoint.
    """

    label: str
    config: GriffinConfig
    opened: "Artifact | Checkpoint"

    @cached_property
    def identity(self) -> str:
        """What tells it from every other model: a hash of its files' hashes."""
        if isinstance(self.opened, Artifact):
            manifest = self.opened.manifest
            kind, records = manifest.kind, list(manifest.files.values())
        else:
            from rgexport.griffin.checks import require_sound

            kind, records = "checkpoint", list(require_sound(self.opened).values())
            records += [hash_file(path) for path in self.opened.tokenizer_files]
        hashes = sorted(record.sha256 for record in records)
        facts = json.dumps([kind, self.config.to_dict(), hashes], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of its files."""
        if isinstance(self.opened, Artifact):
            return sum(record.size for record in self.opened.manifest.files.values())
        return sum(tensor.nbytes for tensor in self.opened.weights.values())

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its own, or None where it takes token ids only."""
        if isinstance(self.opened, Artifact):
            return open_tokenizer(self.opened) if self.opened.manifest.has_tokenizer else None
        files = self.opened.tokenizer_files
        return load_tokenizer(files[0].parent) if files else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a bos; there must be a tokenizer."""
        assert self.tokenizer is not None
        return self.tokenizer.encode_text(text)

    @property
    def bos(self) -> list[int]:
        """What a text begins with: one id, or none."""
        bos = self.tokenizer.bos_id if self.tokenizer else None
        return [] if bos is None else [bos]

    def require_tokenizer(self, suite: str) -> None:
        """Refuses a suite of texts for a model that takes ids.

        Raises:
            RequestError: it has no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError(
                f"{self.label} has no tokenizer, which the suite {suite} needs; pass --suite memory"
            )

    def session(self) -> Session:
        """A session, which the caller closes.

        Raises:
            RequestError: the engine is missing or cannot open the model.
        """
        if isinstance(self.opened, Artifact):
            return open_session(self.opened)
        from rgexport.evaluate.reference_session import ReferenceSession

        return ReferenceSession(self.opened)


def open_subject(argument: str) -> Subject:
    """An artifact, or a checkpoint: a folder, a `.pt` file, or a word such as `demo`.

    Raises:
        RequestError: it is neither, it is damaged, or its engine is missing.
    """
    if means_artifact(Path(argument)):
        artifact = open_artifact(argument)
        engine_of(artifact.manifest.kind).require()
        return Subject(artifact.path.name, artifact.manifest.config, artifact)
    from rgexport.griffin.checkpoint import means_checkpoint, open_checkpoint
    from rgexport.griffin.sizes import SIZE_WORDS

    by_size = argument in SIZE_WORDS and not means_checkpoint(Path(argument))
    checkpoint = open_checkpoint(None if by_size else argument, size=argument if by_size else None)
    return Subject(checkpoint.name, checkpoint.config, checkpoint)


def open_subjects(arguments: Sequence[str]) -> list[Subject]:
    """All of them; the first one is what the others are compared with.

    Raises:
        RequestError: one cannot be opened, or is given twice.
    """
    subjects = [open_subject(argument) for argument in arguments]
    labels = [subject.label for subject in subjects]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise RequestError(f"two models are called {min(twice)}; rename one of their folders")
    return subjects
