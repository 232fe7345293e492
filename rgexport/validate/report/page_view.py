"""One artifact's result as the templates of a page want it."""

from collections.abc import Iterator
from dataclasses import dataclass

from rgexport.tables import Table
from rgexport.validate.bisect.site_errors import SiteError
from rgexport.validate.checks import Check
from rgexport.validate.measure import Comparison
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report.chart import Chart
from rgexport.validate.report.file_pictures import file_charts
from rgexport.validate.report.file_report import PROMPT, file_table, sketch_table
from rgexport.validate.report.layer_pictures import site_chart
from rgexport.validate.report.page_bars import (
    Bar,
    cost_bars,
    op_bars,
    prompt_bars,
    role_bars,
)
from rgexport.validate.report.pictures import charts
from rgexport.validate.report.report_tables import itself_table, logits_table, sides_of
from rgexport.validate.report.report_words import (
    LABELS,
    MOST_NAMED,
    counted_checks,
    not_passed,
    number,
    percent,
    source_words,
    speed_words,
    twin_words,
)
from rgexport.validate.report.tiles import Tile, tiles
from rgexport.validate.result import Result

_VERDICTS = {
    "PASS": "It computes what it should: all {} checks passed.",
    "AMBIGUOUS": "{}: the limit lies within the error bar.",
    "FAIL": "{}.",
}


SECTIONS = {
    "compared": "What was compared",
    "texts": "What both write",
    "suspects": "Suspects",
    "charts": "Where it differs",
    "ops": "Per-op check",
    "costs": "Layers by what their quantization costs",
    "numbers": "All numbers",
    "itself": "Against itself",
    "file": "Against the reference file",
    "weights": "Weights by role",
    "worst": "The worst positions",
    "checks": "Checks and their limits",
    "files": "Files",
}
"""The end of a section's id → its title, in the order of the page."""


@dataclass(frozen=True)
class BarTable:
    """A table whose rows have a bar; columns in `numbers` are set flush right."""

    header: tuple[str, ...]
    rows: list[Bar]
    numbers: tuple[str, ...]
    bar: str
    """What the bars show."""


@dataclass(frozen=True)
class View:
    """One artifact; `anchor` begins the ids of its elements."""

    anchor: str
    result: Result

    @property
    def verdict(self) -> str:
        """In words."""
        r = self.result
        said = len(r.checks) if r.verdict == "PASS" else counted_checks(r)
        return _VERDICTS[r.verdict].format(said)

    @property
    def cost(self) -> str:
        """What compression cost, in words."""
        found = self.result.original or self.result.reference
        if found is None:
            return "What compression cost was not measured: the original was not given (-m)."
        return " ".join(_cost(found))

    @property
    def tiles(self) -> list[Tile]:
        """The numbers that matter most."""
        return list(tiles(self.result))

    @property
    def contents(self) -> list[tuple[str, str]]:
        """The end of each section's id, and its title."""
        r = self.result
        there = {
            "texts": r.continuations,
            "suspects": self.suspects,
            "charts": self.charts,
            "ops": self.ops,
            "costs": self.costs,
            "numbers": self.logits,
            "file": self.file,
            "weights": r.weights is not None,
            "worst": self.comparison,
        }
        return [(key, title) for key, title in SECTIONS.items() if there.get(key, True)]

    @property
    def named(self) -> list[Check]:
        """Checks that did not pass, as many as are named at the top."""
        return not_passed(self.result)[:MOST_NAMED]

    @property
    def unnamed(self) -> int:
        """How many more there are."""
        return len(not_passed(self.result)[MOST_NAMED:])

    @property
    def first_beyond(self) -> SiteError | None:
        """The first op that leaves the reference, if one does."""
        return None if self.result.sites is None else self.result.sites.first

    @property
    def twin(self) -> str:
        """The twin, in words."""
        return twin_words(self.result)

    @property
    def source(self) -> str:
        """The original, in words."""
        return source_words(self.result)

    @property
    def speed(self) -> str:
        """In words; empty if it was not measured."""
        return speed_words(self.result.speed) if self.result.speed else ""

    @property
    def reference(self) -> str:
        """What the worst positions are the worst against."""
        return LABELS["twin" if self.result.original is None else "original"]

    @property
    def comparison(self) -> Comparison | None:
        """With the original or, where there is none, with the dequantized reference."""
        return self.result.original or self.result.twin

    @property
    def logits(self) -> Table | None:
        """All that was measured, if there was a reference to run."""
        return logits_table(self.result) if sides_of(self.result) else None

    @property
    def itself(self) -> Table:
        """The artifact against itself."""
        return itself_table(self.result)

    @property
    def charts(self) -> list[Chart]:
        """All that can be drawn along the text and by layer."""
        return list(charts(self.result))

    @property
    def site_charts(self) -> list[Chart]:
        """Of the ops by layer, if they were looked at."""
        return [] if self.result.sites is None else list(site_chart(self.result.sites))

    @property
    def ops(self) -> BarTable | None:
        """The worst op of each kind."""
        if self.result.sites is None:
            return None
        header = ("op", "of its limit", "where it is worst", "tokens", "rms", "median")
        rows = op_bars(self.result.sites.errors)
        return BarTable(header, rows, (header[1], *header[3:]), "share of the limit")

    @property
    def costs(self) -> BarTable | None:
        """What each part costs."""
        numbers = ("KL, nats", "top-1 agreement")
        rows = cost_bars(self.result.layers or [])
        return BarTable(("part", *numbers), rows, numbers, "KL") if rows else None

    @property
    def suspects(self) -> Table | None:
        """What may explain a failure."""
        rows = [(suspect.site, suspect.evidence) for suspect in self.result.suspects or []]
        return Table("Suspects", ("op", "evidence"), rows) if rows else None

    @property
    def file(self) -> Table | None:
        """What a reference file told, if one was given."""
        found = self.result.reference
        return None if found is None else file_table(found)

    @property
    def sketches(self) -> Table | None:
        """What its sketches told of the weights."""
        found = self.result.reference
        return None if found is None else sketch_table(found)

    @property
    def prompts(self) -> BarTable | None:
        """The same prompt by prompt."""
        found = self.result.reference
        if found is None:
            return None
        return BarTable(("prompt", *PROMPT), prompt_bars(found.prompts), PROMPT, "mean KL")

    @property
    def file_charts(self) -> list[Chart]:
        """What can be drawn of it."""
        found = self.result.reference
        return [] if found is None else list(file_charts(found))

    @property
    def roles(self) -> BarTable | None:
        """The weight table by role, without what was stored as it was."""
        rounded = [error for error in self.result.weights or [] if error.max_steps != 0]
        numbers = ("tensors", "rms error", "worst")
        rows = role_bars(rounded)
        return (
            BarTable(("role", "stored as", *numbers), rows, numbers, "rms error") if rows else None
        )

    @property
    def exact_tensors(self) -> int:
        """How many were stored as they were."""
        return sum(error.max_steps == 0 for error in self.result.weights or [])


def _cost(c: Comparison | AgainstFile) -> Iterator[str]:
    by = ", by the reference file" if isinstance(c, AgainstFile) else ""
    yield (
        f"Compression cost {number(c.kl.mean)} ± {c.kl.standard_error:.1g} nats of KL per token"
        f"{by}; the most likely token is the same at {percent(c.agreement.top1)} of the positions."
    )
    if c.likelihood is not None:
        before, after = c.likelihood.perplexity, c.likelihood.perplexity_candidate
        yield f"Perplexity went from {before:.4g} to {after:.4g}."
