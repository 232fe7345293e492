"""The quantization plan: how each tensor is stored, and the weights as they are read back."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.choices import plan_advice
from rgexport.errors import RequestError
from rgexport.files.paths import read_regular, report_os_errors
from rgexport.files.typed_json import Mismatch, parse_json
from rgexport.griffin import layout
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.tensor import DTYPES, RowTensor, WeightSource
from rgexport.kernels.rounding import library
from rgexport.parallelism import parallel_jobs
from rgexport.progress import warn
from rgexport.quantize.algorithms.statistics import StatisticsOf
from rgexport.quantize.schemes import registry as schemes
from rgexport.quantize.schemes.base import nbytes_of
from rgexport.quantize.schemes.registry import (
    BFLOAT16,
    FLOAT32,
    INT8_ROWS,
    Affine,
    Float,
    Plan,
    Scheme,
    TwoLevel,
)
from rgexport.quantize.schemes.row_groups import group_rows

PRECISIONS: dict[str, Scheme] = {
    "fp32": FLOAT32,
    "fp16": Float("float16"),
    "int8": Affine(8, 128, symmetric=True),
    "int4": Affine(4, 32, symmetric=True),
}
"""Precision → scheme of the linears and the embedding, before a user's block and symmetry."""
WEB_PRECISIONS: dict[str, Scheme] = PRECISIONS | {"int4": Affine(4, 128, symmetric=False)}
"""The same for browsers: scales are float32, so small blocks would cost another half bit."""
COREML_PRECISIONS: dict[str, Scheme] = PRECISIONS | {"int8": INT8_ROWS, "pal4": schemes.Palette()}
"""The same for Core ML, before it is fitted to each matrix and gets the dtype of scales."""

MIXED = "mixed"
_SENSITIVE = re.compile(r"\.[kv]_proj\.|^layers\.0\..*\.down_proj\.")
"""Linears that lose most per weight in 4 bits, see `bench.quality`."""
_ROWS = 192  # rows that a thread encodes at once, or a few more where a table is shared


def choose_scheme(
    precision: str,
    block: int | None = None,
    symmetric: bool | None = None,
    precisions: Mapping[str, Scheme] = PRECISIONS,
) -> Scheme:
    """Returns the scheme of a precision, with a user's block size and symmetry.

    Raises RequestError for an unknown precision, or a block size outside of `BLOCKS`.
    """
    if block is not None and block not in schemes.BLOCKS:
        raise RequestError(
            f"--block-size is {block}; expected one of {', '.join(map(str, schemes.BLOCKS))}"
        )
    if precision not in precisions:
        expected = f"{', '.join(precisions)}{plan_advice(precision)}"
        raise RequestError(f"unknown precision {precision!r}; expected one of {expected}")
    return precisions[precision].with_blocks(block, symmetric)


def choose_schemes(
    precisions: tuple[str, str],
    choose: Callable[[str, int | None, bool | None], Scheme],
    block: int | None,
    symmetric: bool | None,
) -> tuple[Scheme, Scheme]:
    """Returns the schemes of the linears and of the embedding, of two `precisions`.

    The embedding shares block size and symmetry if it has the same precision, or linears have none.
    """
    linear, table = precisions
    chosen = choose(linear, block, symmetric)
    if table == linear or not has_blocks(chosen):
        return chosen, choose(table, block, symmetric)
    return chosen, choose(table, None, None)


def make_plan(config: GriffinConfig, linear: Scheme, embedding: Scheme) -> Plan:
    """Returns a plan: `embedding` for the table, `linear` for linears, else float32."""
    by_role = {role: linear for role in layout.QUANTIZABLE} | {"embedding": embedding}
    return {n: by_role.get(spec.role, FLOAT32) for n, spec in layout.model_tensors(config).items()}


def int8_plan(config: GriffinConfig, frequent: np.ndarray, rare: np.ndarray) -> Plan:
    """Returns int8 in blocks of 32, of the embedding 16 for `frequent` token ids, else 64."""
    small, linear, large = (Affine(8, n, symmetric=True, scale="float16") for n in (16, 32, 64))
    return make_plan(config, linear, group_rows({small: frequent, large: rare}))


def int4_plan(config: GriffinConfig, frequent: np.ndarray, rare: np.ndarray) -> Plan:
    """Returns int4 with two-level scales; int8, or blocks of 16, where int4 loses most.

    That is in the first layer, keys and values, and the embedding's rows of `frequent` token ids.
    """
    coarse, small = TwoLevel(4, 32), TwoLevel(4, 16)
    fine = Affine(8, 128, symmetric=True, scale="float16")
    plan = make_plan(config, coarse, group_rows({fine: frequent, small: rare}))
    for name in [name for name, scheme in plan.items() if scheme == coarse]:
        if _SENSITIVE.search(name):
            plan[name] = fine
        elif name.startswith("layers.0."):
            plan[name] = small
    return plan


def bfloat16_gates(config: GriffinConfig, weights: WeightSource) -> frozenset[str]:
    """Returns the matrices of gates, [heads, block, block], that the checkpoint has in bfloat16."""
    return frozenset(
        name
        for name, spec in layout.model_tensors(config).items()
        if _is_gate_matrix(spec) and name in weights and weights[name].dtype == DTYPES["bfloat16"]
    )


def with_bfloat16(plan: Plan, names: Collection[str]) -> Plan:
    return {
        name: FLOAT32 if scheme == BFLOAT16 and name not in names else scheme
        for name, scheme in plan.items()
    }


def _is_gate_matrix(spec: layout.TensorSpec) -> bool:
    return spec.role == "gate" and len(spec.shape) == 3


def precision_of(plan: Plan) -> str:
    """Returns the precision of the coarsest weights; `mixed` if linears have several under 8."""
    linears = (scheme for name, scheme in plan.items() if name != layout.EMBEDDING)
    bits = {uniform.level_bits for scheme in linears for uniform in scheme.uniform} - {None, 8}
    return MIXED if len(bits) > 1 else schemes.coarsest(plan.values()).precision


def plan_bits(plan: Plan, config: GriffinConfig) -> float:
    """Returns the mean bits per weight of matrices and embedding."""
    stored = weights = 0
    for name, spec in layout.model_tensors(config).items():
        if spec.role in layout.QUANTIZABLE:
            rows, columns = spec.shape
            weights += rows * columns
            for uniform, size in zip(plan[name].uniform, plan[name].group_sizes(rows), strict=True):
                stored += nbytes_of(uniform.part_shapes((size, columns)))
    return 8 * stored / weights


def has_blocks(scheme: Scheme) -> bool:
    """Whether users can set the block size and symmetry of a scheme."""
    return any(uniform.has_block_options for uniform in scheme.uniform)


def with_algorithm(plan: Plan, algorithm: str | None, *, keep: bool) -> Plan:
    """Returns the plan filled by the algorithm that a user asks for.

    Without one: by those of the plan if a user chose them (`keep`), or else by clip search, which
    needs no data; without its library by rounding to nearest.
    """
    if algorithm is None:
        encoders = (one.encoders for scheme in plan.values() for one in scheme.uniform)
        if keep or not any("search" in names for names in encoders):
            return plan
        algorithm = "rtn" if library.unusable() else "search"
        if algorithm == "rtn":
            warn(
                "weights are rounded to nearest, as the library that chooses better levels is "
                f"missing: {library.unusable()}"
            )
    uniform = [one for scheme in plan.values() for one in scheme.uniform]
    if algorithm != "gptq" and any(one.level_bits in (2, 3) for one in uniform):
        warn("weights of 2 and 3 bits lose several times as much without --quality best")
    return {name: scheme.with_algorithm(algorithm) for name, scheme in plan.items()}


def load_plan(path: Path, config: GriffinConfig) -> Plan:
    """Reads a JSON file: tensor name → scheme, as `rgexport inspect --json` prints it.

    Raises RequestError for other JSON, a missing or unknown tensor, another scheme for one that
    must be float32, and row groups that do not fit.
    """
    try:
        with report_os_errors(path):
            entries = parse_json(read_regular(path))
    except Mismatch as error:
        raise RequestError(f"the plan {path} is {error}") from None
    if isinstance(entries, dict) and isinstance(entries.get("plan"), dict):
        entries = entries["plan"]
    tensors = layout.model_tensors(config)
    if not isinstance(entries, dict) or entries.keys() != tensors.keys():
        names = set(entries) if isinstance(entries, dict) else set()
        differing = sorted(names ^ set(tensors))[:5]
        raise RequestError(
            f"the plan {path} does not name the tensors of this model (first differences: "
            f"{', '.join(differing)}); print a fitting one with `rgexport inspect ARTIFACT --json`"
        )
    return {name: _read_scheme(path, name, entries[name], tensors) for name in entries}


def _read_scheme(
    path: Path, name: str, fields: Any, tensors: Mapping[str, layout.TensorSpec]
) -> Scheme:
    try:
        scheme = schemes.scheme_from_dict(fields)
        scheme.require_known_algorithm()
        if tensors[name].role in layout.QUANTIZABLE:
            scheme.group_sizes(tensors[name].shape[0])
    except RequestError as error:
        raise RequestError(f"the plan {path}: {name}: {error}") from None
    role = tensors[name].role
    shorter = [Float("float16")] if layout.is_linear_bias(name, tensors) else []
    shorter += [BFLOAT16] if _is_gate_matrix(tensors[name]) else []
    rule = ""
    if role in layout.QUANTIZABLE and scheme == BFLOAT16:
        rule = "only the matrices of gates may be bfloat16"
    elif role not in layout.QUANTIZABLE and scheme not in (FLOAT32, schemes.Ggml("f32"), *shorter):
        allowed = " or ".join(["float32", *(one.dtype for one in shorter)])
        rule = f"a {role} is never quantized; expected {allowed}"
    if rule:
        raise RequestError(f"the plan {path} stores {name} as {scheme.to_dict()}; {rule}")
    return scheme


def quantized(weights: WeightSource, plan: Plan, statistics_of: StatisticsOf) -> WeightSource:
    """Returns the weights as a plan stores them; float schemes change nothing."""
    return {
        n: t if plan[n].is_float_array else _quantized(n, t, plan[n], statistics_of)
        for n, t in weights.items()
    }


def _quantized(
    name: str, tensor: RowTensor, scheme: Scheme, statistics_of: StatisticsOf
) -> RowTensor:
    groups = scheme.row_groups(tensor.shape[0])

    def read(start: int, stop: int) -> np.ndarray:
        result = np.empty((stop - start, *tensor.shape[1:]), np.float32)
        statistics = statistics_of(name)

        def fill(slab: slice) -> None:
            rows = tensor.read(slab.start, slab.stop)
            for _, uniform, members in groups:
                ids = np.arange(slab.start, slab.stop)
                if members is not None:
                    first, last = np.searchsorted(members, [slab.start, slab.stop])
                    ids = members[first:last]
                if len(ids):
                    stored = uniform.round_trip(name, rows[ids - slab.start], statistics, ids)
                    inside = (ids >= start) & (ids < stop)
                    result[ids[inside] - start] = stored[inside]

        with ThreadPoolExecutor(parallel_jobs()) as pool:
            list(pool.map(fill, _slabs(start, stop, scheme.rows_together, tensor.shape[0])))
        return result

    return RowTensor(tensor.shape, np.dtype(np.float32), read)


def _slabs(start: int, stop: int, together: int, rows: int) -> Iterator[slice]:
    """Slabs that cover `start` to `stop`, in whole groups of `together` rows."""
    step = -(-_ROWS // together) * together
    for first in range(start // together * together, stop, step):
        last = -(-min(first + step, stop) // together) * together
        yield slice(first, min(last, rows))
