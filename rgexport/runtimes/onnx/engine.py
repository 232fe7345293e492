"""The engine of ONNX artifacts."""

from collections.abc import Iterator

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.export.onnx.model_file import MODEL_FILE, native_ops, read_graph
from rgexport.export.onnx.trust import require_trusted
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.scheme import Float
from rgexport.runtimes.engine import Engine, Observer, OpenNarrow
from rgexport.runtimes.session import Session


class OnnxEngine(Engine):
    def require_trusted(self, artifact: Artifact) -> None:
        require_trusted(artifact, read_graph(artifact.file(MODEL_FILE)))

    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        from rgexport.runtimes.onnx.session import OrtSession

        return OrtSession(artifact, threads=threads)

    def narrowing(self, artifact: Artifact) -> OpenNarrow:
        """Returns a function that puts the weights into another graph, which torch traces."""
        from rgexport.export.onnx.model import narrowed
        from rgexport.runtimes.onnx.session import OrtSession

        def open_narrow(window: int, threads: int | None) -> Session:
            narrow, graph = narrowed(artifact, window)
            return OrtSession(narrow, threads=threads, graph=graph)

        return open_narrow

    def has_native(self, artifact: Artifact) -> bool:
        return native_ops(artifact.file(MODEL_FILE)).library is not None

    def portable_session(self, artifact: Artifact) -> Session:
        from rgexport.runtimes.onnx.session import OrtSession

        return OrtSession(artifact, native=False)

    def portable_observer(self, artifact: Artifact) -> Observer:
        from rgexport.runtimes.onnx.observer import OrtObserver

        return OrtObserver(artifact, native=False)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        from rgexport.runtimes.onnx.observer import OrtObserver

        return OrtObserver(artifact, threads=threads)

    def _tensor_bytes(self, manifest: Manifest) -> Iterator[int]:
        """Counts float16 weights twice: on a CPU they are converted to float32."""
        names = (*manifest.tensors, EMBEDDING)
        for name, size in zip(names, super()._tensor_bytes(manifest), strict=True):
            scheme = manifest.tensors[name].scheme
            yield 2 * size if scheme == Float("float16") else size


FORMAT = OnnxEngine()
