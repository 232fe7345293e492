"""The tables of `validate --bisect`: sites, layers and suspects."""

from collections.abc import Iterator, Sequence

from rgexport.tables import Row, Table
from rgexport.validate.bisect.layer_costs import LayerCost
from rgexport.validate.bisect.site_errors import SiteError
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.bisect.suspects import Suspect

WORST = 5
"""Sites that are shown although they are within their limits."""
MOST = 30
"""Sites beyond their limits, and suspects, that are shown."""
_SITE = ("tokens", "rms", "median", "of its limit")
_COST = ("KL", "share", "top-1")


def bisect_parts(
    report: SiteReport | None, costs: Sequence[LayerCost] | None, suspects: Sequence[Suspect]
) -> Iterator[str | Table]:
    """What there is to show; suspects first."""
    if suspects:
        header = ("layer", "op", "evidence")
        yield Table("Suspects", header, _suspect_rows(suspects))
    if report is not None:
        yield Table(_sites_title(report), ("op", *_SITE), _site_rows(report), _SITE)
    if costs:
        title = "Layers: KL to the original if only this one were stored so"
        yield Table(title, ("part", *_COST), _cost_rows(costs), _COST)


def _sites_title(report: SiteReport) -> str:
    unseen = f"; {len(report.unseen)} not shown by the engine" if report.unseen else ""
    counts = f"{len(report.beyond)} of {len(report.errors)} beyond the limit{unseen}"
    return f"Per-op check: each op from the artifact's own inputs ({counts})"


def _site_rows(report: SiteReport) -> Iterator[Row]:
    beyond = report.beyond
    yield from map(_site_row, beyond[:MOST])
    if len(beyond) > MOST:
        yield f"… and {len(beyond) - MOST} more beyond the limit", "", "", "", ""
    yield from (_site_row(error) for error in report.worst(WORST) if error.passed)


def _site_row(e: SiteError) -> Row:
    where = e.site if e.state is None else f"state {e.state}"
    return where, str(e.length), f"{e.rms:.3g}", f"{e.median:.3g}", f"{e.excess:.3g}"


def _cost_rows(costs: Sequence[LayerCost]) -> Iterator[Row]:
    """All parts of a small model, the dearest ones of a large one."""
    total = sum(cost.kl for cost in costs) or 1
    ranked = sorted(costs, key=lambda cost: -cost.kl)
    shown = ranked if len(ranked) <= 2 * WORST + 2 else ranked[: 2 * WORST]
    for c in shown:
        kl = f"{c.kl:.3g} ± {c.standard_error:.1g}"
        yield c.part, kl, f"{100 * c.kl / total:.1f} %", f"{100 * c.top1:.1f} %"
    if rest := ranked[len(shown) :]:
        share = sum(cost.kl for cost in rest) / total
        yield f"… and {len(rest)} better ones", "", f"{100 * share:.1f} %", ""


def _suspect_rows(suspects: Sequence[Suspect]) -> Iterator[Row]:
    for s in suspects[:MOST]:
        yield "" if s.layer is None else str(s.layer), s.site, s.evidence
    if len(suspects) > MOST:
        yield "", f"… and {len(suspects) - MOST} more", ""
