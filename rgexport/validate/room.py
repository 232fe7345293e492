"""Whether there is enough memory for a self-check."""

import sys
from math import prod

from rgexport.export.manifest import Manifest
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, layer_tensors
from rgexport.progress import amount
from rgexport.quantize.scheme import Float
from rgexport.runtimes.memory import available_bytes
from rgexport.runtimes.mil.weights import CACHE_BYTES

_REST = 384 << 20
"""Scratch memory, a few rows of logits, and libraries that are loaded for the check."""


def lack_of_room(manifest: Manifest) -> str | None:
    """What to say where memory is short; None where there is enough or nobody can tell."""
    needed, available = needed_bytes(manifest), available_bytes()
    if available is None or needed <= available:
        return None
    return f"it takes about {amount(needed)} of memory, and {amount(available)} are free"


def needed_bytes(manifest: Manifest) -> int:
    """What a self-check takes beside what the process has: of the references or of the engine.

    Measured, without `_REST`: references 0.9 GB each at 2B; ONNX Runtime 1.9 GB for a 2B in int4,
    and 0.98 to 1.03 times the estimate for 150 million weights in fp32, fp16, int8 and int4;
    llama.cpp 0.85 to 1.1 times.
    """
    engine = _interpreter if _interpreted(manifest) else _engine
    return max(_references(manifest.config), engine(manifest)) + _REST


def _references(config: GriffinConfig) -> int:
    """Two of them, each with the weights of a layer, and of the next, in float32."""
    layers = (layer_tensors(config, index).values() for index in range(config.num_layers))
    return 4 * max((sum(4 * prod(spec.shape) for spec in layer) for layer in layers), default=0)


def _engine(manifest: Manifest) -> int:
    """The weights as the engine holds them; the embedding once more, as the head."""
    names = [*manifest.tensors, EMBEDDING]
    return sum(_held(manifest, name) for name in names)


def _held(manifest: Manifest, name: str) -> int:
    """ONNX Runtime has no products in float16 on a CPU: it makes such weights float32."""
    stored = manifest.tensors[name]
    half = isinstance(stored.scheme, Float) and stored.scheme.dtype == "float16"
    widened = 2 if half and manifest.kind == "onnx" else 1
    return widened * sum(part.nbytes for part in stored.parts.values())


def _interpreted(manifest: Manifest) -> bool:
    return manifest.kind == "coreml" and sys.platform != "darwin"


def _interpreter(manifest: Manifest) -> int:
    """It reads weights as it goes."""
    return CACHE_BYTES
