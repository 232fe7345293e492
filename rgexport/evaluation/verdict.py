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

_MOST_LINES = 4
"""Lines after the conclusion; all but the last one are about a suite."""
_MOST_MODELS = 3
"""Models in a line."""


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
        """The loss that exceeds its margin of error the most."""
        return max(self.by_place, key=_margins)

    @property
    def certainty(self) -> float:
        """The loss in margins of error; above 1, it is more than chance explains."""
        total = 0.0
        if self.total:
            total = _margins(self.total)
        # Among many places, some seem worse by chance (Bonferroni's correction).
        corrected_z = NormalDist().inv_cdf(1 - 0.025 / len(self.by_place))
        worst = _margins(self.worst) / (corrected_z / Z)
        return max(total, worst)

    @property
    def is_certain(self) -> bool:
        """Whether the loss in all places, or in the worst one, is more than chance explains."""
        return self.certainty > 1


def verdict(models: Models) -> Verdict:
    """Returns the verdict on several models, which are compared with the first one."""
    first, *others = models
    if not others:
        alone = f"{first['label']} was evaluated alone: name its original before it"
        return Verdict(f"{alone} to see what is lost.", [])

    losses = _suite_losses(first["suites"], others)
    is_pair = len(others) == 1
    conclusions = [_conclusion(model["label"], losses, is_pair) for model in others]
    return Verdict(
        f"Against {first['label']}: {'; '.join(conclusions)}.",
        _reasons(losses),
        any(loss.is_certain for loss in losses),
    )


def _suite_losses(suites: Iterable[str], models: Models) -> list[_SuiteLoss]:
    """Returns the losses of all models in all suites in which they can be compared."""
    losses = []
    for name in suites:
        for model in models:
            by_place = SUITES[name].lost(model)
            if by_place:
                total = _total(by_place, name)
                losses.append(_SuiteLoss(model["label"], name, by_place, total))
    return losses


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
    if SUITES[suite].INDEPENDENT:
        margin = float(np.linalg.norm(margins))
    else:
        margin = float(margins.sum())
    return Loss("all", value, margin)


def _margins(loss: Loss) -> float:
    """Returns a loss as a multiple of its margin of error; 0 if that is unknown."""
    if loss.margin is None or loss.value == 0:
        return 0.0
    if loss.margin == 0:
        return math.copysign(math.inf, loss.value)
    return loss.value / loss.margin


def _conclusion(label: str, losses: Sequence[_SuiteLoss], in_full: bool) -> str:
    """Returns a model's clause of the conclusion; `in_full` also names the uncertain suites."""
    of_model = [loss for loss in losses if loss.label == label]
    if not of_model:
        return f"{label} reads other tokens and cannot be compared"

    lost = [loss.suite for loss in of_model if loss.is_certain]
    unsure = [loss.suite for loss in of_model if not loss.is_certain]
    if not lost:
        return f"{label} shows no certain loss in {_listed(unsure)}"
    text = f"{label} certainly loses in {_listed(lost)}"
    if unsure and in_full:
        text += f", but not for certain in {_listed(unsure)}"
    return text


def _reasons(losses: Sequence[_SuiteLoss]) -> list[str]:
    """Returns a line for each of the suites with the surest losses, and one about the errors."""
    if not losses:
        return []
    # Uncertain losses count alike, so their suites keep the order of the evaluation.
    surest = sorted(losses, key=lambda loss: -max(1.0, loss.certainty))
    suites = list(dict.fromkeys(loss.suite for loss in surest))[: _MOST_LINES - 1]
    detailed = [loss for loss in losses if loss.suite in suites]

    reasons = []
    for name, group in groupby(detailed, attrgetter("suite")):
        reasons.append(f"{name}: {_reason(group)}.")
    reasons.append(_how_sure(detailed))
    return reasons


def _reason(losses: Iterable[_SuiteLoss]) -> str:
    """Returns the losses of the models in a suite, the largest loss first."""
    ordered = sorted(losses, key=lambda loss: -(loss.total or loss.worst).value)
    texts = []
    unit = SUITES[ordered[0].suite].UNIT
    for loss in ordered[:_MOST_MODELS]:
        texts.append(_loss_text(loss, unit))
        unit = ""  # the first model's text names it

    hidden = [loss.label for loss in ordered[_MOST_MODELS:]]
    if hidden:
        texts.append(f"{_listed(hidden)} less")
    return "; ".join(texts)


def _loss_text(loss: _SuiteLoss, unit: str) -> str:
    """Returns the clause of one model's loss or gain in a suite."""
    most = f"most surely in {loss.worst.where} ({_plus_minus(loss.worst)})"
    if loss.total is None:
        if loss.is_certain:
            return f"{loss.label} certainly loses, {most}"
        return f"{loss.label} shows no certain loss, {most}"

    verb = "gains" if loss.total.value < 0 else "loses"
    amount = _plus_minus(loss.total._replace(value=abs(loss.total.value)))
    text = f"{loss.label} {verb} {amount} {unit}".rstrip()
    if loss.is_certain:
        if len(loss.by_place) > 1:
            text += f", {most}"
        return text
    is_certain_gain = _margins(loss.total) < -1
    if not is_certain_gain:
        text += ", perhaps by chance"
    return text


def _how_sure(losses: Sequence[_SuiteLoss]) -> str:
    """Returns the meaning of ±, and how small a loss may have been missed."""
    totals = [(loss.suite, loss.total.margin or 0.0) for loss in losses if loss.total]
    # Of several margins of a suite, a dictionary keeps the last one: the largest.
    largest_margins = dict(sorted(totals, key=itemgetter(1)))
    missed = []
    for suite, margin in largest_margins.items():
        if margin:
            missed.append(f"{margin:.2g} {SUITES[suite].UNIT}")

    text = "How sure: ± holds the true value in 95 % of cases."
    if missed:
        text += f" A loss below {_listed(missed)} may have been missed:"
    advice = "longer texts (--text) show smaller losses, and `rgexport validate` measures the KL"
    return f"{text} {advice}."


def _plus_minus(loss: Loss) -> str:
    """Returns a loss with as many digits as its margin of error has, at most five."""
    if loss.margin is None:
        return f"{number(loss.value)}, of unknown error"
    digits = 3
    if loss.margin:
        digits = max(0, min(5, 1 - math.floor(math.log10(loss.margin))))
    return f"{loss.value:.{digits}f} ± {loss.margin:.{digits}f}"


def _listed(names: Sequence[str]) -> str:
    """Returns names as in `a, b and c`."""
    *most, last = names
    if not most:
        return last
    return f"{', '.join(most)} and {last}"
