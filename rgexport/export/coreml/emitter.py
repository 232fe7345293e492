"""Builds one MIL function from a step program; equal pure operations are made once."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

from rgexport.artifacts.coreml.manifest import (
    LO_SCALE,
    RECURRENT,
    RECURRENT_OUTPUT,
    Shape,
    feature_name,
    pair,
)
from rgexport.artifacts.manifest import StoredPart, StoredTensor
from rgexport.export.coreml.storage import blob_dtype
from rgexport.export.program import Node, Value
from rgexport.export.row_groups import with_groups
from rgexport.quantize.schemes.registry import Affine, Palette

_CAST_NAMES = {"float32": "fp32", "float16": "fp16", "int32": "int32", "bool": "bool"}
DTYPES = {name: getattr(types, cast) for name, cast in _CAST_NAMES.items()} | {
    name: getattr(types, name) for name in ("int8", "uint8", "int4", "uint4")
}
_NUMPY = {"int4": types.np_int4_dtype, "uint4": types.np_uint4_dtype}


class CoreMLEmitter:
    """One function of a step program for a fixed number of tokens, with `num_logits` logits.

    Operations are named after the site that is lowered; equal ones are made once. A state is read
    where it is first used, and written as soon as its new value is computed; the RG-LRU states,
    rows of one matrix, at the end.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        states: Mapping[str, tuple[Value, Value]],
        inputs: Mapping[str, Var],
        *,
        activation: str,
        num_logits: int,
    ):
        self._made: dict[tuple[object, ...], Var] = {}
        self._names: Counter[str] = Counter()
        self._site = ""
        self.num_logits = num_logits
        self.values: dict[str, Var] = {}
        self.parts: dict[str, StoredPart] = {}
        """Name of a placeholder → the stored part that it stands for."""
        self._tensors, self._inputs, self._activation = with_groups(tensors), inputs, activation
        items = states.items()
        self._before = {before.name: (name, before.size(-1)) for name, (before, _) in items}
        self._after = {after.name: name for name, (_, after) in items}
        self._rows: dict[str, Var | None] = {n: None for n in states if n.endswith(".rg_lru")}

    @contextmanager
    def site(self, name: str) -> Iterator[None]:
        self._site, before = name, self._site
        yield
        self._site = before

    def op(self, kind: str, name: str | None = None, **arguments: Any) -> Var:
        """Adds an operation with one output, named after the site unless `name` is set."""
        key = (kind, name, *((k, _identity(v)) for k, v in sorted(arguments.items())))
        if key not in self._made:
            if name is None:
                name = f"{self._site}_{kind}"
                self._names[name] += 1
                count = self._names[name]
                name = name if count == 1 else f"{name}_{count - 1}"
            self._made[key] = getattr(mb, kind)(name=name, **arguments)
        return self._made[key]

    def cast(self, x: Var, dtype: str) -> Var:
        same = x.dtype == DTYPES[dtype]
        return x if same else self.op("cast", x=x, dtype=_CAST_NAMES[dtype])

    def reshape(self, x: Var, *shape: int) -> Var:
        return x if x.shape == shape else self.op("reshape", x=x, shape=list(shape))

    def slice(self, x: Var, start: int, stop: int, axis: int) -> Var:
        axis %= x.rank
        if (start, stop) == (0, x.shape[axis]):
            return x
        begin, end = [0] * x.rank, list(x.shape)
        begin[axis], end[axis] = start, stop
        return self.op("slice_by_index", x=x, begin=begin, end=end)

    def concat(self, values: Sequence[Var], axis: int) -> Var:
        return values[0] if len(values) == 1 else self.op("concat", values=values, axis=axis)

    def value(self, declared: Value) -> Var:
        name = declared.name
        if name not in self.values:
            is_state = name in self._before
            self.values[name] = self._old_state(name) if is_state else self.weight(declared)
        return self.values[name]

    def stored(self, weight: Value) -> StoredTensor:
        return self._tensors[weight.name]

    def inputs(self, node: Node) -> list[Var]:
        return [self.value(declared) for declared in node.tensors]

    def declare(self, declared: Value, value: Var) -> None:
        """Names a value as the step program does, unless it has a name; writes a state."""
        if value not in self.values.values():
            value.name = value.op.name = feature_name(declared.name)
        self.values[declared.name] = value
        state = self._after.get(declared.name)
        if state in self._rows:
            self._rows[state] = value
        elif state is not None:
            self._write(feature_name(state), value)

    def finish(self) -> list[Var]:
        rows = [row for row in self._rows.values() if row is not None]
        if not rows:
            return []
        with self.site(RECURRENT_OUTPUT):
            matrix = self.concat(rows, 0)
            if RECURRENT in self._inputs:
                return [self.op("reshape", RECURRENT_OUTPUT, x=matrix, shape=list(matrix.shape))]
        self._write(RECURRENT, self.reshape(matrix, 1, *matrix.shape))
        return []

    def weight(self, declared: Value, *shape: int) -> Var:
        """Returns a dequantized weight over placeholders; one of floats may get another `shape`."""
        stored, name = self._tensors[declared.name], feature_name(declared.name)
        part = partial(self._placeholder, name, stored)
        match stored.scheme:
            case Affine(symmetric=symmetric):
                blocks = stored.parts["scales"].shape
                inputs = {"data": part("data", stored.shape), "scale": part("scales", blocks)}
                if not symmetric:
                    inputs["offset"] = part("zero_points", blocks)
                return self.op("constexpr_blockwise_shift_scale", name, **inputs)
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
        """Makes a constant for one part of a weight, with the memory of one element."""
        name, dtype = name or f"{weight}_{label}", blob_dtype(label, stored)
        self.parts[name] = stored.parts[label]
        zero = np.zeros(1, _NUMPY.get(dtype) or np.dtype(dtype))
        zeros = np.lib.stride_tricks.as_strided(zero, shape, (0,) * len(shape))
        return mb.const(name=name, val=zeros)

    def _old_state(self, value: str) -> Var:
        """Reads keys, values or convolution inputs [1, n, width], or an RG-LRU state [1, R]."""
        name, width = self._before[value]
        if name not in self._rows:
            return self._read(feature_name(name), width)
        matrix = self._inputs.get(RECURRENT)
        if matrix is None:
            matrix = self.reshape(self._read(RECURRENT, width), len(self._rows), width)
        row = list(self._rows).index(name)
        return self.slice(matrix, row, row + 1, 0)

    def _read(self, name: str, width: int) -> Var:
        """Reads a state [1, n, width]: float16, or float32 if it is a pair."""
        with self.site(name):
            if name in self._inputs:
                return self._load(name, width)
            hi, lo = (self.cast(self._load(half, width), "float32") for half in pair(name))
            return self.op("add", x=hi, y=self.op("mul", x=lo, y=np.float32(1 / LO_SCALE)))

    def _write(self, name: str, value: Var) -> None:
        with self.site(name):
            if name in self._inputs:
                return self._store(name, value)
            hi = self.cast(value, "float16")
            rest = self.op("sub", x=value, y=self.cast(hi, "float32"))
            lo = self.cast(self.op("mul", x=rest, y=np.float32(LO_SCALE)), "float16")
            for feature, half in zip(pair(name), (hi, lo), strict=True):
                self._store(feature, half)

    def _load(self, name: str, width: int) -> Var:
        """Reads a Core ML state [1, 1, n, padded] as [1, n, width]."""
        state = self.op("read_state", input=self._inputs[name])
        return self.slice(self.reshape(state, 1, *state.shape[2:]), 0, width, 2)

    def _store(self, name: str, value: Var) -> None:
        state = self._inputs[name]
        _, _, count, padded = state.sym_type.wrapped_type().get_shape()
        if padded > value.shape[2]:
            zeros = np.zeros((1, count, padded - value.shape[2]), np.float16)
            value = self.concat([value, self.op("const", val=zeros)], 2)
        value = self.reshape(value, 1, 1, count, padded)
        self.op("coreml_update_state", f"{name}_write", state=state, value=value)


def _identity(argument: Any) -> object:
    if isinstance(argument, Var):
        return id(argument)
    if isinstance(argument, np.ndarray | np.generic):
        return argument.dtype.str, argument.shape, argument.tobytes()
    return tuple(map(_identity, argument)) if isinstance(argument, list | tuple) else argument
