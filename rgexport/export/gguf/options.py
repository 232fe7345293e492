"""The options of a GGUF export, and the type that each tensor gets."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rgexport.artifacts.gguf.naming import FileTensor, file_tensors
from rgexport.errors import RequestError
from rgexport.export.request import refuse_beside_plan, refuse_idle, require_levels, require_word
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.algorithms.registry import ALGORITHMS
from rgexport.quantize.imatrix import Imatrix, read_imatrix
from rgexport.quantize.schemes import ggml_types
from rgexport.quantize.schemes.registry import Ggml, Plan

DEFAULT_TYPE = "q4_k_m"
PRECISION_TYPES = {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_k_m"}
"""Precision word of the other formats → file type."""
_EMBEDDING_TYPES = PRECISION_TYPES | {"int4": "q4_k"}
_ONE_WAY = "f32", "f16", "bf16", "q8_0"
"""File types that are no mix, and that importances do not change."""


@dataclass(frozen=True)
class GgufStorage:
    file_type: ggml_types.FileType
    tensors: list[FileTensor]
    schemes: dict[str, Ggml]
    imatrix: Imatrix | None = None
    importances: dict[str, np.ndarray] = field(default_factory=dict)
    """Name → float32 [columns]; tensors without importances are missing."""

    @property
    def types(self) -> dict[str, str]:
        return {name: scheme.type for name, scheme in self.schemes.items()}


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """The options of a GGUF export; None stands for a default.

    `type` is a file type of llama-quantize, such as `q4_k_m`, and `precision` another name of one,
    such as `int4`; with `pure` all tensors have it. Each of `tensor_types` is `REGEX=TYPE`, for
    names in the file. `embedding_precision` is the type of the embedding and the head, `imatrix` a
    file of llama-imatrix. `plan` replaces all of these.
    `algorithm` chooses the levels of the types that it can fill; llama-quantize's own the rest.
    """

    type: str | None = None
    precision: str | None = None
    pure: bool = False
    tensor_types: tuple[str, ...] = ()
    embedding_precision: str | None = None
    imatrix: Path | None = None
    plan: Plan | None = None
    algorithm: str | None = None

    def __post_init__(self) -> None:
        by_plan = "type", "precision", "pure", "tensor_types", "embedding_precision", "imatrix"
        refuse_beside_plan(self, by_plan)
        self._request()
        if self.imatrix and self._takes_statistics:
            raise RequestError(
                "--imatrix and --calibration both say which columns count; leave out one of them"
            )
        if self.embedding_precision is not None or self.tensor_types:
            return
        require_levels([self.file_type.name], self.algorithm)
        if self.file_type.name in _ONE_WAY:
            refuse_idle(
                {"--pure": self.pure, "--imatrix": self.imatrix},
                f"a file of type {self.file_type.name}, whose tensors are stored in one way; "
                "choose a --type of fewer bits beside it, or leave it out",
            )

    @property
    def file_type(self) -> ggml_types.FileType:
        if self.plan is None:
            return ggml_types.find_file_type(_type_word(self.type, self.precision) or DEFAULT_TYPE)
        kinds = Counter(scheme.ggml_type for scheme in self.plan.values())
        fewer = Counter({k: count for k, count in kinds.items() if k not in ("f32", None)})
        most = str((fewer or Counter(["f32"])).most_common(1)[0][0])
        return ggml_types.FILE_TYPES.get(most) or next(
            t for t in ggml_types.FILE_TYPES.values() if t.default == most
        )

    def choose(self, config: GriffinConfig) -> GgufStorage:
        """Chooses the types for a model; RequestError for a plan or file that does not fit it."""
        tensors = file_tensors(config)
        if self.plan is not None:
            schemes = {tensor.name: _planned(tensor, self.plan) for tensor in tensors}
            return GgufStorage(self.file_type, tensors, self._filled(schemes))
        imatrix = read_imatrix(self.imatrix) if self.imatrix else None
        types = dict.fromkeys((tensor.name for tensor in tensors), "f32") | ggml_types.choose_types(
            {t.name: t.shape[-1] for t in tensors if t.quantizable},
            self._request(),
            gqa=config.num_heads if config.block_types[0] == "attention" else 0,
            has_imatrix=imatrix is not None or self._takes_statistics,
        )
        importances = _importances(imatrix, tensors, types) if imatrix else {}
        schemes = self._filled({name: Ggml(kind) for name, kind in types.items()})
        return GgufStorage(self.file_type, tensors, schemes, imatrix, importances)

    @property
    def _takes_statistics(self) -> bool:
        return self.algorithm is not None and ALGORITHMS[self.algorithm].needs_statistics

    def _filled(self, schemes: Mapping[str, Ggml]) -> dict[str, Ggml]:
        if self.algorithm is None:
            return dict(schemes)
        algorithm = self.algorithm if self.algorithm in Ggml.encoders else "ggml"
        return {name: scheme.with_algorithm(algorithm) for name, scheme in schemes.items()}

    def _request(self) -> ggml_types.TypeRequest:
        embedding = self.embedding_precision and self.embedding_precision.lower()
        if embedding:
            embedding = ggml_types.find_type(_EMBEDDING_TYPES.get(embedding, embedding)).name
        return ggml_types.TypeRequest(
            file_type=self.file_type,
            pure=self.pure,
            overrides=tuple(ggml_types.parse_override(text) for text in self.tensor_types),
            token_embedding_type=embedding or None,
        )


def _type_word(kind: str | None, precision: str | None) -> str | None:
    if precision:
        require_word("--precision", precision, PRECISION_TYPES)
    if kind and precision:
        raise RequestError(f"--type {kind} and {precision} contradict each other; give one of them")
    return kind or (PRECISION_TYPES[precision] if precision else None)


def _importances(
    imatrix: Imatrix, tensors: list[FileTensor], types: dict[str, str]
) -> dict[str, np.ndarray]:
    """Returns the importances of quantized tensors; llama-imatrix has none for gates."""
    checked = [tensor for tensor in tensors if tensor.quantizable]
    imatrix.require_any_of(tensor.name for tensor in checked)
    importances = {t.name: imatrix.importance(t.name, t.shape[-1]) for t in checked}
    return {
        name: columns
        for name, columns in importances.items()
        if columns is not None and ggml_types.TYPES[types[name]].is_quantized
    }


def _planned(tensor: FileTensor, plan: Plan) -> Ggml:
    scheme, columns = plan[tensor.canonical], tensor.shape[-1]
    kind = scheme.ggml_type
    if kind is None or not ggml_types.TYPES[kind].fits(columns):
        layout = "in row groups" if len(scheme.uniform) > 1 else f"for rows of {columns}"
        raise RequestError(
            f"the plan stores {tensor.canonical} as {scheme.label}, which GGUF cannot do {layout}; "
            "expected a ggml type that fits, such as "
            f"{next(k for k in ('q4_k', 'q4_0', 'f16') if ggml_types.TYPES[k].fits(columns))}"
        )
    if kind != "f32" and not tensor.quantizable:
        raise RequestError(f"the plan stores {tensor.canonical} as {kind}; expected f32")
    if isinstance(scheme, Ggml):  # the class is asked for: its algorithm stays as the plan has it
        return scheme
    return Ggml(kind)
