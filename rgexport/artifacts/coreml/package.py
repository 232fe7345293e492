"""Cuts a model into packages: one, or one with both ends of the model, and others with layers.

The two ends share a package because they share a table: the head uses the embedding's weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rgexport.griffin.layout import EMBEDDING

PACKAGE = "model.mlpackage"
"""The package of a model that is not cut."""

ENDS = "ends.mlpackage"
"""The package of the embedding and the head, if a model is cut into several."""

AUTHOR = "com.apple.CoreML"
"""The folder of a package's data, named after the author in its manifest."""

DECODE = "decode"
"""The function of a segment that takes one token."""

PREFILL = "prefill"
"""The function of a segment that takes a fixed number of tokens."""

_Item = TypeVar("_Item")


def model_file(package: str = PACKAGE) -> str:
    """Returns the relative path of a package's program."""
    return f"{package}/Data/{AUTHOR}/model.mlmodel"


def weight_file(package: str = PACKAGE) -> str:
    """Returns the relative path of a package's weights."""
    return f"{package}/Data/{AUTHOR}/weights/weight.bin"


@dataclass(frozen=True)
class Segment:
    """A run of layers, with or without the ends of the model, that each call computes.

    Attributes:
        prefix: begins the names of its functions.
        begins: whether it takes token ids, and has the embedding.
        layers: the numbers of its layers.
        ends: whether it gives logits.
    """

    prefix: str
    begins: bool
    layers: range
    ends: bool

    def function(self, name: str) -> str:
        """Returns the name of its function `DECODE` or `PREFILL` in the program."""
        return self.prefix + name

    def of_layers(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        """Returns the items of its layers; items are named like tensors or states."""
        return {name: item for name, item in items.items() if layer_of(name) in self.layers}

    def tensors(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        """Returns the items for the tensors that it uses, by name of the tensor."""
        return {name: item for name, item in items.items() if self.has(name)}

    def has(self, name: str) -> bool:
        """Whether it uses a tensor."""
        layer = layer_of(name)
        if layer is not None:
            return layer in self.layers
        return self.ends or (self.begins and name == EMBEDDING)


@dataclass(frozen=True)
class PackagePlan:
    """A package's name, and the segments of the model in it."""

    name: str
    segments: tuple[Segment, ...]

    def tensors(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        """Returns the items for the tensors that its segments use, by name of the tensor."""
        return {name: item for name, item in items.items() if self._has(name)}

    @property
    def functions(self) -> list[str]:
        """Names of its functions; the first is the default."""
        return list(self.uses({}))

    def _has(self, tensor: str) -> bool:
        return any(segment.has(tensor) for segment in self.segments)

    def uses(self, items: Mapping[str, _Item]) -> dict[str, dict[str, _Item]]:
        """Returns the items for the tensors that each function uses, by name of the function."""
        items_by_function = {}
        for segment in self.segments:
            for name in (DECODE, PREFILL):
                function = segment.function(name)
                items_by_function[function] = segment.tensors(items)
        return items_by_function


def whole(num_layers: int) -> Segment:
    """Returns the segment of a model that is not cut."""
    layers = range(num_layers)
    return Segment("", begins=True, layers=layers, ends=True)


def packages(num_layers: int, split: Sequence[int]) -> tuple[PackagePlan, ...]:
    """Returns the packages of a model; `split` has the number of layers of each, or nothing.

    The first of several packages has the ends of the model.
    """
    if not split:
        segment = whole(num_layers)
        return (PackagePlan(PACKAGE, (segment,)),)

    no_layers = range(0)
    embedding = Segment("embed_", begins=True, layers=no_layers, ends=False)
    head = Segment("head_", begins=False, layers=no_layers, ends=True)
    plans = [PackagePlan(ENDS, (embedding, head))]

    start = 0
    for count in split:
        layers = range(start, start + count)
        segment = Segment("", begins=False, layers=layers, ends=False)
        name = f"layers-{layers[0]}-{layers[-1]}.mlpackage"
        plans.append(PackagePlan(name, (segment,)))
        start += count
    return tuple(plans)


def in_order(plans: Sequence[PackagePlan]) -> Iterator[tuple[PackagePlan, Segment]]:
    """Yields the segments, and their packages, in the order in which a token passes them."""
    first_plan, *layer_plans = plans
    first_segment, *last_segments = first_plan.segments

    yield first_plan, first_segment
    for plan in layer_plans:
        for segment in plan.segments:
            yield plan, segment
    for segment in last_segments:
        yield first_plan, segment


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that a tensor or state is of; None for the model's ends."""
    if not name.startswith("layers."):
        return None
    _, index, *_ = name.split(".")
    return int(index)
