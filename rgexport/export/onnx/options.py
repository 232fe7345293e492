"""What a user can ask of an ONNX export."""

from dataclasses import dataclass
from typing import Literal

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.plan import choose_scheme, make_plan
from rgexport.quantize.scheme import Plan

Compute = Literal["fp32", "fp16"]

ACTIVATIONS: dict[str, str] = {"fp32": "float32", "fp16": "float16"}
"""Compute word → activation dtype."""

DEFAULT_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How weights are stored and activations computed.

    `compute` is fp32 unless `precision` is fp16; `exact` keeps activations out of int8;
    `plan` replaces what `precision`, `block_size`, `symmetric` and `embedding_precision` say.
    """

    precision: str
    compute: str | None = None
    block_size: int = DEFAULT_BLOCK
    symmetric: bool | None = None
    embedding_precision: str | None = None
    exact: bool = False
    plan: Plan | None = None

    @property
    def compute_word(self) -> str:
        """`compute`, or what it is when it is not given.

        Raises:
            RequestError: an unknown word.
        """
        word = self.compute or ("fp16" if self.precision == "fp16" else "fp32")
        if word not in ACTIVATIONS:
            raise RequestError(f"--compute is {word!r}; expected one of {', '.join(ACTIVATIONS)}")
        return word

    def resolve_plan(self, config: GriffinConfig) -> Plan:
        """The plan for a model.

        Raises:
            RequestError: an unknown word or block size.
        """
        words = (self.precision, self.embedding_precision or self.precision)
        linear, embedding = (choose_scheme(word, self.block_size, self.symmetric) for word in words)
        return self.plan or make_plan(config, linear, embedding)
