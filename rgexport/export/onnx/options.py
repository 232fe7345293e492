"""What a user can ask of an ONNX export."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeGuard

from rgexport.errors import RequestError
from rgexport.export.manifest import ACTIVATIONS
from rgexport.export.onnx.artifact import is_storable
from rgexport.export.onnx.profiles import PROFILES, LoweringProfile
from rgexport.export.request import (
    refuse_beside_plan,
    refuse_ggml,
    refuse_idle,
    require_blocks,
    require_levels,
    require_word,
)
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize.plan import (
    choose_scheme,
    choose_schemes,
    has_blocks,
    make_plan,
    precision_of,
    with_algorithm,
    with_bfloat16,
)
from rgexport.quantize.scheme import BFLOAT16, BLOCKS, Affine, Plan, Scheme

_SET_BY_A_PLAN = ("precision", "block_size", "symmetric", "embedding_precision")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How weights are stored and activations computed; None stands for a default.

    `profile` is what the graph is lowered for (see `profiles`, which has a default `precision` for
    each). Block size and symmetry are those of the linears, and of an embedding of the same
    precision (see `quantize.plan.choose_schemes`). `compute` is fp32 unless `precision` is fp16;
    `exact` keeps activations out of int8; `plan` says for each tensor what `precision`,
    `block_size`, `symmetric` and `embedding_precision` say for all. `algorithm` chooses the levels
    (`quantize.algorithms`); None leaves it to the plan, or to clip search. `genai_native` copies
    our kernels for onnxruntime-genai.
    """

    profile: str = "cpu"
    precision: str | None = None
    compute: str | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    embedding_precision: str | None = None
    exact: bool = False
    plan: Plan | None = None
    algorithm: str | None = None
    genai_native: bool = False

    def __post_init__(self) -> None:
        """Refuses contradictions.

        Raises:
            RequestError: a plan beside an option that it replaces, a plan for another
                format, an unknown compute word or profile, or an option that changes nothing.
        """
        require_word("--profile", self.profile, PROFILES)
        refuse_beside_plan(self, _SET_BY_A_PLAN)
        refuse_ggml(self.plan)
        for name, scheme in (self.plan or {}).items():
            self._require_known(name, scheme)
        require_word("--compute", self.compute_word, ACTIVATIONS)
        words = self.precision_word, self._embedding_word
        require_blocks(words, self.block_size, self.symmetric, self.exact)
        require_levels(words, self.algorithm)
        if self.genai_native and not self._profile.functions:
            where = f"--profile {self.profile}, whose graph has no op for native kernels"
            refuse_idle({"--genai-native": True}, where)

    @property
    def precision_word(self) -> str:
        """`precision`, or the word for the plan, or the profile's default."""
        return precision_of(self.plan) if self.plan else self.precision or self._profile.precision

    @property
    def _embedding_word(self) -> str:
        word = self.precision_word
        return self.embedding_precision or self._profile.embeddings.get(word, word)

    @property
    def compute_word(self) -> str:
        """`compute`, or its default."""
        return self.compute or ("fp16" if self.precision_word == "fp16" else "fp32")

    def resolve_plan(self, config: GriffinConfig, gates: Collection[str] = ()) -> Plan:
        """The plan for a model: blocks that fit its rows, unless they were given in a plan.

        Args:
            config: the model's shape.
            gates: the matrices that the checkpoint has in bfloat16. They stay so if others are
                quantized, and the profile has our functions.

        Raises:
            RequestError: an unknown word or block size.
        """
        plan, exact = self.plan, gates if self._profile.functions else ()
        if not plan:
            words = self.precision_word, self._embedding_word
            chosen = choose_schemes(words, self._scheme, self.block_size, self.symmetric)
            plan = make_plan(config, *chosen)
            shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
            plan = {name: scheme.least_padded(shapes[name][-1]) for name, scheme in plan.items()}
            if any(map(has_blocks, chosen)):
                plan |= dict.fromkeys(exact, BFLOAT16)
        plan = with_bfloat16(plan, exact)
        plan = with_algorithm(plan, self.algorithm, keep=self.plan is not None)
        return self._with_even_zero_points(plan, config.width)

    def _with_even_zero_points(self, plan: Plan, width: int) -> Plan:
        """The plan with a symmetric embedding, if the profile cannot take its zero points.

        Raises:
            RequestError: zero points were asked for.
        """
        odd = [s for s in plan[EMBEDDING].uniform if _has_odd_zero_points(s, width)]
        if not self._profile.even_zero_points or not odd:
            return plan
        if self.plan or self.symmetric is False:
            raise RequestError(
                f"--profile {self.profile} has no {odd[0].label} for {EMBEDDING}, whose rows of "
                f"{width} are an odd number of blocks; store it as symmetric int4, or as int8"
            )
        return plan | {EMBEDDING: replace(odd[0], symmetric=True)}

    @property
    def _profile(self) -> LoweringProfile:
        return PROFILES[self.profile]

    def _scheme(self, precision: str, block: int | None, symmetric: bool | None) -> Scheme:
        """The scheme of a precision word: the profile's scale per row, or else blocks.

        A scale per row needs symmetric weights and activations in int8.
        """
        scheme = choose_scheme(precision, block, symmetric, self._profile.precisions)
        by_blocks = self.exact or block is not None or symmetric is False
        rows = None if by_blocks else self._profile.rows.get(precision)
        return rows or scheme.with_dtype(self._profile.scale)

    def _require_known(self, name: str, scheme: Scheme) -> None:
        """Refuses a scheme that neither ONNX nor the profile has."""
        if scheme in self._profile.rows.values():
            if self.exact:
                raise RequestError(
                    f"the plan stores {name} as {scheme.label}, which rounds activations to int8; "
                    "leave out --exact, or take blocks"
                )
            return
        bits = self._profile.bits
        own = (one.level_bits for one in scheme.uniform if one.level_bits is not None)
        if not is_storable(scheme) or not bits >= {*own}:
            symmetric = " (those of 3 are symmetric)" if 3 in bits else ""
            raise RequestError(
                f"the plan stores {name} as {scheme.label}, which the profile {self.profile} does "
                f"not have; expected blocks of {', '.join(map(str, BLOCKS))} weights in "
                f"{', '.join(map(str, sorted(bits)))} bits{symmetric}"
            )


def _has_odd_zero_points(scheme: Scheme, columns: int) -> TypeGuard[Affine]:
    if not isinstance(scheme, Affine) or scheme.bits != 4 or scheme.symmetric:
        return False
    return scheme.num_blocks(columns) % 2 == 1
