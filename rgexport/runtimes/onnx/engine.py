"""The engine of ONNX artifacts; its observers run a copy of the graph with more outputs."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest, StoredTensor
from rgexport.artifacts.onnx.messages import parse_model
from rgexport.artifacts.onnx.model_file import MODEL_FILE, native_ops, read_graph
from rgexport.artifacts.onnx.trust import require_trusted
from rgexport.artifacts.storage import groups_of
from rgexport.formats import format_on
from rgexport.griffin.layout import sites
from rgexport.griffin.state import State
from rgexport.quantize.schemes.registry import Float
from rgexport.runtimes import engine
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.runtimes.session import Session

_PORTABLE_LENGTHS = (7, 1)
"""`Observer.lengths` without our kernels."""
_COPIES = 7.5
"""Copies of unpacked levels in memory, measured: a 2B in 3 bits takes 12.5 GB."""


class OnnxEngine(engine.Engine):
    """ONNX Runtime on the CPU."""

    @property
    def can_narrow(self) -> bool:
        """Whether sessions can have a smaller window; the exporter fails here without torch."""
        _exporter()
        return True

    def require_trusted(self, artifact: Artifact) -> None:
        """Refuses a graph with ops that rgexport does not write, or with large constants."""
        require_trusted(artifact, read_graph(artifact.file(MODEL_FILE)))

    def session(self, artifact: Artifact, options: engine.SessionOptions) -> Session:
        """Opens a session; a smaller window takes a graph of its own over the same weights."""
        graph = None
        if options.window is not None:
            artifact, graph = _exporter().narrow(artifact, options.window)
        return OrtSession(artifact, threads=options.threads, graph=graph, native=options.native)

    def has_native(self, artifact: Artifact) -> bool:
        """Returns whether our kernels replace functions of the artifact on this machine."""
        return native_ops(artifact.file(MODEL_FILE)).library is not None

    def observer(self, artifact: Artifact, options: engine.SessionOptions) -> engine.Observer:
        """Opens an observer of the graph, with our kernels if the options allow them."""
        return OrtObserver(artifact, options)

    def portable_bytes(self, manifest: Manifest) -> int:
        """Adds the copies of unpacked levels that ONNX Runtime keeps until a file is open."""
        unpacked = sum(_unpacked_bytes(tensor) for tensor in manifest.tensors.values())
        return super().portable_bytes(manifest) + int(_COPIES * unpacked)

    def _held_bytes(self, tensor: StoredTensor) -> int:
        """Counts float16 weights twice: on a CPU they are converted to float32."""
        stored = super()._held_bytes(tensor)
        if tensor.scheme == Float("float16"):
            return 2 * stored
        return stored


def _exporter() -> Any:
    """Returns the exporter, which lowers the graph of another window.

    The registry loads it, so that engines do not depend on the package `export`.
    """
    return format_on("export", "onnx")


FORMAT = OnnxEngine()


def _unpacked_bytes(tensor: StoredTensor) -> int:
    """Returns the bytes of levels that stock ops unpack before they use them."""
    unpacked = 0
    for group in groups_of(tensor):
        unpacked += group.stored.uniform.unpacked_bytes(group.stored.shape)
    return unpacked


class OrtObserver:
    """ONNX Runtime over the artifact's own weights, which stay in their file.

    As every site is an output, nothing is fused across one. In float16 this changes last bits: ONNX
    Runtime omits the rounding between two fused ops.
    """

    def __init__(self, artifact: Artifact, options: engine.SessionOptions):
        model = parse_model(read_graph(artifact.file(MODEL_FILE)))
        _show_gelu(model)
        self._names = _add_site_outputs(model.graph, sites(artifact.manifest.config))
        self._session = OrtSession(
            artifact,
            threads=options.threads,
            graph=model.SerializeToString(),
            native=options.native,
        )
        self.lengths = engine.LENGTHS if options.native else _PORTABLE_LENGTHS

    def observe(self, tokens: np.ndarray, state: State) -> engine.Observation:
        """Takes tokens [T] from a canonical state of batch 1, in one run."""
        self._session.set_state(state)
        values = self._session.watch(tokens[None], self._names)
        return engine.observation_of(values, self._session.get_state())


def _add_site_outputs(graph: Any, names: Iterable[str]) -> list[str]:
    """Makes the sites that the graph computes its outputs; returns their names."""
    computed = {name for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    present = [name for name in names if name.encode() in computed]
    for name in present:
        if name.encode() not in outputs:
            graph.output.add(name=name.encode())
    return present


def _show_gelu(model: Any) -> None:
    """Replaces each GeluMul by its body, in which the result of gelu has the name of its site."""
    bodies = {function.name: function for function in model.function}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == b"GeluMul" and node.op_type in bodies:
            _inline_gelu(model.graph, node, bodies[node.op_type])
        else:
            model.graph.node.append(node)


def _inline_gelu(graph: Any, node: Any, body: Any) -> None:
    """Appends the nodes of a function's body, with the names that `node` gives its values."""
    formal = (*body.input, *body.output)
    actual = (*node.input, *node.output)
    renamed = dict(zip(formal, actual, strict=True))
    block = node.output[0].rpartition(b".")[0]
    gelu = body.node[0].output[0]
    renamed[gelu] = block + b".gelu"

    for inner in body.node:
        copy = graph.node.add()
        copy.CopyFrom(inner)
        copy.name = node.name + b"/" + inner.name
        copy.input[:] = [renamed[name] for name in copy.input]
        copy.output[:] = [renamed[name] for name in copy.output]
