"""Which engine runs which kind of artifact, and what reads its text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rgexport.export.artifact import Artifact
from rgexport.runtimes.observation import Observer
from rgexport.runtimes.session import Session
from rgexport.runtimes.template import ChatTemplate, load_template
from rgexport.runtimes.tokenizer import Tokenizer, load_tokenizer

_LEAN_UBATCH = 64
"""llama.cpp reserves scratch memory for as many tokens."""


@dataclass(frozen=True)
class Engine:
    """What opens one kind of artifact.

    Libraries are loaded when they are needed: no kind of artifact takes those of another.
    """

    session: Callable[..., Session]
    """Called with an artifact and `threads`."""
    lean: Callable[..., Session]
    """The same, where opening takes least memory."""
    observer: Callable[..., Observer]
    """Called with the same."""
    tokenizer: Callable[[Artifact], Tokenizer]
    template: Callable[[Artifact], ChatTemplate]


def _onnx_session(artifact: Artifact, *, threads: int | None) -> Session:
    from rgexport.runtimes.ort import OrtSession

    return OrtSession(artifact, threads=threads)


def _coreml_session(artifact: Artifact, *, threads: int | None) -> Session:
    from rgexport.runtimes.coreml import CoreMLSession

    return CoreMLSession(artifact, threads=threads)


def _gguf_session(artifact: Artifact, *, threads: int | None, **options: Any) -> Session:
    from rgexport.runtimes.llama_cpp import LlamaCppSession

    return LlamaCppSession(artifact, threads=threads, **options)


def _lean_gguf_session(artifact: Artifact, *, threads: int | None) -> Session:
    """With `mmap`, weights that llama.cpp lays out anew would be there twice."""
    return _gguf_session(artifact, threads=threads, mmap=False, ubatch=_LEAN_UBATCH)


def _onnx_observer(artifact: Artifact, *, threads: int | None) -> Observer:
    from rgexport.runtimes.ort_observer import OrtObserver

    return OrtObserver(artifact, threads=threads)


def _coreml_observer(artifact: Artifact, *, threads: int | None) -> Observer:
    from rgexport.runtimes.coreml_observer import CoreMLObserver

    return CoreMLObserver(artifact, threads=threads)


def _gguf_observer(artifact: Artifact, *, threads: int | None) -> Observer:
    from rgexport.runtimes.llama_cpp_observer import LlamaCppObserver

    return LlamaCppObserver(artifact, threads=threads)


def _gguf_tokenizer(artifact: Artifact) -> Tokenizer:
    from rgexport.export.gguf.artifact import GgufArtifact
    from rgexport.runtimes.llama_cpp_vocabulary import load_vocabulary

    assert isinstance(artifact, GgufArtifact)
    return load_vocabulary(artifact)


def _gguf_template(artifact: Artifact) -> ChatTemplate:
    from rgexport.export.gguf.artifact import GgufArtifact
    from rgexport.runtimes.llama_cpp_vocabulary import load_metadata_template

    assert isinstance(artifact, GgufArtifact)
    return load_metadata_template(artifact)


def _folder_engine(session: Callable[..., Session], observer: Callable[..., Observer]) -> Engine:
    """For artifacts whose folder holds the files of the tokenizer."""
    return Engine(
        session=session,
        lean=session,
        observer=observer,
        tokenizer=lambda artifact: load_tokenizer(artifact.path),
        template=lambda artifact: load_template(artifact.path),
    )


ENGINES: dict[str, Engine] = {
    "onnx": _folder_engine(_onnx_session, _onnx_observer),
    "coreml": _folder_engine(_coreml_session, _coreml_observer),
    "gguf": Engine(
        session=_gguf_session,
        lean=_lean_gguf_session,
        observer=_gguf_observer,
        tokenizer=_gguf_tokenizer,
        template=_gguf_template,
    ),
}
"""`Manifest.kind` → its engine."""


def require_engine(kind: str) -> None:
    """Looks whether an engine is there, before there is something for it to open.

    Raises:
        NotInstalled: it is not.
    """
    if kind == "gguf":  # the others come with every install, or stand in for one another
        from rgexport.runtimes.llama_cpp_library import bindings

        bindings()


def open_session(artifact: Artifact, *, threads: int | None = None, lean: bool = False) -> Session:
    """A session in the artifact's own engine; a lean one takes as little memory as it can.

    Raises:
        RequestError: the engine is missing or cannot open the model.
    """
    engine = ENGINES[artifact.manifest.kind]
    return (engine.lean if lean else engine.session)(artifact, threads=threads)


def open_observer(artifact: Artifact, *, threads: int | None = None) -> Observer:
    """An observer in the artifact's own engine; it holds the model once more, beside a session.

    Raises:
        RequestError: the engine, or a package that looking into the model takes, is missing; or
            it cannot open the model.
    """
    return ENGINES[artifact.manifest.kind].observer(artifact, threads=threads)


def open_tokenizer(artifact: Artifact) -> Tokenizer:
    """The artifact's own tokenizer.

    Raises:
        RequestError: the artifact takes token ids only, or its vocabulary cannot be read.
    """
    return ENGINES[artifact.manifest.kind].tokenizer(artifact)


def open_template(artifact: Artifact) -> ChatTemplate:
    """The artifact's chat template, or Gemma's where it has none.

    Raises:
        RequestError: it cannot be read.
    """
    return ENGINES[artifact.manifest.kind].template(artifact)
