"""The engine of ONNX artifacts; its observers run a copy of the graph with more outputs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.export.onnx.model_file import MODEL_FILE, native_ops, parse_model, read_graph
from rgexport.export.onnx.trust import require_trusted
from rgexport.griffin.layout import EMBEDDING, sites
from rgexport.griffin.state import State
from rgexport.quantize.scheme import Float
from rgexport.runtimes.engine import (
    LENGTHS,
    Engine,
    Observation,
    Observer,
    OpenNarrow,
    observation_of,
)
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.runtimes.session import Session

_PORTABLE_LENGTHS = (7, 1)


class OnnxEngine(Engine):
    def require_trusted(self, artifact: Artifact) -> None:
        require_trusted(artifact, read_graph(artifact.file(MODEL_FILE)))

    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        return OrtSession(artifact, threads=threads)

    def narrowing(self, artifact: Artifact) -> OpenNarrow:
        from rgexport.export.onnx.model import narrowed

        def open_narrow(window: int, threads: int | None) -> Session:
            narrow, graph = narrowed(artifact, window)
            return OrtSession(narrow, threads=threads, graph=graph)

        return open_narrow

    def has_native(self, artifact: Artifact) -> bool:
        return native_ops(artifact.file(MODEL_FILE)).library is not None

    def portable_session(self, artifact: Artifact) -> Session:
        return OrtSession(artifact, native=False)

    def portable_observer(self, artifact: Artifact) -> Observer:
        return OrtObserver(artifact, native=False)

    def observer(self, artifact: Artifact, *, threads: int | None = None) -> Observer:
        return OrtObserver(artifact, threads=threads)

    def _tensor_bytes(self, manifest: Manifest) -> Iterator[int]:
        """Counts float16 weights twice: on a CPU they are converted to float32."""
        names = (*manifest.tensors, EMBEDDING)
        for name, size in zip(names, super()._tensor_bytes(manifest), strict=True):
            scheme = manifest.tensors[name].scheme
            yield 2 * size if scheme == Float("float16") else size


FORMAT = OnnxEngine()


class OrtObserver:
    """ONNX Runtime over the artifact's own weights, which stay in their file.

    As every site is an output, nothing is fused across one. In float16 this changes last bits: ONNX
    Runtime omits the rounding between two fused ops.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, native: bool = True):
        model = parse_model(read_graph(artifact.file(MODEL_FILE)))
        _show_gelu(model)
        graph = model.graph
        computed = {name for node in graph.node for name in node.output}
        outputs = {value.name for value in graph.output}
        self._names = [s for s in sites(artifact.manifest.config) if s.encode() in computed]
        for name in self._names:
            if name.encode() not in outputs:
                graph.output.add(name=name.encode())
        graph_file = model.SerializeToString()
        self._session = OrtSession(artifact, threads=threads, graph=graph_file, native=native)
        self.lengths = LENGTHS if native else _PORTABLE_LENGTHS

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        self._session.set_state(state)
        values = self._session.watch(tokens[None], self._names)
        return observation_of(values, self._session.get_state())


def _show_gelu(model: Any) -> None:
    """Replaces each GeluMul by its body, in which the result of gelu has the name of its site."""
    bodies = {function.name: function for function in model.function}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type != b"GeluMul" or node.op_type not in bodies:
            model.graph.node.append(node)
            continue
        body = bodies[node.op_type]
        renamed = dict(zip((*body.input, *body.output), (*node.input, *node.output), strict=True))
        block = node.output[0].rpartition(b".")[0]
        renamed[body.node[0].output[0]] = block + b".gelu"
        for inner in body.node:
            copy = model.graph.node.add()
            copy.CopyFrom(inner)
            copy.name = node.name + b"/" + inner.name
            for names in (copy.input, copy.output):
                names[:] = [renamed[name] for name in names]
