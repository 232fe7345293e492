"""What `bench.onnx` measures: artifacts of a random 2B, a transformer beside them, and one op."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from bench.gemma_shape import write_gemma
from bench.run import FOLDER, command
from rgexport.artifacts.onnx.model_file import DOMAIN, VERSION
from rgexport.export.onnx.functions import QUANT_LINEARS

TRANSFORMER = FOLDER / "gemma-2b-shape-q4_0.gguf"
OPSET, IR_VERSION = 23, 10


@dataclass(frozen=True)
class Storage:
    """How weights are stored."""

    bits: int
    block: int

    @property
    def label(self) -> str:
        """As the page names it."""
        return f"int{self.bits}, block {self.block}"

    @property
    def artifact(self) -> Path:
        """Where the 2B lies that is stored so."""
        return FOLDER / f"2b-int{self.bits}-{self.block}"


STORAGES = {
    "int4-128": Storage(4, 128),
    "int4-32": Storage(4, 32),
    "int8": Storage(8, 128),
}
SHAPES = (2560, 7680), (7680, 2560), (2560, 2560)
"""Inputs and outputs of most of a 2B's matrices."""


def make_missing(storages: list[Storage], *, transformer: bool = True) -> None:
    """Makes the artifacts, and the transformer, where they are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if transformer and not TRANSFORMER.exists():
        write_gemma(TRANSFORMER)
    checkpoint = FOLDER / "2b-random"
    for storage in storages:
        if storage.artifact.exists():
            continue
        if not checkpoint.exists():
            command("random", "--size", "2b", "-o", checkpoint)
        word, block = f"int{storage.bits}", str(storage.block)
        asked = ["--precision", word, "--embedding-precision", word, "--block-size", block]
        asked += ["--asymmetric"] if storage.bits == 4 else []
        command("onnx", "-m", checkpoint, *asked, "--no-check", "-o", storage.artifact)


def op_model(inputs: int, outputs: int, storage: Storage) -> bytes:
    """A model of one quantized linear with random weights: x [1, T, inputs] → y [1, T, outputs]."""
    weights = dict(_weights(inputs, outputs, storage))
    numbers: dict[str, Any] = {
        "K": inputs,
        "N": outputs,
        "bits": storage.bits,
        "block_size": storage.block,
    }
    function = QUANT_LINEARS[0]
    node = helper.make_node(function.name, ["x", *weights], ["y"], domain=DOMAIN, **numbers)
    graph = helper.make_graph(
        [node],
        "one quantized linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", outputs])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = {"": OPSET, "com.microsoft": 1, DOMAIN: VERSION}
    model = helper.make_model(
        graph,
        functions=[ir.serde.serialize_function(function)],
        opset_imports=[helper.make_opsetid(*entry) for entry in imports.items()],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _weights(inputs: int, outputs: int, storage: Storage) -> Iterator[tuple[str, np.ndarray]]:
    """As `MatMulNBits` has them; int4 is asymmetric, as in the artifacts."""
    generator = np.random.default_rng(inputs + outputs)
    blocks = -(-inputs // storage.block)
    blob = storage.block * storage.bits // 8
    yield "data", generator.integers(0, 256, (outputs, blocks, blob), np.uint8)
    yield "scales", generator.uniform(1e-3, 2e-3, (outputs, blocks)).astype(np.float32)
    if storage.bits == 4:
        yield "zero_points", generator.integers(0, 256, (outputs, -(-blocks // 2)), np.uint8)
