"""Observes the values at the sites of an ONNX artifact, as outputs of a copy of its graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.model_file import MODEL_FILE, parse_model, read_graph
from rgexport.griffin.layout import sites
from rgexport.griffin.state import State
from rgexport.runtimes.engine import LENGTHS, Observation, observation_of
from rgexport.runtimes.onnx.session import OrtSession

_PORTABLE_LENGTHS = (7, 1)
"""`OrtObserver.lengths` without our kernels: an odd chunk too."""


class OrtObserver:
    """ONNX Runtime over the artifact's own weights, which stay in their file.

    As every site is an output, nothing is fused across one. In float16 this changes last bits: ONNX
    Runtime omits the rounding between two fused ops.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, native: bool = True):
        """Opens the graph with its sites as outputs; our kernels run where `native`.

        Raises:
            RequestError: ONNX Runtime cannot open the model.
        """
        all_sites = sites(artifact.manifest.config)
        graph, self._names = observed_graph(artifact.file(MODEL_FILE), all_sites)
        self._session = OrtSession(artifact, threads=threads, graph=graph, native=native)
        self.lengths = LENGTHS if native else _PORTABLE_LENGTHS

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        self._session.set_state(state)
        values = self._session.watch(tokens[None], self._names)
        return observation_of(values, self._session.get_state())


def observed_graph(path: Path, requested: Sequence[str]) -> tuple[bytes, list[str]]:
    """Returns a model without weights that also outputs `requested` sites, and their names.

    Values are named after their sites. Sites whose op was merged into another one are missing.
    """
    model = parse_model(read_graph(path))
    graph = model.graph
    _show_gelu(model)
    computed = {name for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    names = [site for site in requested if site.encode() in computed]
    for name in names:
        if name.encode() not in outputs:
            graph.output.add(name=name.encode())
    return model.SerializeToString(), names


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
