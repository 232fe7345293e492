"""What is evaluated: an artifact in its engine, a checkpoint in the float32 reference, any GGUF."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.gguf.foreign import ForeignGguf, find_foreign
from rgexport.export.hub import is_hub_name
from rgexport.export.identity import Identity, identity_of, identity_of_files
from rgexport.export.opening import means_artifact, open_artifact
from rgexport.files.hashing import hash_file
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import state_specs
from rgexport.runtimes.engine import engine_of, open_narrow_session, open_session
from rgexport.runtimes.session import Session

if TYPE_CHECKING:
    from rgexport.griffin.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that can be opened.

    Attributes:
        argument: what opens it, in any folder.
        label: its name in tables.
        config: its shape; None where rgexport did not make it.
        opened: the artifact, the checkpoint, or the file that rgexport did not make.
    """

    argument: str
    label: str
    config: GriffinConfig | None
    opened: "Artifact | Checkpoint | ForeignGguf"

    @cached_property
    def identity(self) -> str:
        """What tells it from every other model: a hash of its files' hashes."""
        if isinstance(self.opened, Artifact):
            manifest = self.opened.manifest
            kind, records = manifest.kind, list(manifest.files.values())
        elif isinstance(self.opened, ForeignGguf):
            kind, records = "foreign gguf", [self.opened.record()]
        else:
            from rgexport.griffin.checks import require_sound

            kind, records = "checkpoint", list(require_sound(self.opened).values())
            records += [hash_file(path) for path in self.opened.tokenizer_files]
        hashes = sorted(record.sha256 for record in records)
        facts = json.dumps([kind, self.config and self.config.to_dict(), hashes], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    @cached_property
    def state_identity(self) -> Identity | None:
        """What its states are of: artifacts of one checkpoint can go on with each other's.

        None where states are in no form that another engine takes.
        """
        if isinstance(self.opened, Artifact):
            return identity_of(self.opened.manifest, "")
        if isinstance(self.opened, ForeignGguf):
            return None
        from rgexport.griffin.checks import require_sound

        return identity_of_files(self.label, require_sound(self.opened), self.opened.config, "")

    @property
    def allow_foreign(self) -> bool:
        """Whether engines may run an artifact's graph with ops that rgexport does not write."""
        return isinstance(self.opened, Artifact) and self.opened.allow_foreign

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each canonical state, without the batch axis."""
        return {spec.name: spec.shape for spec in state_specs(self.config)} if self.config else {}

    @property
    def window(self) -> int:
        """Tokens that attention sees; RecurrentGemma's where all tokens before are seen."""
        if self.config is not None:
            return self.config.window
        assert isinstance(self.opened, ForeignGguf)
        return self.opened.window or GriffinConfig.window

    @property
    def size(self) -> int:
        """Bytes of its files."""
        if isinstance(self.opened, Artifact):
            return sum(record.size for record in self.opened.manifest.files.values())
        if isinstance(self.opened, ForeignGguf):
            return self.opened.path.stat().st_size
        return sum(tensor.nbytes for tensor in self.opened.weights.values())

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its own, or None where it takes token ids only."""
        if isinstance(self.opened, Artifact):
            return open_tokenizer(self.opened) if self.opened.manifest.has_tokenizer else None
        if isinstance(self.opened, ForeignGguf):
            from rgexport.chat.gguf_text import load_any_vocabulary

            return load_any_vocabulary(self.opened.path)
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
                f"{self.label} has no tokenizer, which the suite {suite} needs; pass --suite "
                "memory, or put a tokenizer into the checkpoint's folder and export it again"
            )

    def require_narrowing(self) -> None:
        """Refuses a model whose window of attention cannot be made smaller.

        Raises:
            RequestError: see there.
        """
        if self.config is None:
            raise RequestError(f"the window of {self.label} is fixed: it was not made by rgexport")
        if "attention" not in self.config.block_types:
            raise RequestError(f"{self.label} has no attention, whose window could be smaller")
        if isinstance(self.opened, Artifact):
            engine_of(self.opened.manifest.kind).narrowing(self.opened)

    def session(self, window: int | None = None, threads: int | None = None) -> Session:
        """A session, which the caller closes; perhaps with a smaller window.

        Raises:
            RequestError: the engine is missing, cannot open the model, or cannot narrow its window.
        """
        if isinstance(self.opened, Artifact):
            if window in (None, self.window):
                return open_session(self.opened, threads=threads)
            return open_narrow_session(self.opened, window, threads=threads)
        if isinstance(self.opened, ForeignGguf):
            from rgexport.runtimes.llama_cpp.any_model import AnyModelSession

            return AnyModelSession(self.opened.path, threads=threads)
        from rgexport.evaluate.reference_session import ReferenceSession

        own = self.opened.config
        config = own if window is None else replace(own, window=window)
        return ReferenceSession(replace(self.opened, config=config), threads=threads)


def open_subject(argument: str, *, allow_foreign: bool = False) -> Subject:
    """An artifact, a GGUF file of any model, or a checkpoint.

    A checkpoint is a folder, a `.pt` file, or a word such as `demo`.

    Raises:
        RequestError: it is none of them, it is damaged, or its engine is missing.
    """
    if foreign := find_foreign(Path(argument)):
        engine_of("gguf").require()
        return Subject(str(foreign.path.absolute()), foreign.path.name, None, foreign)
    if means_artifact(Path(argument)):
        artifact = open_artifact(argument, allow_foreign=allow_foreign)
        engine_of(artifact.manifest.kind).require()
        engine_of(artifact.manifest.kind).require_trusted(artifact)
        own = argument if is_hub_name(argument) else str(artifact.path.absolute())
        return Subject(own, artifact.path.name, artifact.manifest.config, artifact)
    import rgexport.evaluate.reference_session  # noqa: F401  # needs torch: told of at once
    from rgexport.griffin.checkpoint import means_checkpoint, open_checkpoint
    from rgexport.griffin.sizes import SIZE_WORDS

    by_size = argument in SIZE_WORDS and not means_checkpoint(Path(argument))
    checkpoint = open_checkpoint(None if by_size else argument, size=argument if by_size else None)
    is_path = not by_size and Path(argument).exists()
    own = str(Path(argument).absolute()) if is_path else argument
    return Subject(own, checkpoint.name, checkpoint.config, checkpoint)


def open_subjects(arguments: Sequence[str], *, allow_foreign: bool = False) -> list[Subject]:
    """All of them; the first one is what the others are compared with.

    Raises:
        RequestError: one cannot be opened, or is given twice.
    """
    subjects = [open_subject(argument, allow_foreign=allow_foreign) for argument in arguments]
    labels = [subject.label for subject in subjects]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise RequestError(f"two models are called {min(twice)}; rename one of them")
    return subjects
