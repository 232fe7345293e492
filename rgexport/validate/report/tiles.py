"""The five numbers of an artifact that matter most, and what each says."""

from collections.abc import Iterator
from dataclasses import dataclass

from rgexport.progress import amount
from rgexport.validate.report.report_words import number, percent
from rgexport.validate.result import Result


@dataclass(frozen=True)
class Tile:
    """A number; `side` is what it was measured against, and gives the tile its colour."""

    label: str
    value: str
    told: str
    side: str = ""


def tiles(r: Result) -> Iterator[Tile]:
    """Size, the cost of compression in three ways, and how exactly the artifact computes."""
    stored = f"{r.artifact.bits_per_weight:.2f} bits per weight"
    yield Tile("size", amount(r.artifact.bytes), stored)
    if cost := r.original or r.reference:
        error = f"± {cost.kl.standard_error:.1g} nats per token, to the original"
        yield Tile("KL", number(cost.kl.mean), error, "original")
        same = "positions with the original's most likely token"
        yield Tile("top-1 agreement", percent(cost.agreement.top1), same, "original")
        if found := cost.likelihood:
            from_to = f"from {found.perplexity:.4g} to {found.perplexity_candidate:.4g}"
            more = 100 * (found.perplexity_candidate / found.perplexity - 1)
            yield Tile("perplexity", f"{more:+.2g} %", from_to, "original")
    if r.twin is not None:
        limit = r.tolerance.at(r.text.tokens).rms
        told = f"to the dequantized reference, limit {number(limit)}"
        yield Tile("RMS logit error", number(r.twin.logits.relative_rms), told, "twin")
