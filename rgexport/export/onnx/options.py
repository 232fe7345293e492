"""What a user can ask of an ONNX export."""

from dataclasses import dataclass, replace
from typing import TypeGuard

from rgexport.errors import RequestError
from rgexport.export.manifest import ACTIVATIONS
from rgexport.export.onnx.profiles import PROFILES, LoweringProfile
from rgexport.export.request import require_blocks, symmetry
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.affine import num_blocks
from rgexport.quantize.plan import choose_scheme, make_plan, precision_of
from rgexport.quantize.scheme import BLOCKS, Affine, Float, Ggml, Plan, Scheme

DEFAULT_BLOCK = 128

_SET_BY_A_PLAN = ("precision", "block_size", "symmetric", "embedding_precision")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How weights are stored and activations computed; None leaves the choice to us.

    `profile` is what the graph is lowered for (see `profiles`, which has a `precision` for each);
    `compute` is fp32 unless `precision` is fp16; `exact` keeps activations out of int8;
    `plan` says for every tensor what `precision`, `block_size`, `symmetric` and
    `embedding_precision` say for all.
    """

    profile: str = "cpu"
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
                format, an unknown compute word or profile, or an option that changes nothing.
        """
        if self.profile not in PROFILES:
            expected = ", ".join(PROFILES)
            raise RequestError(f"--profile is {self.profile!r}; expected one of {expected}")
        given = [name for name in _SET_BY_A_PLAN if getattr(self, name) is not None]
        if self.plan is not None and given:
            words = ", ".join(name.replace("_", " ") for name in given)
            raise RequestError(f"--plan says how each tensor is stored; leave out the {words}")
        for name, scheme in (self.plan or {}).items():
            self._require_known(name, scheme)
        if self.compute is not None and self.compute not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise RequestError(f"--compute is {self.compute!r}; expected one of {expected}")
        require_blocks(
            (self.precision_word, self.embedding_precision or self.precision_word),
            {"--block-size": self.block_size, "--exact": self.exact} | symmetry(self.symmetric),
        )

    @property
    def precision_word(self) -> str:
        """`precision`, or what a plan amounts to, or the default."""
        return precision_of(self.plan) if self.plan else self.precision or self._profile.precision

    @property
    def compute_word(self) -> str:
        """`compute`, or what it is when it is not given."""
        return self.compute or ("fp16" if self.precision_word == "fp16" else "fp32")

    def resolve_plan(self, config: GriffinConfig) -> Plan:
        """The plan for a model.

        Raises:
            RequestError: an unknown word or block size.
        """
        plan = self.plan
        if not plan:
            linear = self._scheme(self.precision_word)
            embedding = self._scheme(self.embedding_precision or self.precision_word)
            plan = make_plan(config, linear, embedding)
        return self._with_even_zero_points(plan, config.width)

    def _with_even_zero_points(self, plan: Plan, width: int) -> Plan:
        """The plan with a symmetric embedding, if its zero points are not for this profile.

        Raises:
            RequestError: it was asked for.
        """
        scheme = plan[EMBEDDING]
        if not self._profile.even_zero_points or not _has_odd_zero_points(scheme, width):
            return plan
        if self.plan or self.symmetric is False:
            raise RequestError(
                f"--profile {self.profile} has no {scheme.label} for {EMBEDDING}, whose rows of "
                f"{width} are an odd number of blocks; store it as symmetric int4, or as int8"
            )
        return plan | {EMBEDDING: replace(scheme, symmetric=True)}

    @property
    def _profile(self) -> LoweringProfile:
        return PROFILES[self.profile]

    def _scheme(self, precision: str) -> Scheme:
        """What a precision word means here: blocks, unless the profile has rows and they will do.

        Rows take activations in int8, and are symmetric. Who asks for something else gets blocks.
        """
        block = DEFAULT_BLOCK if self.block_size is None else self.block_size
        scheme = choose_scheme(precision, block, self.symmetric)
        by_blocks = self.exact or self.block_size is not None or self.symmetric is False
        return scheme if by_blocks else self._profile.rows.get(precision, scheme)

    def _require_known(self, name: str, scheme: Scheme) -> None:
        """Refuses what a plan asks for and neither ONNX nor the profile has."""
        if isinstance(scheme, Ggml):
            raise RequestError(
                f"the plan stores {name} as {scheme.label}, which only GGUF files have"
            )
        if scheme in self._profile.rows.values():
            if self.exact:
                raise RequestError(
                    f"the plan stores {name} as {scheme.label}, which rounds activations to int8; "
                    "leave out --exact, or take blocks"
                )
            return
        _require_onnx(name, scheme)


def _has_odd_zero_points(scheme: Scheme, columns: int) -> TypeGuard[Affine]:
    if not isinstance(scheme, Affine) or scheme.bits != 4 or scheme.symmetric:
        return False
    return num_blocks(columns, scheme) % 2 == 1


def _require_onnx(name: str, scheme: Scheme) -> None:
    known = isinstance(scheme, Float) or (
        isinstance(scheme, Affine) and scheme.block in BLOCKS and scheme.scale == "float32"
    )
    if not known:
        raise RequestError(
            f"the plan stores {name} as {scheme.label}, which ONNX does not have; expected blocks "
            f"of {', '.join(map(str, BLOCKS))} weights with float32 scales"
        )
