"""Encodes the original's weights again, and compares what an artifact stores with that.

An algorithm that weighs errors by data may move any weight by more than half a step, so limits of
errors leave room for other weights. An encoder that runs again leaves none.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.griffin.tensor import WeightSource
from rgexport.progress import Advance
from rgexport.quantize.statistics import StatisticsOf
from rgexport.quantize.stored_weights import quantized
from rgexport.validate.checks import Check
from rgexport.validate.weights.tensor_errors import of_each_tensor, paired_slabs

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
    """Compares all quantized tensors of an artifact with the encoded original's."""
    manifest = artifact.manifest
    tensors = {name: t for name, t in manifest.tensors.items() if t.scheme.is_quantized}
    encoded = quantized({name: original[name] for name in tensors}, manifest.plan, statistics)

    def compare(name: str, advance: Advance) -> Reproduced:
        stored, different = tensors[name], 0
        pairs = paired_slabs(encoded[name], artifact.weights[name], stored, _SLAB_BYTES)
        for _, expected, rows in pairs:
            same = np.abs(rows - expected) <= _SAME * np.abs(expected)  # false for NaN
            different += int((~same).sum())
            advance(expected.nbytes)
        values = math.prod(stored.shape)
        return Reproduced(name=name, scheme=stored.scheme.label, values=values, different=different)

    return of_each_tensor("Encoding the weights again", tensors, compare)


def reproduced_checks(tensors: list[Reproduced]) -> Iterator[Check]:
    """Checks the tensor that differs most, and every tensor that differs."""
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
