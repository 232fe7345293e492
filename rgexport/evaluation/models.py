"""The models that are evaluated: artifacts in their engines, checkpoints in the reference."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rgexport.artifacts import opening
from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Identity, identity_of, identity_of_files
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.choices import MODEL_FORMS
from rgexport.errors import RequestError
from rgexport.evaluation.reference_session import ReferenceSession
from rgexport.files.hashing import FileRecord, hash_file
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import SIZE_WORDS, GriffinConfig
from rgexport.griffin.state import state_specs
from rgexport.runtimes.engine import engine_of, open_session, require_narrowing
from rgexport.runtimes.session import Session

Opener = tuple[str, bool]
"""The argument of `open_model`, and whether it allows foreign ops."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluatedModel:
    """A model that suites measure.

    Attributes:
        argument: opens the model with `open_model` from any working directory.
        label: name in tables and charts.
        size: bytes of the artifact, or of the checkpoint's weights.
    """

    argument: str
    label: str
    config: GriffinConfig
    size: int
    source: Artifact | Checkpoint

    @property
    def opener(self) -> Opener:
        """Arguments that open the same model in another process."""
        allow_foreign = isinstance(self.source, Artifact) and self.source.allow_foreign
        return self.argument, allow_foreign

    @cached_property
    def identity(self) -> str:
        """A hash of the model's files and its config."""
        if isinstance(self.source, Artifact):
            kind = self.source.manifest.kind
            records = list(self.source.manifest.files.values())
        else:
            kind = "checkpoint"
            records = list(self._weight_files.values())
            records += [hash_file(path) for path in self.source.tokenizer_files]
        hashes = sorted(record.sha256 for record in records)
        facts = json.dumps([kind, self.config.to_dict(), hashes], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def state_identity(self) -> Identity:
        """The identity in its state files: artifacts of one checkpoint share it."""
        if isinstance(self.source, Artifact):
            return identity_of(self.source.manifest, "")
        return identity_of_files(self.label, self._weight_files, self.config, "")

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, or None if it takes token ids only."""
        if isinstance(self.source, Artifact):
            if not self.source.manifest.has_tokenizer:
                return None
            return open_tokenizer(self.source)
        files = self.source.tokenizer_files
        if not files:
            return None
        return load_tokenizer(files[0].parent)

    def session(self, window: int | None = None, threads: int | None = None) -> Session:
        """Opens a session, perhaps with a smaller window; the caller closes it."""
        if isinstance(self.source, Artifact):
            narrow = None if window == self.config.window else window
            return open_session(self.source, threads=threads, window=narrow)
        config = self.config
        if window is not None:
            config = replace(config, window=window)
        return ReferenceSession(replace(self.source, config=config), threads=threads)

    def require_narrowing(self) -> None:
        """Refuses a model without attention, or an engine that takes the window of the file."""
        if "attention" not in self.config.block_types:
            raise RequestError(f"{self.label} has no attention, whose window could be smaller")
        if isinstance(self.source, Artifact):
            require_narrowing(self.source)

    def require_tokenizer(self, suite: str) -> None:
        """Raises RequestError if the model has no tokenizer, naming the suite that needs it."""
        if self.tokenizer is None:
            raise RequestError(
                f"{self.label} has no tokenizer, which the suite {suite} needs; pass --suite "
                "memory, or put a tokenizer into the checkpoint's folder and export it again"
            )

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each array of one sequence's state, without the batch axis."""
        return {spec.name: spec.shape for spec in state_specs(self.config)}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text without a bos; the model must have a tokenizer."""
        assert self.tokenizer is not None
        return self.tokenizer.encode_text(text)

    @property
    def bos(self) -> list[int]:
        """The bos as a list of one id; empty for a model without a bos."""
        if self.tokenizer is None or self.tokenizer.bos_id is None:
            return []
        return [self.tokenizer.bos_id]

    @cached_property
    def _weight_files(self) -> dict[str, FileRecord]:
        """The checked files of a checkpoint."""
        assert isinstance(self.source, Checkpoint)
        return dict(require_sound(self.source))


def open_model(argument: str, *, allow_foreign: bool = False) -> EvaluatedModel:
    """Opens what `export.opening.open_model` opens; an artifact's engine must be there."""
    is_path = Path(argument).exists()
    source = opening.open_model(argument, allow_foreign=allow_foreign)
    if isinstance(source, Artifact):
        engine = engine_of(source.manifest.kind)
        engine.require()
        engine.require_trusted(source)
        label = source.path.name
        config = source.manifest.config
        size = source.nbytes
    else:
        # A word such as `demo` means the model of that size, even if a file has this name.
        is_path = is_path and argument not in SIZE_WORDS
        label = source.name
        config = source.config
        size = sum(tensor.nbytes for tensor in source.weights.values())

    if is_path:
        argument = str(Path(argument).absolute())
    return EvaluatedModel(argument=argument, label=label, config=config, size=size, source=source)


def open_models(arguments: Sequence[str], *, allow_foreign: bool = False) -> list[EvaluatedModel]:
    """Opens several models, which must have different labels."""
    if not arguments:
        raise RequestError(f"a model is needed: {MODEL_FORMS}")
    models = [open_model(argument, allow_foreign=allow_foreign) for argument in arguments]
    counts = Counter(model.label for model in models)
    repeated = [label for label, count in counts.items() if count > 1]
    if repeated:
        raise RequestError(f"two models are called {min(repeated)}; rename one of them")
    return models
