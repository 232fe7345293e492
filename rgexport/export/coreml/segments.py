"""How a model is cut into packages: not at all, or into its ends and groups of layers.

The ends are the embedding and the output head. They are functions of one package, since they have
one table. A cut is a hidden state: an output of one package and an input of the next.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from rgexport.errors import RequestError
from rgexport.export.coreml.package import PACKAGE
from rgexport.export.program import Node, StepProgram, Value
from rgexport.griffin.layout import EMBEDDING
from rgexport.units import amount

DECODE, PREFILL = "decode", "prefill"
"""The functions of a segment: of one token, and of a fixed number of them."""
ENDS = "ends.mlpackage"
_LAYER = "layers."
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Segment:
    """A part of the model that is run at once.

    prefix: before the names of its functions; begins: whether it takes token ids, and has the
    embedding; ends: whether it gives logits.
    """

    prefix: str
    begins: bool
    layers: range
    ends: bool

    def function(self, name: str) -> str:
        """The name in the package of `decode` or `prefill`."""
        return self.prefix + name

    def of_layers(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        """What belongs to its layers, by canonical names."""
        return {name: item for name, item in items.items() if layer_of(name) in self.layers}

    def tensors(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        """The weights that it has."""
        return {name: item for name, item in items.items() if self.has(name)}

    def has(self, name: str) -> bool:
        """Whether it has a weight."""
        layer = layer_of(name)
        if layer is not None:
            return layer in self.layers
        return self.ends or (self.begins and name == EMBEDDING)

    def nodes(self, program: StepProgram) -> tuple[list[Node], list[Node]]:
        """Its nodes, and all others. A program has a beginning, the layers, and an end."""
        layers = [layer_of(node.site) for node in program.nodes]
        inside = [i for i, layer in enumerate(layers) if layer is not None]
        own: list[Node] = []
        others: list[Node] = []
        for i, (node, layer) in enumerate(zip(program.nodes, layers, strict=True)):
            end = (self.begins and i < inside[0]) or (self.ends and i > inside[-1])
            (own if end or layer in self.layers else others).append(node)
        return own, others

    def hidden(self, program: StepProgram) -> tuple[Value | None, Value | None]:
        """The values that come from the segment before and go to the one after it."""
        own, others = self.nodes(program)
        made, taken = _values(own)
        made_elsewhere, taken_elsewhere = _values(others)
        before, after = _only(taken & made_elsewhere), _only(made & taken_elsewhere)
        assert (before is None, after is None) == (self.begins, self.ends)
        return before, after


@dataclass(frozen=True)
class PackagePlan:
    """One package, by the name of its folder, and its segments."""

    name: str
    segments: tuple[Segment, ...]

    def tensors(self, items: Mapping[str, _Item]) -> dict[str, _Item]:
        """The weights that are in its file."""
        return {
            name: item
            for name, item in items.items()
            if any(segment.has(name) for segment in self.segments)
        }

    @property
    def functions(self) -> list[str]:
        """The names of its functions; the first is the default."""
        return [s.function(name) for s in self.segments for name in (DECODE, PREFILL)]

    def uses(self, items: Mapping[str, _Item]) -> dict[str, dict[str, _Item]]:
        """Function → the weights that it uses."""
        return {
            segment.function(name): segment.tensors(items)
            for segment in self.segments
            for name in (DECODE, PREFILL)
        }


def whole(num_layers: int) -> Segment:
    """All of a model."""
    return Segment("", True, range(num_layers), True)


def packages(num_layers: int, split: Sequence[int]) -> tuple[PackagePlan, ...]:
    """The packages of a model: one, or with `split` the ends and groups of so many layers."""
    if not split:
        return (PackagePlan(PACKAGE, (whole(num_layers),)),)
    nothing = range(0)
    ends = (Segment("embed_", True, nothing, False), Segment("head_", False, nothing, True))
    stops = list(accumulate(split))
    groups = [range(stop - count, stop) for stop, count in zip(stops, split, strict=True)]
    return PackagePlan(ENDS, ends), *(
        PackagePlan(
            f"layers-{layers[0]}-{layers[-1]}.mlpackage", (Segment("", False, layers, False),)
        )
        for layers in groups
    )


def in_order(plans: Sequence[PackagePlan]) -> Iterator[tuple[PackagePlan, Segment]]:
    """The segments as they are run."""
    if len(plans) == 1:
        yield from ((plans[0], segment) for segment in plans[0].segments)
        return
    (ends, *groups) = plans
    embed, head = ends.segments
    yield ends, embed
    yield from ((plan, segment) for plan in groups for segment in plan.segments)
    yield ends, head


def split_by_size(num_layers: int, sizes: Mapping[str, int], limit: int) -> tuple[int, ...]:
    """How many layers each package gets, for files of at most `limit` bytes; () if one is enough.

    There are as few packages as possible, and the largest of them is as small as possible.

    Args:
        num_layers: of the model.
        sizes: bytes of each weight.
        limit: bytes.

    Raises:
        RequestError: the ends, or a layer, take more.
    """
    if sum(sizes.values()) <= limit:
        return ()
    layers = [0] * num_layers
    ends = 0
    for name, size in sizes.items():
        layer = layer_of(name)
        if layer is None:
            ends += size
        else:
            layers[layer] += size
    for what, size in (("the embedding", ends), ("a layer", max(layers))):
        if size > limit:
            raise RequestError(
                f"--split is {amount(limit)}, but {what} takes {amount(size)}; give more, or store "
                "it in fewer bits"
            )
    fewest = len(_groups(layers, limit))
    low, high = max(layers), limit
    while low < high:
        middle = (low + high) // 2
        if len(_groups(layers, middle)) > fewest:
            low = middle + 1
        else:
            high = middle
    return tuple(_groups(layers, low))


def layer_of(name: str) -> int | None:
    """The layer that a site, a weight or a state belongs to."""
    return int(name.split(".")[1]) if name.startswith(_LAYER) else None


def _groups(sizes: Sequence[int], limit: int) -> list[int]:
    """How many layers fit into each package, from the first layer on."""
    counts, taken = [0], 0
    for size in sizes:
        if taken + size > limit:
            counts.append(0)
            taken = 0
        counts[-1] += 1
        taken += size
    return counts


def _values(nodes: Sequence[Node]) -> tuple[set[Value], set[Value]]:
    """The values that some nodes make, and those that they take."""
    made = {value for node in nodes for value in node.outputs}
    return made, {value for node in nodes for value in node.tensors}


def _only(values: set[Value]) -> Value | None:
    assert len(values) <= 1, "a cut has one value"
    return next(iter(values), None)
