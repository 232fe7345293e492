"""Whether there is enough memory for a self-check."""

from math import prod

from rgexport.export.manifest import Manifest
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import layer_tensors
from rgexport.progress import amount
from rgexport.runtimes.engine import engine_of
from rgexport.runtimes.memory import available_bytes

_REST = 384 << 20
"""Temporaries, a few rows of logits, and libraries that are loaded for the check."""


def lack_of_room(manifest: Manifest) -> str | None:
    """A sentence if memory is short; None where there is enough or the system does not say."""
    needed, available = needed_bytes(manifest), available_bytes()
    if available is None or needed <= available:
        return None
    return f"it takes about {amount(needed)} of memory, and {amount(available)} are free"


def needed_bytes(manifest: Manifest) -> int:
    """What a self-check takes in addition: the references or the engine, whichever is more.

    Measured, without `_REST`: references 0.9 GB each at 2B; ONNX Runtime 1.9 GB for a 2B in int4.
    """
    engine = engine_of(manifest.kind).memory_bytes(manifest)
    return max(_references(manifest.config), engine) + _REST


def _references(config: GriffinConfig) -> int:
    """Two references, each with the weights of a layer, and of the next, in float32."""
    layers = (layer_tensors(config, index).values() for index in range(config.num_layers))
    return 4 * max((sum(4 * prod(spec.shape) for spec in layer) for layer in layers), default=0)
