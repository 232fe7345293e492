"""Lowering profiles, the ops and lowerings of a runtime; and the options of an ONNX export."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from rgexport.artifacts.onnx.format import is_storable
from rgexport.choices import Profile
from rgexport.errors import RequestError
from rgexport.export.onnx.lowering import LOWERINGS, Lowering
from rgexport.export.onnx.web_ops import WASM, WEBGPU
from rgexport.export.request import FolderOptions, refuse_idle, require_word
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize import plan as planning
from rgexport.quantize.schemes import registry as schemes
from rgexport.quantize.schemes.two_level import PLANES


@dataclass(frozen=True)
class FileLimit:
    """The most bytes of a file: of several tensors (`filled`), and of one (`largest`)."""

    filled: int
    largest: int


WEB_FILES = FileLimit(filled=10**9, largest=2**30)
"""Browsers do not reliably allocate more. Only a 9B's embedding in int8 exceeds 10⁹ bytes."""

FINE_HEAD = {"int4": "int8"}
"""The head in four bits would make half of the loss. WebGPU's kernels lack 8-bit `MatMulNBits`."""


@dataclass(frozen=True, kw_only=True)
class LoweringProfile:
    name: Profile
    precision: str
    precisions: Mapping[str, schemes.Scheme] = field(default_factory=lambda: planning.PRECISIONS)
    """Precision word → scheme, before options for block and symmetry."""
    embeddings: Mapping[str, str] = field(default_factory=dict)
    """Precision of the linears → that of the embedding, where it is another."""
    plans: Mapping[str, Callable[[GriffinConfig, np.ndarray, np.ndarray], schemes.Plan]] = field(
        default_factory=dict
    )
    """Precision → function that makes its plan, unless a user asks for blocks or an embedding."""
    rows: Mapping[str, schemes.Scheme] = field(default_factory=dict)
    lowerings: Mapping[str, Lowering] = field(default_factory=lambda: LOWERINGS)
    bits: frozenset[int] = frozenset({4, 8})
    scale: schemes.FloatDtype = "float32"
    even_zero_points: bool = False
    """Whether rows of the embedding with 4-bit zero points need an even number of blocks."""
    functions: bool = False
    """Whether our ops stay functions, which native kernels can replace. Gates may be bfloat16 then,
    and products round activations to int8 unless `--exact` is given."""
    files: FileLimit | None = None  # how large the files of weights may be; None for no limit

    def is_exact(self, plan: schemes.Plan, exact: bool) -> bool:
        """Whether activations are never rounded to int8: with `--exact`, or by the plan."""
        return exact or not (self.functions or schemes.INT8_ROWS in plan.values())


PROFILES: dict[str, LoweringProfile] = {
    profile.name: profile
    for profile in (
        LoweringProfile(
            name="cpu",
            precision="int4",
            embeddings=FINE_HEAD,
            plans={"int4": planning.int4_plan, "int8": planning.int8_plan},
            bits=frozenset({*PLANES, 8}),
            scale="float16",
            functions=True,
        ),
        LoweringProfile(
            name="wasm",
            precision="int8",
            precisions=planning.WEB_PRECISIONS,
            embeddings=FINE_HEAD,
            rows={"int8": schemes.INT8_ROWS},
            lowerings=LOWERINGS | WASM,
            files=WEB_FILES,
        ),
        LoweringProfile(
            name="webgpu",
            precision="int4",
            precisions=planning.WEB_PRECISIONS,
            even_zero_points=True,  # for GatherBlockQuantized
            lowerings=LOWERINGS | WEBGPU,
            files=WEB_FILES,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(FolderOptions):
    """The options of an ONNX export.

    `profile` is the runtime that the graph is made for, and has a default `precision`. `exact`
    keeps activations out of int8. `genai_native` copies our kernels for onnxruntime-genai.
    """

    profile: str = "cpu"
    exact: bool = False
    genai_native: bool = False
    default_compute = "fp32"

    def __post_init__(self) -> None:
        require_word("--profile", self.profile, PROFILES)
        self.require_consistent(exact=self.exact)
        for name, scheme in (self.plan or {}).items():
            self._require_known(name, scheme)
        if self.genai_native and not self._profile.functions:
            where = f"--profile {self.profile}, whose graph has no op for native kernels"
            refuse_idle({"--genai-native": True}, where)

    @property
    def defaults(self) -> tuple[str, Mapping[str, str]]:
        return self._profile.precision, self._profile.embeddings

    def resolve_plan(
        self, config: GriffinConfig, gates: Collection[str] = (), ids: np.ndarray | None = None
    ) -> schemes.Plan:
        """Makes the plan for a model: blocks that fit its rows, unless a plan sets them.

        `gates` are the matrices that the checkpoint has in bfloat16; they stay so if others are
        quantized. `ids` are all token ids, int [vocab], the most frequent ones first; None: as
        they are numbered. Raises RequestError for an unknown word or block size.
        """
        plan, exact = self.plan, gates if self._profile.functions else ()
        if not plan:
            plan = self._default_plan(config, np.arange(config.vocab_size) if ids is None else ids)
            shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
            plan = {name: scheme.least_padded(shapes[name][-1]) for name, scheme in plan.items()}
            if any(map(planning.has_blocks, plan.values())):
                plan |= dict.fromkeys(exact, schemes.BFLOAT16)
        plan = planning.with_bfloat16(plan, exact)
        plan = planning.with_algorithm(plan, self.algorithm, keep=self.plan is not None)
        return self._with_even_zero_points(plan, config.width)

    def _default_plan(self, config: GriffinConfig, ids: np.ndarray) -> schemes.Plan:
        free = {self.block_size, self.symmetric, self.embedding_precision} == {None}
        if free and self.precision_word in self._profile.plans:
            by_frequency = np.split(ids, [-(-len(ids) // 3)])
            return self._profile.plans[self.precision_word](config, *by_frequency)
        arguments = self.precisions, self._scheme, self.block_size, self.symmetric
        linear, embedding = planning.choose_schemes(*arguments)
        return planning.make_plan(config, linear, embedding)

    def _with_even_zero_points(self, plan: schemes.Plan, width: int) -> schemes.Plan:
        odd = [scheme for scheme in plan[EMBEDDING].uniform if scheme.pads_zero_points(width)]
        if not self._profile.even_zero_points or not odd:
            return plan
        if self.plan or self.symmetric is False:
            raise RequestError(
                f"--profile {self.profile} has no {odd[0].label} for {EMBEDDING}, whose rows of "
                f"{width} are an odd number of blocks; store it as symmetric int4, or as int8"
            )
        return plan | {EMBEDDING: odd[0].with_blocks(None, symmetric=True)}

    @property
    def _profile(self) -> LoweringProfile:
        return PROFILES[self.profile]

    def _scheme(self, precision: str, block: int | None, symmetric: bool | None) -> schemes.Scheme:
        scheme = planning.choose_scheme(precision, block, symmetric, self._profile.precisions)
        # A scale per row needs symmetric weights and activations in int8.
        by_blocks = self.exact or block is not None or symmetric is False
        rows = None if by_blocks else self._profile.rows.get(precision)
        return rows or scheme.with_dtype(self._profile.scale)

    def _require_known(self, name: str, scheme: schemes.Scheme) -> None:
        if scheme in self._profile.rows.values():
            if self.exact:
                raise RequestError(
                    f"the plan stores {name} as {scheme.label}, which rounds activations to int8; "
                    "leave out --exact, or take blocks"
                )
            return
        bits = self._profile.bits
        stored = {s.level_bits for s in scheme.uniform if s.level_bits is not None}
        needs_function = any(uniform.needs_local_function for uniform in scheme.uniform)
        unknown = needs_function and not self._profile.functions
        if not is_storable(scheme) or not bits >= stored or unknown:
            raise RequestError(
                f"the plan stores {name} as {scheme.label}, which the profile {self.profile} does "
                f"not have; expected blocks of {', '.join(map(str, schemes.BLOCKS))} weights in "
                f"{', '.join(map(str, sorted(bits)))} bits"
            )
