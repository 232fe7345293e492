"""Models of one node, and their runs in a process with a chosen instruction set."""

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper

from rgexport.artifacts.onnx.model_file import DOMAIN, VERSION
from rgexport.export.onnx import functions
from rgexport.export.onnx.emitter import OPSET
from rgexport.kernels.onnx import library
from rgexport.quantize.schemes.two_level import PLANES

Arrays = dict[str, np.ndarray]
_FUNCTIONS = [*functions.QUANT_LINEARS, functions.RG_LRU_SCAN]
_FUNCTIONS += [functions.two_level_linear(bits, rounded=True) for bits in PLANES]
BODIES = {function.name: function for function in _FUNCTIONS}
"""Those of other ops depend on the model that they are in."""


@dataclass(frozen=True)
class Case:
    """One run of one op. Weights are inputs that are initializers of the model.

    An optional input that is missing is None. Of `outputs` it has the shapes; `in_place` tells
    which of them share the buffer of an input.
    """

    op: str
    inputs: dict[str, np.ndarray | None]
    outputs: dict[str, tuple[int, ...]]
    attributes: dict[str, int | float] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()
    in_place: dict[str, str] = field(default_factory=dict)
    domain: str = DOMAIN

    @property
    def fed(self) -> Arrays:
        """The inputs of a run."""
        return {n: x for n, x in self.inputs.items() if x is not None and n not in self.weights}


def model(case: Case, body: ir.Function | None = None) -> bytes:
    """A model of the op, with its body, where it has one that fits every model."""
    names = ["" if x is None else name for name, x in case.inputs.items()]
    options = {"domain": case.domain, **case.attributes}
    node = helper.make_node(case.op, names, list(case.outputs), **options)
    stored = [(n, case.inputs[n]) for n in sorted(case.weights)]
    fed = [_info(n, x.dtype, x.ndim) for n, x in case.fed.items()]
    results = [_info(n, np.dtype(np.float32), len(shape)) for n, shape in case.outputs.items()]
    weights = [onnx.numpy_helper.from_array(x, n) for n, x in stored if x is not None]
    graph = helper.make_graph([node], "one_node", fed, results, weights)
    opsets = {"": OPSET, "com.microsoft": 1, DOMAIN: VERSION}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    body = body or BODIES.get(case.op)
    bodies = [] if body is None else [ir.serde.serialize_function(body)]
    made = helper.make_model(graph, opset_imports=imports, functions=bodies, ir_version=10)
    return made.SerializeToString()


def _info(name: str, dtype: np.dtype, rank: int) -> onnx.ValueInfoProto:
    """Dimensions without numbers, as batch and time are in exported files."""
    dims = [f"{name}_{axis}" for axis in range(rank)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), dims)


def open_model(serialized: bytes, *, native: bool = True, threads: int = 2) -> ort.InferenceSession:
    """A session that has registered our library, unless it is to run the bodies."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        assert library.library() is not None, library.kernels().reason
        options.register_custom_ops_library(str(library.library()))
    return ort.InferenceSession(serialized, options)


def run_model(
    serialized: bytes, case: Case, *, native: bool = True, threads: int = 2
) -> tuple[Arrays, dict[str, int]]:
    """Runs a model with all outputs in buffers of ours; returns them, and how often kernels ran."""
    before = library.calls()
    session = open_model(serialized, native=native, threads=threads)
    values = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in case.fed.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    results = {}
    for name, shape in case.outputs.items():
        junk = ort.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32))
        results[name] = values.get(case.in_place.get(name, ""), junk)
        binding.bind_ortvalue_output(name, results[name])
    session.run_with_iobinding(binding)
    arrays = {name: value.numpy().copy() for name, value in results.items()}
    return arrays, {n: count - before[n] for n, count in library.calls().items()}


class Worker:
    """A process in which only some instructions are used."""

    def __init__(self, instruction_set: str):
        self.instruction_set = instruction_set
        chosen = library.CPU, instruction_set
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), os.putenv, chosen)

    def run(self, case: Case, *, threads: int = 2) -> Arrays:
        """The outputs of a case; checks that it is our kernel that ran."""
        results, ran = self.submit(run_model, model(case), case, threads=threads)
        assert ran[case.op] == 1
        return results

    def submit(self, function, *arguments, **options):
        """Calls a function of a module of tests there."""
        return self._pool.submit(function, *arguments, **options).result()

    def close(self) -> None:
        self._pool.shutdown()


def different_results(case: Case, runs: int, sessions: int, at_once: int = 1) -> int:
    """How many different results the runs of a case give, which sessions share."""
    opened = [open_model(model(case)) for _ in range(sessions)]
    with ThreadPoolExecutor(at_once) as pool:
        results = [pool.submit(opened[i % sessions].run, None, case.fed) for i in range(runs)]
        return len({result.result()[0].tobytes() for result in results})
