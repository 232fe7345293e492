"""The items by which an artifact's identity is judged, and the checks that follow from them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rgexport.validate.checks import Check

IdentityOutcome = Literal["same", "asked for", "differs", "not compared"]
_RANK: dict[IdentityOutcome, int] = {"differs": 3, "asked for": 2, "same": 1, "not compared": 0}
"""An item that is compared twice has the outcome of the higher rank."""

_MOST_NAMED = 6


@dataclass(frozen=True, kw_only=True)
class IdentityItem:
    """One property that identifies a model, of an artifact and of what it is compared with.

    Attributes:
        name: such as `window`, `tokenizer.json` or `tokenization`.
        artifact: the artifact's value, in words; null where it has none.
        expected: the value that it should have; null where that is none, or nothing is known.
        outcome: `asked for` if the manifest says that the export was asked for the difference.
        reason: what `expected` is, or why nothing was compared.
    """

    name: str
    artifact: str | None
    expected: str | None
    outcome: IdentityOutcome
    reason: str

    @property
    def sentence(self) -> str:
        """Such as `window: 64, asked for at the export (the original has 128)`."""
        ours, theirs = ("none" if one is None else one for one in (self.artifact, self.expected))
        note = ", asked for at the export" if self.outcome == "asked for" else ""
        return f"{self.name}: {ours}{note} ({self.reason} {theirs})"


def compared(
    name: str, artifact: str | None, expected: str | None, reason: str, asked_for: bool = False
) -> IdentityItem:
    """Makes an item; its outcome follows from the two values."""
    outcome: IdentityOutcome = "asked for" if asked_for else "differs"
    return IdentityItem(
        name=name,
        artifact=artifact,
        expected=expected,
        outcome="same" if artifact == expected else outcome,
        reason=reason,
    )


def not_compared(name: str, artifact: str | None, reason: str) -> IdentityItem:
    """An item for which nothing is known to compare with."""
    return IdentityItem(
        name=name, artifact=artifact, expected=None, outcome="not compared", reason=reason
    )


def merge_items(items: Iterable[IdentityItem]) -> tuple[IdentityItem, ...]:
    """Keeps one item of each name: the first of the highest rank."""
    chosen: dict[str, IdentityItem] = {}
    for item in items:
        before = chosen.get(item.name)
        if before is None or _RANK[item.outcome] > _RANK[before.outcome]:
            chosen[item.name] = item
    return tuple(chosen.values())


def identity_checks(items: Sequence[IdentityItem]) -> Iterator[Check]:
    """A check for each item that differs, or one that passes."""
    wrong = [item for item in items if item.outcome == "differs"]
    for item in wrong:
        name = f"identity.{item.name}"
        yield Check(name=name, value=1, limit=0, reason=item.sentence, kind="identity")
    if not wrong:
        yield Check(name="identity", value=0, limit=0, reason=summary(items))


def summary(items: Sequence[IdentityItem]) -> str:
    """Names the items that were asked for, differ, or could not be compared, in one line."""
    by_outcome = {rank: [item for item in items if item.outcome == rank] for rank in _RANK}
    sentences = [item.sentence for item in by_outcome["asked for"]]
    if same := by_outcome["same"]:
        count = f"{len(same)} items as expected"
        sentences.append(f"{count} (configuration, tokenizer, settings, files)")
    named: tuple[IdentityOutcome, ...] = ("differs", "not compared")
    names = {outcome: [item.name for item in by_outcome[outcome]] for outcome in named}
    sentences += [f"{outcome}: {first_names(some)}" for outcome, some in names.items() if some]
    return "; ".join(sentences)


def first_names(names: Sequence[str]) -> str:
    """The first of some names, and how many follow."""
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + rest
