"""How a function reads and writes its states: padding, stacking, pairs of float16."""

from collections.abc import Mapping

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml.graph import Graph
from rgexport.export.coreml.states import (
    LO_SCALE,
    RECURRENT,
    RECURRENT_OUTPUT,
    feature_name,
    pair,
)
from rgexport.export.program import Value


class StateIo:
    """The states of one function.

    A state is read where it is first used, and written as soon as its new value is computed. The
    RG-LRU states are the rows of one matrix, which is written at the end.
    """

    def __init__(self, states: Mapping[str, tuple[Value, Value]], inputs: Mapping[str, Var]):
        """`states`: name → value before and after; `inputs`: the function's, with its states."""
        self._inputs = inputs
        items = states.items()
        self._before = {before.name: (name, before.size(-1)) for name, (before, _) in items}
        self._after = {after.name: name for name, (_, after) in items}
        self._rows: dict[str, Var | None] = {n: None for n in states if n.endswith(".rg_lru")}

    def read(self, g: Graph, value: str) -> Var | None:
        """The state with the name `value` in the step program; None if that is no state.

        Keys, values and convolution inputs are [1, n, width], RG-LRU states [1, R].
        """
        if value not in self._before:
            return None
        name, width = self._before[value]
        if name not in self._rows:
            return self._read(g, feature_name(name), width)
        matrix = self._inputs.get(RECURRENT)
        if matrix is None:
            matrix = g.reshape(self._read(g, RECURRENT, width), len(self._rows), width)
        row = list(self._rows).index(name)
        return g.slice(matrix, row, row + 1, 0)

    def write(self, g: Graph, value: str, state: Var) -> None:
        """Writes `state` if the step program's `value` is the new value of a state."""
        name = self._after.get(value)
        if name in self._rows:
            self._rows[name] = state
        elif name is not None:
            self._write(g, feature_name(name), state)

    def finish(self, g: Graph) -> list[Var]:
        """Writes the RG-LRU states; returns the outputs that hold states."""
        rows = [row for row in self._rows.values() if row is not None]
        if not rows:
            return []
        with g.site(RECURRENT_OUTPUT):
            matrix = g.concat(rows, 0)
            if RECURRENT in self._inputs:
                return [g.op("reshape", RECURRENT_OUTPUT, x=matrix, shape=list(matrix.shape))]
        self._write(g, RECURRENT, g.reshape(matrix, 1, *matrix.shape))
        return []

    def _read(self, g: Graph, name: str, width: int) -> Var:
        """A state [1, n, width]: float16, or float32 if it is a pair."""
        with g.site(name):
            if name in self._inputs:
                return self._load(g, name, width)
            hi, lo = (g.cast(self._load(g, half, width), "float32") for half in pair(name))
            return g.op("add", x=hi, y=g.op("mul", x=lo, y=np.float32(1 / LO_SCALE)))

    def _write(self, g: Graph, name: str, value: Var) -> None:
        """The inverse of `_read`."""
        with g.site(name):
            if name in self._inputs:
                return self._store(g, name, value)
            hi = g.cast(value, "float16")
            rest = g.op("sub", x=value, y=g.cast(hi, "float32"))
            lo = g.cast(g.op("mul", x=rest, y=np.float32(LO_SCALE)), "float16")
            for half, part in zip(pair(name), (hi, lo), strict=True):
                self._store(g, half, part)

    def _load(self, g: Graph, name: str, width: int) -> Var:
        """A Core ML state [1, 1, n, padded], as [1, n, width]."""
        state = g.op("read_state", input=self._inputs[name])
        return g.slice(g.reshape(state, 1, *state.shape[2:]), 0, width, 2)

    def _store(self, g: Graph, name: str, value: Var) -> None:
        """Writes [1, n, width] into a Core ML state."""
        state = self._inputs[name]
        _, _, count, padded = state.sym_type.wrapped_type().get_shape()
        if padded > value.shape[2]:
            zeros = np.zeros((1, count, padded - value.shape[2]), np.float16)
            value = g.concat([value, g.op("const", val=zeros)], 2)
        value = g.reshape(value, 1, 1, count, padded)
        g.op("coreml_update_state", f"{name}_write", state=state, value=value)
