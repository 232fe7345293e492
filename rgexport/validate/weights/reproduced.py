"""Encodes the original's weights again, and compares what an artifact stores with that.

An algorithm that weighs errors by data may move any weight by more than half a step, so limits of
errors leave room for other weights. An encoder that runs again leaves none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.griffin.tensor import WeightSource
from rgexport.progress import Advance
from rgexport.quantize.statistics import StatisticsOf
from rgexport.quantize.stored_weights import quantized
from rgexport.validate.checks import Check
from rgexport.validate.weights.weight_errors import of_each_tensor, paired_slabs

_SAME = 2.0**-9
"""Levels of 8 bits differ by 2⁻⁸ at least; Core ML rounds their products with scales to float16."""
_SLAB_BYTES = 4 << 20
"""Float32 bytes of a slab: statistics are read once for many rows."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """How many of a tensor's `values` are stored as other values than the encoder gives."""

    name: str
    scheme: str
    values: int
    different: int


def reproduce(
    artifact: Artifact, original: WeightSource, statistics: StatisticsOf
) -> list[Reproduced]:
    """Compares all quantized tensors of an artifact, two at a time, in slabs.

    Args:
        artifact: whose manifest says what chose the levels.
        original: the weights that it should have been made from.
        statistics: of the inputs, for the algorithms that need them.

    Raises:
        RequestError: an algorithm needs statistics that are missing.
    """
    tensors = {
        name: stored
        for name, stored in artifact.manifest.tensors.items()
        if stored.scheme.is_quantized
    }
    plan = artifact.manifest.plan
    encoded = quantized({name: original[name] for name in tensors}, plan, statistics)

    def compare(name: str, advance: Advance) -> Reproduced:
        stored = tensors[name]
        different = 0
        pairs = paired_slabs(encoded[name], artifact.weights[name], stored, _SLAB_BYTES)
        for _, expected, rows in pairs:
            different += int((np.abs(rows - expected) > _SAME * np.abs(expected)).sum())
            advance(expected.nbytes)
        count = int(np.prod(stored.shape))
        return Reproduced(name=name, scheme=stored.scheme.label, values=count, different=different)

    return of_each_tensor("Encoding the weights again", tensors, compare)


def reproduced_checks(tensors: list[Reproduced]) -> Iterator[Check]:
    """Of the tensor that differs most, and of all others that differ."""
    worst = sorted(tensors, key=lambda tensor: -tensor.different)
    for index, tensor in enumerate(worst):
        if index == 0 or tensor.different:
            yield Check(
                name=f"reproduced.{tensor.name}",
                kind="reproduced",
                value=float(tensor.different),
                limit=0,
                reason=f"{tensor.scheme}: weights that the encoder stores as other values",
            )
