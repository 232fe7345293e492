"""Greedy continuations: a session's own, and beside them what a reference file has."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.runtimes.session import Session
from rgexport.validate.positions import TokenText
from rgexport.validate.reference.reference_file import ReferenceFile

SHOWN = 2
"""Prompts that are continued: the first of a file that qualify."""
LEAST_TOKENS, MOST_TOKENS = 16, 32
"""Length of a continuation: fewer are not worth reading, more cost time."""
MOST_PROMPT = 128
"""Tokens of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Each model's own most likely tokens after a prompt; the first `common` are the same."""

    name: str
    prompt: str
    reference: str
    artifact: str
    tokens: int
    common: int


def continuations(
    session: Session, reference: ReferenceFile, spell: TokenText
) -> Iterator[Continuation]:
    """Continues some prompts of a reference file, which has the reference's continuations.

    Args:
        session: the artifact's; its state is reset.
        reference: the file.
        spell: writes the text of ids.
    """
    chosen = [
        (index, prompt.name, reference.tokens[span])
        for index, prompt, span in reference.spans()
        if prompt.greedy_tokens >= LEAST_TOKENS and 1 < prompt.tokens <= MOST_PROMPT
    ]
    for index, name, tokens in chosen[:SHOWN]:
        theirs = reference.greedy(index)[:MOST_TOKENS]
        session.reset()
        ours = greedy_tokens(session, session.prefill(tokens[None])[0, -1], len(theirs))
        yield Continuation(
            name=name,
            prompt=spell(tokens[1:].tolist()),  # without the token that begins every text
            reference=spell(theirs.tolist()),
            artifact=spell(ours.tolist()),
            tokens=len(theirs),
            common=int(np.cumprod(ours == theirs).sum()),
        )


def greedy_tokens(session: Session, logits: np.ndarray, count: int) -> np.ndarray:
    """The most likely tokens [count] after the session's state, whose last logits are [vocab]."""
    chosen = [int(logits.argmax())]
    while len(chosen) < count:
        chosen.append(int(session.step(np.array(chosen[-1:], np.int64))[0].argmax()))
    return np.array(chosen, np.int64)
