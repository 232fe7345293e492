"""The engine of ONNX artifacts; its observers run a copy of the graph with more outputs."""

from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest, StoredTensor
from rgexport.artifacts.onnx.model_file import MODEL_FILE, native_ops, parse_model, read_graph
from rgexport.artifacts.onnx.trust import require_trusted
from rgexport.artifacts.storage import groups_of
from rgexport.formats import format_on
from rgexport.griffin.layout import sites
from rgexport.griffin.state import State
from rgexport.quantize.schemes.registry import Float, TwoLevel
from rgexport.runtimes import engine
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.runtimes.session import Session

_PORTABLE_LENGTHS = (7, 1)
_COPIES = 7.5  # of unpacked levels, measured: a 2B in 3 bits takes 12.5 GB


class OnnxEngine(engine.Engine):
    @property
    def can_narrow(self) -> bool:
        _exporter()  # without torch it fails here
        return True

    def require_trusted(self, artifact: Artifact) -> None:
        require_trusted(artifact, read_graph(artifact.file(MODEL_FILE)))

    def session(self, artifact: Artifact, options: engine.SessionOptions) -> Session:
        graph = None
        if options.window is not None:
            artifact, graph = _exporter().narrow(artifact, options.window)
        return OrtSession(artifact, threads=options.threads, graph=graph, native=options.native)

    def has_native(self, artifact: Artifact) -> bool:
        return native_ops(artifact.file(MODEL_FILE)).library is not None

    def observer(self, artifact: Artifact, options: engine.SessionOptions) -> engine.Observer:
        return OrtObserver(artifact, options)

    def portable_bytes(self, manifest: Manifest) -> int:
        """Adds the copies of unpacked levels that ONNX Runtime keeps until a file is open."""
        stored = (group.stored for one in manifest.tensors.values() for group in groups_of(one))
        unpacked = sum(
            one.parts["planes"].nbytes * scheme.unpacked_bits // scheme.bits
            for one in stored
            if isinstance(scheme := one.uniform, TwoLevel) and scheme.bits != scheme.unpacked_bits
        )
        return super().portable_bytes(manifest) + int(_COPIES * unpacked)

    def _held_bytes(self, tensor: StoredTensor) -> int:
        """Counts float16 weights twice: on a CPU they are converted to float32."""
        return super()._held_bytes(tensor) * (2 if tensor.scheme == Float("float16") else 1)


def _exporter() -> Any:
    """Returns the exporter, which lowers the graph of another window.

    The registry loads it, so that engines do not depend on the package `export`.
    """
    return format_on("export", "onnx")


FORMAT = OnnxEngine()


class OrtObserver:
    """ONNX Runtime over the artifact's own weights, which stay in their file.

    As every site is an output, nothing is fused across one. In float16 this changes last bits: ONNX
    Runtime omits the rounding between two fused ops.
    """

    def __init__(self, artifact: Artifact, options: engine.SessionOptions):
        model = parse_model(read_graph(artifact.file(MODEL_FILE)))
        _show_gelu(model)
        graph = model.graph
        computed = {name for node in graph.node for name in node.output}
        outputs = {value.name for value in graph.output}
        self._names = [s for s in sites(artifact.manifest.config) if s.encode() in computed]
        for name in self._names:
            if name.encode() not in outputs:
                graph.output.add(name=name.encode())
        self._session = OrtSession(
            artifact,
            threads=options.threads,
            graph=model.SerializeToString(),
            native=options.native,
        )
        self.lengths = engine.LENGTHS if options.native else _PORTABLE_LENGTHS

    def observe(self, tokens: np.ndarray, state: State) -> engine.Observation:
        self._session.set_state(state)
        values = self._session.watch(tokens[None], self._names)
        return engine.observation_of(values, self._session.get_state())


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
