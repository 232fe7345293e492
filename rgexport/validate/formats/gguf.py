"""What is expected of GGUF files in llama.cpp."""

from collections.abc import Iterator

from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.artifact import Artifact
from rgexport.export.gguf.artifact import GgufArtifact
from rgexport.export.manifest import Manifest
from rgexport.validate.formats.expected import Expected
from rgexport.validate.identity.gguf_keys import gguf_items, gguf_keys
from rgexport.validate.identity.items import IdentityItem
from rgexport.validate.identity.text import Items
from rgexport.validate.structure.gguf import GgufStructure
from rgexport.validate.thresholds import FLOAT16, FLOAT32, INT8, Tolerance

_BFLOAT16 = Tolerance(
    logits=0.16,
    rms=5e-2,
    states=0.16,
    reason="activations are rounded to 8 bits at every linear",
)
_TOLERANCES: dict[str, Tolerance] = {"f32": FLOAT32, "f16": FLOAT16, "bf16": _BFLOAT16}
"""Type of a GGUF file's tensor → tolerance, INT8 for all others; the largest of a file counts.

llama.cpp converts activations to what a type is multiplied with: float16 and bfloat16 to
themselves, every quantized type to int8 (q8_0: blocks of 32; q8_k: blocks of 256). All else is
float32, except keys and values: they are float16 where any weight is not float32, and their
rounding is negligible beside that of the activations.

bfloat16: half a unit is 2⁻⁹, eight times that of float16 tensors' activations, at four linears a
layer: √(4 · 38) · 2⁻⁹ / √3 = 1.4 % for the deepest model. Blocks of 32 in int8 have max |x| =
2.2 rms, an error of 0.5 %; those of 256 have 3 rms, 0.7 %, as ONNX Runtime's blocks of 128.

Measured on the demo and on small random models of odd shapes, of the largest logit: float32
2e-5, float16 0.3 %, bfloat16 2.2 %, q8_0 to q2_k 1 % to 6.4 %.
"""

_INPUTS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Type of a tensor → what its inputs are rounded to before the product; int8 for all others."""

HALF_SUMS = 2.0**-10
"""Times √window: the relative error of attention because llama.cpp adds up values in float16.

Each addition is off by 2⁻¹² / √3 of the sum so far, and where values cancel one another, partial
sums are larger than the result. That makes 2.3e-3 and some for 256 keys, where 4e-3 was measured,
and 6.5e-3 for 2048, where it was 2e-2.
"""


class GgufExpected(Expected):
    """llama.cpp converts the inputs of a product to what the weight's type is multiplied with."""

    structure = GgufStructure()

    def tolerance(self, manifest: Manifest) -> Tolerance:
        """The largest of all types in the file."""
        kinds = {scheme.label for scheme in manifest.plan.values()}
        return max((_TOLERANCES.get(kind, INT8) for kind in kinds), key=lambda found: found.logits)

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        """See `Expected`."""
        return _INPUTS.get(manifest.plan[tensor].label, "int8")

    def attends_in_half(self, manifest: Manifest) -> bool:
        """Keys and values are float16 where any weight is not float32."""
        return any(scheme.label != "f32" for scheme in manifest.plan.values())

    def text_items(self, artifact: Artifact, tokenizer: Tokenizer | None) -> Items:
        """See `Expected`: by the file's metadata."""
        assert isinstance(artifact, GgufArtifact)
        return gguf_items(artifact, tokenizer)

    def written_items(self, artifact: Artifact) -> Iterator[IdentityItem]:
        """See `Expected`: the keys that llama.cpp reads."""
        assert isinstance(artifact, GgufArtifact)
        return gguf_keys(artifact)

    def half_sums(self, manifest: Manifest) -> float:
        """See `Expected`."""
        return float(HALF_SUMS * manifest.config.window**0.5)


FORMAT = GgufExpected()
