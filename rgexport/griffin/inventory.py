"""Compares the tensors of a checkpoint with those that its model needs."""

from collections.abc import Iterable, Mapping

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.tensor import DTYPES, RowTensor

FoundTensor = RowTensor | str
"""A readable tensor, or the name of the dtype that makes it unreadable."""


def take_inventory(
    config: GriffinConfig, found: Mapping[str, FoundTensor]
) -> tuple[dict[str, RowTensor], list[str]]:
    """Sorts `found` (canonical names) into usable tensors and problems.

    A problem reads `kind: details`; the kinds are missing, unexpected, wrong shape, wrong dtype.
    """
    needed = model_tensors(config)
    weights: dict[str, RowTensor] = {}
    problems = []
    for name, spec in needed.items():
        tensor = found.get(name)
        if tensor is None:
            problems.append(f"missing: {name}")
        elif isinstance(tensor, str):
            problems.append(f"wrong dtype: {name} is {tensor} (expected {', '.join(DTYPES)})")
        elif tensor.shape != spec.shape:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)} (expected {list(spec.shape)})"
            )
        else:
            weights[name] = tensor
    problems += [f"unexpected: {name}" for name in found if name not in needed]
    return weights, problems


def summarize(problems: Iterable[str], limit: int = 8) -> str:
    """All problems on one line, grouped by kind, at most `limit` of each kind spelled out."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kind, _, details = problem.partition(": ")
        kinds.setdefault(kind, []).append(details)
    return "; ".join(f"{kind}: {_shorten(details, limit)}" for kind, details in kinds.items())


def _shorten(details: list[str], limit: int) -> str:
    more = len(details) - limit
    return ", ".join(details[:limit]) + (f" and {more} more" if more > 0 else "")
