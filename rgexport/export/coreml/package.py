"""Cuts a model into packages: one, or its ends, which have one table, and groups of layers."""

import hashlib
import json
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rgexport.errors import RequestError
from rgexport.export.program import Node, StepProgram, Value
from rgexport.griffin.layout import EMBEDDING
from rgexport.units import amount

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import Model

PACKAGE = "model.mlpackage"
_AUTHOR = "com.apple.CoreML"


def model_file(package: str = PACKAGE) -> str:
    return f"{package}/Data/{_AUTHOR}/model.mlmodel"


def weight_file(package: str = PACKAGE) -> str:
    return f"{package}/Data/{_AUTHOR}/weights/weight.bin"


def write_package(folder: Path, model: "Model", name: str = PACKAGE) -> None:
    """Writes a package without its file of weights; the same model gives the same bytes."""
    data = model.SerializeToString(deterministic=True)
    path = folder / model_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    digest, entries = hashlib.sha256(data).hexdigest(), {}
    for item, kind in (("weights", "Weights"), ("model.mlmodel", "Specification")):
        identifier = str(uuid.uuid5(uuid.NAMESPACE_OID, digest + item))
        entry = {"author": _AUTHOR, "name": item, "path": f"{_AUTHOR}/{item}"}
        entries[identifier] = entry | {"description": f"CoreML Model {kind}"}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifier,  # the last one: the model's
    }
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (folder / name / "Manifest.json").write_text(text, "utf-8")


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

    def nodes(self, program: StepProgram) -> list[Node]:
        layers = [layer_of(node.site) for node in program.nodes]
        inside = [i for i, layer in enumerate(layers) if layer is not None]
        return [
            node
            for i, (node, layer) in enumerate(zip(program.nodes, layers, strict=True))
            if layer in self.layers
            or (self.begins and i < inside[0])
            or (self.ends and i > inside[-1])
        ]

    def hidden(self, program: StepProgram) -> tuple[Value | None, Value | None]:
        """Returns the values that come from the segment before and go to the one after it."""
        nodes = self.nodes(program)
        before = None if self.begins else nodes[0].tensors[0]
        after = None if self.ends else nodes[-1].outputs[0]
        return before, after


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


def split_by_size(num_layers: int, sizes: Mapping[str, int], limit: int) -> tuple[int, ...]:
    """Returns the layers of each of as few packages as fit into `limit` bytes; () for one."""
    if sum(sizes.values()) <= limit:
        return ()
    totals: Counter[int | None] = Counter()
    for name, size in sizes.items():
        totals[layer_of(name)] += size
    layers = [totals[layer] for layer in range(num_layers)]
    for item, size in (("the embedding", totals[None]), ("a layer", max(layers))):
        if size > limit:
            raise RequestError(
                f"--split is {amount(limit)}, but {item} takes {amount(size)}; give more, or store "
                "it in fewer bits"
            )
    fewest = len(_groups(layers, limit))
    smallest = bisect_left(
        range(limit + 1), -fewest, max(layers), key=lambda most: -len(_groups(layers, most))
    )
    return tuple(_groups(layers, smallest))


def layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _groups(sizes: Sequence[int], limit: int) -> list[int]:
    counts, total = [0], 0
    for size in sizes:
        if total + size > limit:
            counts.append(0)
            total = 0
        counts[-1] += 1
        total += size
    return counts
