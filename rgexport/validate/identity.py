"""The items by which an artifact's identity is judged: short texts by their names."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rgexport.validate.checks import Check

IdentityOutcome = Literal["same", "asked for", "differs", "not compared"]
_RANK: dict[IdentityOutcome, int] = {"differs": 3, "asked for": 2, "same": 1, "not compared": 0}
"""An item that is compared twice has the outcome of the higher rank."""

_MOST_NAMED = 6
"""Longer lists of names are cut."""


@dataclass(frozen=True)
class IdentityItem:
    """One property that identifies a model, of an artifact and of what it is compared with.

    Values are in words, null where there is none or nothing is known. The outcome is `asked for` if
    the manifest says that the export was asked for the difference.
    """

    name: str
    artifact: str | None
    expected: str | None
    outcome: IdentityOutcome
    reason: str

    @property
    def sentence(self) -> str:
        """Such as `window: 64, asked for at the export (the original has 128)`."""
        artifact = _value_text(self.artifact)
        expected = _value_text(self.expected)
        note = ""
        if self.outcome == "asked for":
            note = ", asked for at the export"
        return f"{self.name}: {artifact}{note} ({self.reason} {expected})"


def _value_text(value: str | None) -> str:
    return "none" if value is None else value


def compared(
    name: str, artifact: str | None, expected: str | None, reason: str, asked_for: bool = False
) -> IdentityItem:
    """Returns the item of two values; a difference may have been asked for at the export."""
    outcome: IdentityOutcome
    if artifact == expected:
        outcome = "same"
    elif asked_for:
        outcome = "asked for"
    else:
        outcome = "differs"
    return IdentityItem(name, artifact, expected, outcome, reason)


def not_compared(name: str, artifact: str | None, reason: str) -> IdentityItem:
    """Returns the item of a value that has nothing to be compared with."""
    return IdentityItem(name, artifact, None, "not compared", reason)


def merge_items(items: Iterable[IdentityItem]) -> tuple[IdentityItem, ...]:
    """Keeps one item of each name: the first of the highest rank."""
    chosen: dict[str, IdentityItem] = {}
    for item in items:
        before = chosen.get(item.name)
        if before is None or _RANK[item.outcome] > _RANK[before.outcome]:
            chosen[item.name] = item
    return tuple(chosen.values())


def identity_checks(items: Sequence[IdentityItem]) -> Iterator[Check]:
    """Yields a failed check for each item that differs, or one passed check for all of them."""
    wrong = [item for item in items if item.outcome == "differs"]
    for item in wrong:
        name = f"identity.{item.name}"
        yield Check(name=name, value=1, limit=0, reason=item.sentence, kind="identity")
    if not wrong:
        yield Check(name="identity", value=0, limit=0, reason=summary(items))


def summary(items: Sequence[IdentityItem]) -> str:
    """Names the items that were asked for, differ, or could not be compared, in one line."""
    sentences = [item.sentence for item in items if item.outcome == "asked for"]
    same = sum(item.outcome == "same" for item in items)
    if same:
        sentences.append(f"{same} items as expected (configuration, tokenizer, settings, files)")
    for outcome in ("differs", "not compared"):
        names = [item.name for item in items if item.outcome == outcome]
        if names:
            sentences.append(f"{outcome}: {first_names(names)}")
    return "; ".join(sentences)


def first_names(names: Sequence[str]) -> str:
    """Lists the first few names, and counts the others."""
    text = ", ".join(names[:_MOST_NAMED])
    hidden = len(names) - _MOST_NAMED
    if hidden > 0:
        text += f" and {hidden} more"
    return text
