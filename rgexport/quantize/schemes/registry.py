"""Storage schemes: floats, the registry of all, and the names that other packages import."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.typed_json import register_reader
from rgexport.quantize.algorithms.statistics import Statistics
from rgexport.quantize.schemes.affine import INT8_ROWS, Affine
from rgexport.quantize.schemes.base import FloatDtype, Parts, PartShapes, Scheme, Shape, Uniform
from rgexport.quantize.schemes.blocks import BLOCKS
from rgexport.quantize.schemes.ggml import Ggml
from rgexport.quantize.schemes.palette import Palette
from rgexport.quantize.schemes.row_groups import Mixed, RowGroup
from rgexport.quantize.schemes.steps import StepSizes, float_steps
from rgexport.quantize.schemes.two_level import TwoLevel

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_DIGITS = {"float32": (23, 2.0**-126), "float16": (10, 2.0**-24), "bfloat16": (23, 2.0**-126)}
"""dtype → binary digits after the point, smallest step.

bfloat16 stores what the checkpoint has in bfloat16: nothing may be rounded.
"""


@dataclass(frozen=True)
class Float(Uniform):
    dtype: Literal["float32", "float16", "bfloat16"]
    kind: Literal["float"] = "float"
    algorithm = "cast"
    is_quantized = False
    is_float_array = True
    has_onnx_op = True

    @property
    def label(self) -> str:
        return self.dtype

    @property
    def bits_per_weight(self) -> float:
        return 32.0 if self.dtype == "float32" else 16.0

    @property
    def precision(self) -> str:
        return _PRECISIONS[self.dtype]

    @property
    def storage_class(self) -> str:
        return self.dtype

    @property
    def ggml_type(self) -> str:
        """The GGUF type; only gates are bfloat16 in a plan, and those are f32 in a file."""
        return "f16" if self.dtype == "float16" else "f32"

    def part_shapes(self, shape: Shape) -> PartShapes:
        return {"data": (self.dtype, shape)}

    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        return arrays["data"].astype(np.float32, copy=False)

    def weight_steps(self, w: np.ndarray) -> StepSizes:
        return StepSizes(float_steps(w, *_DIGITS[self.dtype]))

    def _cast(self, rows: np.ndarray, _: Statistics | None) -> Parts:
        with np.errstate(over="ignore"):
            stored = rows.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise RequestError(
                f"a weight of {np.abs(rows).max():.4g} is more than {self.dtype} holds; "
                "store it in another precision"
            )
        assert self.dtype != "bfloat16" or (stored.astype(rows.dtype) == rows).all()
        return {"data": stored}

    encoders: ClassVar = {"cast": _cast}


BFLOAT16 = Float("bfloat16")
"""Lossless for the matrices of gates that a checkpoint has in bfloat16."""


__all__ = ["BFLOAT16", "BLOCKS", "FLOAT32", "INT8_ROWS", "SCHEMES", "Affine", "Float", "FloatDtype"]
__all__ += ["Ggml", "Mixed", "Palette", "PartShapes", "Parts", "Plan", "RowGroup", "Scheme"]
__all__ += ["TwoLevel", "Uniform", "candidates", "coarsest", "scheme_from_dict"]

Plan = dict[str, Scheme]
"""Canonical tensor name → scheme, for every tensor of the model."""

SCHEMES: dict[str, type[Scheme]] = {
    "float": Float,
    "affine": Affine,
    "two_level": TwoLevel,
    "palette": Palette,
    "ggml": Ggml,
    "mixed": Mixed,
}
"""Kind → scheme."""
FLOAT32 = Float("float32")
_BLOCKS_BY_BITS: Mapping[Literal[2, 3, 4, 5, 6], tuple[int, ...]] = dict(
    {2: (32, 16), 3: (64, 32, 16), 4: (64, 32, 16), 5: (64, 32), 6: (32,)}
)
_GGML_CANDIDATES = (
    *("q2_k", "q3_k", "q4_k", "q4_0", "q4_1", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0"),
    *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq4_xs"),
)


def scheme_from_dict(values: Any) -> Scheme:
    """Reads the result of `Scheme.to_dict`; RequestError for an unknown kind, field or value."""
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in SCHEMES:
        raise RequestError(
            f"a scheme has kind {reprlib.repr(kind)}; expected one of {', '.join(sorted(SCHEMES))}"
        )
    return SCHEMES[kind].from_dict(values)


register_reader(Scheme, scheme_from_dict)


def coarsest(schemes: Iterable[Scheme]) -> Uniform:
    """Returns the scheme of fewest bits, of tensors and row groups, but lossless `BFLOAT16`."""
    uniform = chain.from_iterable(scheme.uniform for scheme in schemes)
    return min(
        (scheme for scheme in uniform if scheme != BFLOAT16),
        key=lambda scheme: scheme.bits_per_weight,
    )


def candidates() -> list[Uniform]:
    """Returns the schemes that plans for a target choose from; formats refuse what they lack."""
    affine = partial(Affine, scale="float16", algorithm="gptq")
    return [
        *(affine(4, block, symmetric=True) for block in (128, 64, 32, 16)),
        affine(4, 32, symmetric=False),
        *(affine(8, block, symmetric=True) for block in (128, 32)),
        *(
            TwoLevel(bits, block, algorithm="gptq")
            for bits, blocks in _BLOCKS_BY_BITS.items()
            for block in blocks
        ),
        Palette(algorithm="gptq"),
        *(Ggml(kind).with_algorithm("gptq") for kind in _GGML_CANDIDATES),
    ]
