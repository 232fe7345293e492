"""The verdict of an evaluation: what models lose against the first one, where, and how surely.

It follows from the figures alone, by what `rgexport.evaluation.suites` asks of a suite.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from statistics import NormalDist

import numpy as np

from rgexport.evaluation.display import Loss, Models
from rgexport.evaluation.figures import Z
from rgexport.evaluation.suites import SUITES
from rgexport.reporting.numbers import number

_MOST_LINES = 4  # lines after the conclusion; all but the last one are about a suite
_MOST_MODELS = 3  # models in a line


@dataclass(frozen=True)
class Verdict:
    """The conclusion, and at most four lines with its reasons."""

    conclusion: str
    reasons: Sequence[str]
    is_loss: bool = False


@dataclass(frozen=True)
class _SuiteLoss:
    """A model's loss in each place of a suite, and the mean of all (None without a unit)."""

    label: str
    suite: str
    by_place: Sequence[Loss]
    total: Loss | None

    @property
    def worst(self) -> Loss:
        return max(self.by_place, key=_margins)

    @property
    def certainty(self) -> float:
        """Above 1, the loss in all places or in the worst one is more than chance explains."""
        # Of many places, some seem worse by chance (Bonferroni's correction).
        margins = NormalDist().inv_cdf(1 - 0.025 / len(self.by_place)) / Z
        total = _margins(self.total) if self.total else 0.0
        return max(total, _margins(self.worst) / margins)


def verdict(models: Models) -> Verdict:
    first, *others = models
    if not others:
        alone = f"{first['label']} was evaluated alone: name its original before it"
        return Verdict(f"{alone} to see what is lost.", [])
    losses = [
        _SuiteLoss(model["label"], name, by_place, _total(by_place, name))
        for name in first["suites"]
        for model in others
        if (by_place := SUITES[name].lost(model))
    ]
    surest = sorted(losses, key=lambda loss: -max(1.0, loss.certainty))
    chosen = list(dict.fromkeys(loss.suite for loss in surest))[: _MOST_LINES - 1]
    detailed = [loss for loss in losses if loss.suite in chosen]
    reasons = [
        f"{name}: {_reason(group)}." for name, group in groupby(detailed, attrgetter("suite"))
    ]
    if detailed:
        reasons.append(_how_sure(detailed))
    conclusions = [_conclusion(model["label"], losses, len(others) == 1) for model in others]
    is_loss = any(loss.certainty > 1 for loss in losses)
    return Verdict(f"Against {first['label']}: {'; '.join(conclusions)}.", reasons, is_loss)


def _total(losses: Sequence[Loss], suite: str) -> Loss | None:
    """Returns the mean loss; errors that are not independent may all point the same way."""
    if not SUITES[suite].UNIT:
        return None
    weights = np.array([loss.weight for loss in losses], np.float64)
    weights /= weights.sum()
    value = float(weights @ [loss.value for loss in losses])
    if any(loss.margin is None for loss in losses):
        return Loss("all", value, None)
    margins = weights * [loss.margin for loss in losses]
    margin = np.linalg.norm(margins) if SUITES[suite].INDEPENDENT else margins.sum()
    return Loss("all", value, float(margin))


def _margins(loss: Loss) -> float:
    """Returns a loss as a multiple of its margin of error; 0 if that is unknown."""
    if loss.margin is None or loss.value == 0:
        return 0.0
    return loss.value / loss.margin if loss.margin else math.copysign(math.inf, loss.value)


def _conclusion(label: str, losses: Sequence[_SuiteLoss], in_full: bool) -> str:
    of_model = [loss for loss in losses if loss.label == label]
    lost = [loss.suite for loss in of_model if loss.certainty > 1]
    unsure = [loss.suite for loss in of_model if loss.certainty <= 1]
    if not of_model:
        return f"{label} reads other tokens and cannot be compared"
    if not lost:
        return f"{label} shows no certain loss in {_listed(unsure)}"
    rest = f", but not for certain in {_listed(unsure)}" if unsure and in_full else ""
    return f"{label} certainly loses in {_listed(lost)}{rest}"


def _reason(losses: Iterable[_SuiteLoss]) -> str:
    """Returns what the models lose in a suite, the largest loss first."""
    ordered = sorted(losses, key=lambda loss: -(loss.total or loss.worst).value)
    unit = SUITES[ordered[0].suite].UNIT
    texts = [_loss_text(loss, "" if index else unit) for index, loss in enumerate(ordered)]
    rest = [loss.label for loss in ordered[_MOST_MODELS:]]
    return "; ".join([*texts[:_MOST_MODELS], *([f"{_listed(rest)} less"] if rest else [])])


def _loss_text(loss: _SuiteLoss, unit: str) -> str:
    worst, is_certain = loss.worst, loss.certainty > 1
    most = f"most surely in {worst.where} ({_plus_minus(worst)})"
    if loss.total is None:
        verb = "certainly loses" if is_certain else "shows no certain loss"
        return f"{loss.label} {verb}, {most}"
    is_gain = loss.total.value < 0
    amount = _plus_minus(loss.total._replace(value=abs(loss.total.value)))
    text = f"{loss.label} {'gains' if is_gain else 'loses'} {amount} {unit}".rstrip()
    if is_certain:
        return f"{text}, {most}" if len(loss.by_place) > 1 else text
    return text if _margins(loss.total) < -1 else f"{text}, perhaps by chance"


def _how_sure(losses: Sequence[_SuiteLoss]) -> str:
    """Returns what ± means, and how small a loss may have been missed."""
    totals = [(loss.suite, loss.total.margin or 0.0) for loss in losses if loss.total]
    margins = dict(sorted(totals, key=itemgetter(1)))  # the largest of each suite remains
    missed = [f"{m:.2g} {SUITES[name].UNIT}" for name, m in margins.items() if m]
    limits = f" A loss below {_listed(missed)} may have been missed:" if missed else ""
    advice = "longer texts (--text) show smaller losses, and `rgexport validate` measures the KL"
    return f"How sure: ± holds the true value in 95 % of cases.{limits} {advice}."


def _plus_minus(loss: Loss) -> str:
    """Returns a loss with as many digits as its margin of error has, at most five."""
    if loss.margin is None:
        return f"{number(loss.value)}, of unknown error"
    digits = max(0, min(5, 1 - math.floor(math.log10(loss.margin)))) if loss.margin else 3
    return f"{loss.value:.{digits}f} ± {loss.margin:.{digits}f}"


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
