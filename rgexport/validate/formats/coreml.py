"""What is expected of Core ML packages."""

from math import prod

from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.manifest import Manifest
from rgexport.validate.formats.expected import TOKENS, Expected, Schedule
from rgexport.validate.structure.coreml import CoreMLStructure
from rgexport.validate.thresholds import Tolerance

SMALL_MODEL = 100_000_000
"""Parameters up to which the interpreter needs less than half a second a token."""
LARGE_STEPS = 2
"""Single tokens that a larger model takes after a chunk: 12 s a token at 2B."""

_FLOAT16 = Tolerance(
    logits=6e-2,
    rms=3e-2,
    states=6e-2,
    reason="activations are rounded to 11 bits between the operations, scores of attention too",
)
"""For packages that compute in float16.

In addition to what `DEQUANTIZED` says of float16, a score s moves by up to s · 2⁻¹¹, and a weight
of the softmax by as much of itself. With scores of 30, as in random models with large logits, that
is 1.5 % of the weight. Measured on random models of odd shapes, of the largest logit: 0.1 % to
1.9 %.
"""


class CoreMLExpected(Expected):
    """Two functions of fixed lengths; activations are never int8."""

    structure = CoreMLStructure()

    def tolerance(self, manifest: Manifest) -> Tolerance:
        """See `Expected`."""
        return _FLOAT16 if manifest.compute == "fp16" else super().tolerance(manifest)

    def attends_in_half(self, manifest: Manifest) -> bool:
        """See `Expected`."""
        return manifest.compute == "fp16"

    def schedule(self, manifest: Manifest) -> Schedule:
        """A whole chunk, which may give only the logits of its last token, and then steps."""
        assert isinstance(manifest, CoreMLManifest)
        length = manifest.coreml.prefill_length
        parameters = sum(prod(stored.shape) for stored in manifest.tensors.values())
        rows = min(length, TOKENS) if manifest.coreml.all_logits else 1
        return Schedule(length, rows, TOKENS - 1 if parameters <= SMALL_MODEL else LARGE_STEPS)


FORMAT = CoreMLExpected()
