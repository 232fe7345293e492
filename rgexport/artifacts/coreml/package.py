"""Cuts a model into packages: one, or its ends, which have one table, and groups of layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from rgexport.griffin.layout import EMBEDDING

PACKAGE = "model.mlpackage"
AUTHOR = "com.apple.CoreML"


def model_file(package: str = PACKAGE) -> str:
    return f"{package}/Data/{AUTHOR}/model.mlmodel"


def weight_file(package: str = PACKAGE) -> str:
    return f"{package}/Data/{AUTHOR}/weights/weight.bin"


DECODE, PREFILL = "decode", "prefill"
"""The functions of a segment: of one token, and of a fixed number of them."""
ENDS = "ends.mlpackage"
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Segment:
    prefix: str  # before the names of its functions
    begins: bool  # whether it takes token ids, and has the embedding
    layers: range
    ends: bool  # whether it gives logits

    def function(self, name: str) -> str:
        return self.prefix + name

    def of_layers(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        return {name: item for name, item in items.items() if layer_of(name) in self.layers}

    def tensors(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        return {name: item for name, item in items.items() if self.has(name)}

    def has(self, name: str) -> bool:
        layer = layer_of(name)
        if layer is not None:
            return layer in self.layers
        return self.ends or (self.begins and name == EMBEDDING)


@dataclass(frozen=True)
class PackagePlan:
    name: str
    segments: tuple[Segment, ...]

    def tensors(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        names = (name for name in items if any(segment.has(name) for segment in self.segments))
        return {name: items[name] for name in names}

    @property
    def functions(self) -> list[str]:
        """Names of its functions; the first is the default."""
        return list(self.uses({}))

    def uses(self, items: Mapping[str, _Item]) -> dict[str, dict[str, _Item]]:
        """Returns the items, named like tensors, of each function."""
        return {
            segment.function(name): segment.tensors(items)
            for segment in self.segments
            for name in (DECODE, PREFILL)
        }


def whole(num_layers: int) -> Segment:
    return Segment("", True, range(num_layers), True)


def packages(num_layers: int, split: Sequence[int]) -> tuple[PackagePlan, ...]:
    if not split:
        return (PackagePlan(PACKAGE, (whole(num_layers),)),)
    nothing = range(0)
    ends = (Segment("embed_", True, nothing, False), Segment("head_", False, nothing, True))
    plans = [PackagePlan(ENDS, ends)]
    for count, stop in zip(split, accumulate(split), strict=True):
        layers = range(stop - count, stop)
        name = f"layers-{layers[0]}-{layers[-1]}.mlpackage"
        plans.append(PackagePlan(name, (Segment("", False, layers, False),)))
    return tuple(plans)


def in_order(plans: Sequence[PackagePlan]) -> Iterator[tuple[PackagePlan, Segment]]:
    ends, *groups = plans
    begin, *end = ends.segments
    yield ends, begin
    yield from ((plan, segment) for plan in groups for segment in plan.segments)
    yield from ((ends, segment) for segment in end)


def layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None
