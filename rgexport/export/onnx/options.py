"""What a user can ask of an ONNX export."""

from dataclasses import dataclass

from rgexport.errors import RequestError
from rgexport.export.manifest import ACTIVATIONS
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.plan import choose_scheme, make_plan, precision_of
from rgexport.quantize.scheme import BLOCKS, Affine, Float, Ggml, Plan, Scheme

DEFAULT_PRECISION, DEFAULT_BLOCK = "fp32", 128

_BESIDE_A_PLAN = ("precision", "block_size", "symmetric", "embedding_precision")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How weights are stored and activations computed; None leaves the choice to us.

    `compute` is fp32 unless `precision` is fp16; `exact` keeps activations out of int8;
    `plan` says for every tensor what `precision`, `block_size`, `symmetric` and
    `embedding_precision` say for all.
    """

    precision: str | None = None
    compute: str | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    embedding_precision: str | None = None
    exact: bool = False
    plan: Plan | None = None

    def __post_init__(self) -> None:
        """Refuses contradictions.

        Raises:
            RequestError: a plan beside an option that it replaces, a plan for another
                format, or an unknown compute word.
        """
        given = [name for name in _BESIDE_A_PLAN if getattr(self, name) is not None]
        if self.plan is not None and given:
            words = ", ".join(name.replace("_", " ") for name in given)
            raise RequestError(f"--plan says how each tensor is stored; leave out the {words}")
        for name, scheme in (self.plan or {}).items():
            _require_known(name, scheme)
        if self.compute is not None and self.compute not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise RequestError(f"--compute is {self.compute!r}; expected one of {expected}")

    @property
    def precision_word(self) -> str:
        """`precision`, or what a plan amounts to, or the default."""
        return precision_of(self.plan) if self.plan else self.precision or DEFAULT_PRECISION

    @property
    def compute_word(self) -> str:
        """`compute`, or what it is when it is not given."""
        return self.compute or ("fp16" if self.precision_word == "fp16" else "fp32")

    def resolve_plan(self, config: GriffinConfig) -> Plan:
        """The plan for a model.

        Raises:
            RequestError: an unknown word or block size.
        """
        if self.plan:
            return self.plan
        block = DEFAULT_BLOCK if self.block_size is None else self.block_size
        words = (self.precision_word, self.embedding_precision or self.precision_word)
        linear, embedding = (choose_scheme(word, block, self.symmetric) for word in words)
        return make_plan(config, linear, embedding)


def _require_known(name: str, scheme: Scheme) -> None:
    if isinstance(scheme, Ggml):
        raise RequestError(f"the plan stores {name} as {scheme.label}, which only GGUF files have")
    known = isinstance(scheme, Float) or (
        isinstance(scheme, Affine) and scheme.block in BLOCKS and scheme.scale == "float32"
    )
    if not known:
        raise RequestError(
            f"the plan stores {name} as {scheme.label}, which ONNX does not have; expected blocks "
            f"of {', '.join(map(str, BLOCKS))} weights with float32 scales"
        )
