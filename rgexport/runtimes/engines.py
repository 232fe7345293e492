"""Which engine runs which kind of artifact."""

from collections.abc import Callable

from rgexport.export.artifact import Artifact
from rgexport.runtimes.ort import OrtSession
from rgexport.runtimes.session import Session

ENGINES: dict[str, Callable[..., Session]] = {"onnx": OrtSession}
"""`Manifest.kind` → the session that opens it, called with an artifact and `threads`."""


def open_session(artifact: Artifact, *, threads: int | None = None) -> Session:
    """A session in the artifact's own engine.

    Raises:
        RequestError: the engine cannot open the model.
    """
    return ENGINES[artifact.manifest.kind](artifact, threads=threads)
