"""Models of one node of our domain, and their runs in a process with a chosen instruction set."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper

from rgexport.export.onnx.functions import QUANT_LINEARS, RG_LRU_SCAN
from rgexport.export.onnx.graph import OPSET
from rgexport.export.onnx.native import DOMAIN, VERSION
from rgexport.kernels.onnx import library

Arrays = dict[str, np.ndarray]
BODIES = {function.name: function for function in (*QUANT_LINEARS, RG_LRU_SCAN)}
"""Those of other ops depend on the model that they are in."""


@dataclass(frozen=True)
class Case:
    """One run of one op.

    Attributes:
        op: its name.
        inputs: in the op's order; None where an optional one is missing.
        outputs: their names and shapes.
        attributes: of the node.
        weights: names of the inputs that are initializers of the model.
        in_place: output → the input whose buffer it shares.
    """

    op: str
    inputs: dict[str, np.ndarray | None]
    outputs: dict[str, tuple[int, ...]]
    attributes: dict[str, int | float] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()
    in_place: dict[str, str] = field(default_factory=dict)

    @property
    def given(self) -> Arrays:
        """The inputs that are there."""
        return {name: x for name, x in self.inputs.items() if x is not None}


def model(case: Case) -> bytes:
    """A model of the op, with its body, where it has one that fits every model."""
    names = ["" if x is None else name for name, x in case.inputs.items()]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(case.op, names, list(case.outputs), domain=DOMAIN, **case.attributes)
    given = case.given
    fed = [_info(n, x.dtype, x.shape) for n, x in given.items() if n not in case.weights]
    results = [_info(n, np.dtype(np.float32), shape) for n, shape in case.outputs.items()]
    stored = [onnx.numpy_helper.from_array(given[n], n) for n in given if n in case.weights]
    graph = helper.make_graph([node], "one_node", fed, results, stored)
    opsets = {"": OPSET, "com.microsoft": 1, DOMAIN: VERSION}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    body = BODIES.get(case.op)
    bodies = [] if body is None else [ir.serde.serialize_function(body)]
    made = helper.make_model(graph, opset_imports=imports, functions=bodies, ir_version=10)
    return made.SerializeToString()


def _info(name: str, dtype: np.dtype, shape: Sequence[int]) -> onnx.ValueInfoProto:
    """Dimensions without numbers, as batch and time are in exported files."""
    dims = [f"{name}_{axis}" for axis in range(len(shape))]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), dims)


def open_model(serialized: bytes, *, native: bool = True, threads: int = 2) -> ort.InferenceSession:
    """A session that has registered our library, unless it is to run the bodies."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    path = library.library()
    if native:
        assert path is not None, library.kernels().reason
        options.register_custom_ops_library(str(path))
    return ort.InferenceSession(serialized, options)


def run_model(
    serialized: bytes,
    fed: Arrays,
    in_place: Mapping[str, str],
    outputs: Mapping[str, tuple[int, ...]],
    *,
    native: bool = True,
    threads: int = 2,
) -> tuple[Arrays, dict[str, int]]:
    """Runs a model with all outputs in buffers of ours; returns them, and how often kernels ran."""
    before = library.calls()
    session = open_model(serialized, native=native, threads=threads)
    values = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in fed.items()}
    junk = {n: np.full(shape, np.nan, np.float32) for n, shape in outputs.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, shape in junk.items():
        shared = values.get(in_place.get(name, ""))
        values[f"out:{name}"] = shared or ort.OrtValue.ortvalue_from_numpy(shape)
        binding.bind_ortvalue_output(name, values[f"out:{name}"])
    session.run_with_iobinding(binding)
    results = {n: values[f"out:{n}"].numpy().copy() for n in outputs}
    return results, {n: count - before[n] for n, count in library.calls().items()}


class Worker:
    """A process in which only some instructions are used, or ONNX Runtime's own kernels."""

    def __init__(self, instruction_set: str):
        """Starts it; `stock` is the body of the function, without our library."""
        self.instruction_set = instruction_set
        self.native = instruction_set != "stock"
        word = instruction_set if self.native else ""
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_set_level, initargs=(word,)
        )

    def run(self, case: Case, *, threads: int = 2) -> Arrays:
        """The outputs of a case; checks that it is our kernel that ran, or that it is not."""
        fed = {n: x for n, x in case.given.items() if n not in case.weights}
        options = {"native": self.native, "threads": threads}
        results, ran = self.submit(
            run_model, model(case), fed, case.in_place, case.outputs, **options
        )
        assert ran.get(case.op, 0) == (1 if self.native else 0)
        return results

    def submit(self, function, *arguments, **options):
        """Calls a function of a module of tests there."""
        return self._pool.submit(function, *arguments, **options).result()

    def close(self) -> None:
        self._pool.shutdown()


def _set_level(word: str) -> None:
    os.environ[library.CPU] = word


def instruction_set_here() -> str:
    """What the library says in the process that asks."""
    return library.kernels().instruction_set
