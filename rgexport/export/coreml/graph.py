"""Builds the operations of one MIL function; equal pure operations are made once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var, types

DTYPES = {
    "float32": types.fp32,
    "float16": types.fp16,
    "int32": types.int32,
    "bool": types.bool,
    "int8": types.int8,
    "uint8": types.uint8,
    "int4": types.int4,
    "uint4": types.uint4,
}
_WORDS = {"float32": "fp32", "float16": "fp16", "int32": "int32", "bool": "bool"}
"""dtype → its name in `cast`."""


class Graph:
    """Adds operations to the function that is being built.

    Every operation is named after the site that is being lowered. Operations of the same type and
    arguments are made once, so that lowerings may ask for a mask or a cosine repeatedly.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Var] = {}
        self._names: Counter[str] = Counter()
        self._site = ""

    @contextmanager
    def site(self, name: str) -> Iterator[None]:
        """Names the operations made inside after the site `name`."""
        self._site, before = name, self._site
        yield
        self._site = before

    def op(self, kind: str, name: str | None = None, **arguments: Any) -> Var:
        """An operation with one output, named after the site unless `name` is given."""
        key = (kind, name, *((k, _identity(v)) for k, v in sorted(arguments.items())))
        if key not in self._made:
            name = name or self._unique(f"{self._site}_{kind}")
            self._made[key] = getattr(mb, kind)(name=name, **arguments)
        return self._made[key]

    def cast(self, x: Var, dtype: str) -> Var:
        """`x` in `dtype`; `x` itself if it has that dtype."""
        if x.dtype == DTYPES[dtype]:
            return x
        return self.op("cast", x=x, dtype=_WORDS[dtype])

    def reshape(self, x: Var, *shape: int) -> Var:
        """`x` in another shape; `x` itself if it has that shape."""
        return x if x.shape == shape else self.op("reshape", x=x, shape=list(shape))

    def slice(self, x: Var, start: int, stop: int, axis: int) -> Var:
        """x[start:stop] along `axis`; `x` itself if that is all of it."""
        axis %= x.rank
        if (start, stop) == (0, x.shape[axis]):
            return x
        begin, end = [0] * x.rank, list(x.shape)
        begin[axis], end[axis] = start, stop
        return self.op("slice_by_index", x=x, begin=begin, end=end)

    def concat(self, values: Sequence[Var], axis: int) -> Var:
        """The concatenation of the values; a single value is returned as it is."""
        return values[0] if len(values) == 1 else self.op("concat", values=values, axis=axis)

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}_{count - 1}"


def _identity(argument: Any) -> object:
    if isinstance(argument, Var):
        return id(argument)
    if isinstance(argument, np.ndarray | np.generic):
        return argument.dtype.str, argument.shape, argument.tobytes()
    if isinstance(argument, list | tuple):
        return tuple(map(_identity, argument))
    return argument
