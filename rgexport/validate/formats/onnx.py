"""What is expected of ONNX artifacts."""

from rgexport.export.manifest import Manifest
from rgexport.validate.formats.expected import Expected
from rgexport.validate.structure.onnx import OnnxStructure


class OnnxExpected(Expected):
    """Products with quantized weights round activations to int8, except with `--exact`.

    Some do so in two digits, but only native kernels: limits are those of one, which bodies have.
    """

    has_exact = True
    structure = OnnxStructure()

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        """See `Expected`."""
        blocks = manifest.plan[tensor].is_quantized
        rounded = blocks and not manifest.exact
        return "int8" if rounded else "float32"


FORMAT = OnnxExpected()
