"""Cuts a model into packages by size, assigns nodes to them, and writes them without weights."""

import hashlib
import json
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.artifacts.coreml.package import AUTHOR, PACKAGE, Segment, layer_of, model_file
from rgexport.errors import RequestError
from rgexport.export.program import Node, StepProgram, Value
from rgexport.units import amount

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import Model


def segment_nodes(segment: Segment, program: StepProgram) -> list[Node]:
    """Returns the nodes of a segment's layers and of the end of the model that it has."""
    layers = [layer_of(node.site) for node in program.nodes]
    inside = [index for index, layer in enumerate(layers) if layer is not None]
    nodes = []
    for index, (node, layer) in enumerate(zip(program.nodes, layers, strict=True)):
        is_start = segment.begins and index < inside[0]
        is_end = segment.ends and index > inside[-1]
        if layer in segment.layers or is_start or is_end:
            nodes.append(node)
    return nodes


def hidden_values(segment: Segment, program: StepProgram) -> tuple[Value | None, Value | None]:
    """Returns the values that come from the segment before and go to the one after it."""
    nodes = segment_nodes(segment, program)
    before = None if segment.begins else nodes[0].tensors[0]
    after = None if segment.ends else nodes[-1].outputs[0]
    return before, after


def write_package(folder: Path, model: "Model", name: str = PACKAGE) -> None:
    """Writes a package without its file of weights; the same model gives the same bytes."""
    data = model.SerializeToString(deterministic=True)
    path = folder / model_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    digest, entries = hashlib.sha256(data).hexdigest(), {}
    for item, kind in (("weights", "Weights"), ("model.mlmodel", "Specification")):
        identifier = str(uuid.uuid5(uuid.NAMESPACE_OID, digest + item))
        entry = {"author": AUTHOR, "name": item, "path": f"{AUTHOR}/{item}"}
        entries[identifier] = entry | {"description": f"CoreML Model {kind}"}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifier,  # the last one: the model's
    }
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (folder / name / "Manifest.json").write_text(text, "utf-8")


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


def _groups(sizes: Sequence[int], limit: int) -> list[int]:
    counts, total = [0], 0
    for size in sizes:
        if total + size > limit:
            counts.append(0)
            total = 0
        counts[-1] += 1
        total += size
    return counts
