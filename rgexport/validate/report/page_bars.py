"""Rows of a page's tables that have a bar: tensors by role, ops by kind, parts by their cost."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rgexport.validate.bisect.layer_costs import LayerCost
from rgexport.validate.bisect.site_errors import SiteError
from rgexport.validate.reference.against import PromptResult
from rgexport.validate.report.file_report import prompt_cells
from rgexport.validate.report.report_words import number, percent
from rgexport.validate.weights.weight_errors import WeightError

_LAYER = re.compile(r"layers\.\d+\.")


@dataclass(frozen=True)
class Bar:
    """A row: its name, what stands beside it, and the length of its bar, in [0, 1].

    `beyond` is true where the bar is at its end because the value is beyond a limit.
    """

    name: str
    cells: tuple[str, ...]
    share: float
    beyond: bool = False


@dataclass(frozen=True)
class RoleError:
    """The tensors that play one role in all layers, and are stored in one way."""

    role: str
    scheme: str
    tensors: int
    rms: float
    worst: float


def role_errors(weights: Sequence[WeightError]) -> list[RoleError]:
    """The weight table by role, the worst first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for error in weights:
        role = _LAYER.sub("", error.name).removesuffix(".weight")
        groups.setdefault((role, error.scheme), []).append(error.relative_error)
    found = [
        RoleError(*key, len(group), (sum(e * e for e in group) / len(group)) ** 0.5, max(group))
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda role: -role.rms)


def role_bars(weights: Sequence[WeightError]) -> list[Bar]:
    """Bars of the root mean square errors, beside scheme, tensors, rms and worst."""
    roles = role_errors(weights)
    cells = [(r.scheme, str(r.tensors), number(r.rms), number(r.worst)) for r in roles]
    return _bars([role.role for role in roles], cells, [role.rms for role in roles])


def cost_bars(costs: Sequence[LayerCost]) -> list[Bar]:
    """Bars of KL, the dearest part first, beside it and the share of equal first choices."""
    ranked = sorted(costs, key=lambda cost: -cost.kl)
    cells = [(f"{number(c.kl)} ± {c.standard_error:.1g}", percent(c.top1)) for c in ranked]
    return _bars([cost.part for cost in ranked], cells, [cost.kl for cost in ranked])


def prompt_bars(prompts: Sequence[PromptResult]) -> list[Bar]:
    """Bars of KL in the file's order, beside tokens, KL, first choices, state and greedy text."""
    return _bars(
        [prompt.name for prompt in prompts],
        [prompt_cells(prompt) for prompt in prompts],
        [prompt.kl for prompt in prompts],
    )


def op_bars(errors: Iterable[SiteError]) -> list[Bar]:
    """Bars of the share of its limit, for the worst op and state of each kind."""
    worst: dict[str, SiteError] = {}
    for error in errors:
        kind = error.op if error.state is None else f"state {error.state.rpartition('.')[2]}"
        if kind not in worst or worst[kind].excess < error.excess:
            worst[kind] = error
    ranked = sorted(worst.items(), key=lambda item: -item[1].excess)
    return [
        Bar(kind, _op_cells(error), min(1.0, error.excess), not error.passed)
        for kind, error in ranked
    ]


def _op_cells(e: SiteError) -> tuple[str, ...]:
    return number(e.excess), e.state or e.site, str(e.length), number(e.rms), number(e.median)


def _bars(
    names: Sequence[str], cells: Sequence[tuple[str, ...]], values: Sequence[float]
) -> list[Bar]:
    """Bars as long as the values, the largest one's of length 1; none where it is no number."""
    largest = max((value for value in values if value == value), default=0) or 1
    shares = [value / largest if value == value else 0.0 for value in values]
    return [Bar(*row) for row in zip(names, cells, shares, strict=True)]
