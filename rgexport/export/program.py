"""Holds the step program: the result of the trace, which every emitter lowers."""

from dataclasses import dataclass

Dim = int | str  # a fixed size, or the name of a dynamic one: `batch_size`, `tokens`, `num_logits`


@dataclass(frozen=True)
class Value:
    """A tensor of the program, named after the site that makes it (`site.1`: its second result)."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str

    def size(self, axis: int) -> int:
        size = self.shape[axis]
        assert isinstance(size, int), f"axis {axis} of {self.name} is {size}"
        return size


@dataclass(frozen=True)
class Node:
    op: str
    site: str
    inputs: tuple[Value | None, ...]
    attributes: dict[str, float]
    outputs: tuple[Value, ...]

    @property
    def tensors(self) -> list[Value]:
        return [value for value in self.inputs if value is not None]


@dataclass(frozen=True)
class StepProgram:
    input_ids: Value
    position_ids: Value
    num_logits: Value
    states: dict[str, tuple[Value, Value]]  # canonical name → the values that come in and go out
    nodes: tuple[Node, ...]
    logits: Value
