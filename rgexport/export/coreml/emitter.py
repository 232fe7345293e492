"""Builds one MIL function from a step program: its values, weights and states."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from rgexport.export.coreml.graph import Graph
from rgexport.export.coreml.state_io import StateIo
from rgexport.export.coreml.states import feature_name
from rgexport.export.coreml.storage import blob_dtype
from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import with_groups
from rgexport.quantize.scheme import Affine, Palette

_NUMPY = {"int4": types.np_int4_dtype, "uint4": types.np_uint4_dtype}

Shape = tuple[int, ...]


class Emitter(Graph):
    """One function that is being built from a step program, for a fixed number of tokens."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        states: StateIo,
        *,
        activation: str,
        num_logits: int,
    ):
        """`activation`: dtype of the linears; `num_logits`: for how many tokens logits are made."""
        super().__init__()
        self.num_logits = num_logits
        self.values: dict[str, Var] = {}
        self.parts: dict[str, StoredPart] = {}
        """Name of a placeholder → the stored part that it stands for."""
        self._tensors, self._states, self._activation = with_groups(tensors), states, activation

    def value(self, declared: Value) -> Var:
        """An activation, a state before this call, or a weight in its canonical shape."""
        if declared.name not in self.values:
            state = self._states.read(self, declared.name)
            self.values[declared.name] = self.weight(declared) if state is None else state
        return self.values[declared.name]

    def stored(self, weight: Value) -> StoredTensor:
        """How and where a weight, or a row group of one, is stored."""
        return self._tensors[weight.name]

    def inputs(self, node: Node) -> list[Var]:
        """All inputs of an op, none of which is optional."""
        return [self.value(declared) for declared in node.tensors]

    def declare(self, declared: Value, value: Var) -> None:
        """Names a value as the step program does, and writes it if it is a new state.

        An op's input that is its output too keeps its first name.
        """
        if value not in self.values.values():
            value.name = value.op.name = feature_name(declared.name)
        self.values[declared.name] = value
        self._states.write(self, declared.name, value)

    def weight(self, declared: Value, *shape: int) -> Var:
        """A weight, dequantized if it is quantized; one of floats may be given another `shape`.

        Its parts are placeholders without memory, which `exporter_proto` replaces by places in the
        file of weights.
        """
        stored, name = self._tensors[declared.name], feature_name(declared.name)
        part = partial(self._placeholder, name, stored)
        match stored.scheme:
            case Affine(symmetric=symmetric):
                blocks = stored.parts["scales"].shape
                parts = {"data": part("data", stored.shape), "scale": part("scales", blocks)}
                if not symmetric:
                    parts["offset"] = part("zero_points", blocks)
                return self.op("constexpr_blockwise_shift_scale", name, **parts)
            case Palette():
                groups, levels = stored.parts["lut"].shape
                indices, lut = part("data", stored.shape), part("lut", (groups, 1, levels, 1))
                return self.op("constexpr_lut_to_dense", name, indices=indices, lut=lut)
        if stored.parts["data"].dtype == "float16" and self._activation == "float32":
            # A linear takes weights of its own dtype, and a cast would make a copy in memory.
            one = np.ones((1,) * len(stored.shape), np.float32)
            data = part("data", stored.shape)
            return self.op("constexpr_blockwise_shift_scale", name, data=data, scale=one)
        return self._placeholder("", stored, "data", shape or stored.shape, name)

    def _placeholder(
        self, weight: str, stored: StoredTensor, label: str, shape: Shape, name: str = ""
    ) -> Var:
        """A constant for one part of a weight, with the memory of one element."""
        name, dtype = name or f"{weight}_{label}", blob_dtype(label, stored)
        self.parts[name] = stored.parts[label]
        zero = np.zeros(1, _NUMPY.get(dtype) or np.dtype(dtype))
        zeros = np.lib.stride_tricks.as_strided(zero, shape, (0,) * len(shape))
        return mb.const(name=name, val=zeros)
