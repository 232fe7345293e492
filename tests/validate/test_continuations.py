"""What a reference file and an artifact write after the same prompts."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from rgexport.validate.continuations import LEAST_TOKENS, SHOWN, continuations
from tests.validate.toys import ToyReference, ToySession


def greedy(seed: int, tokens: np.ndarray, count: int) -> np.ndarray:
    """By one long pass for each token."""
    reference, found = ToyReference(seed), tokens
    for _ in range(count):
        hidden, _ = reference.run(found[None])
        found = np.append(found, reference.logits(hidden)[0, -1].argmax())
    return found[len(tokens) :]


def file_of(seed: int, prompts: list[tuple[str, np.ndarray, int]]) -> Any:
    """The part of a reference file that is asked for."""
    ends = np.cumsum([0, *(len(tokens) for _, tokens, _ in prompts)])
    records = [
        SimpleNamespace(name=name, tokens=len(tokens), greedy_tokens=count)
        for name, tokens, count in prompts
    ]
    texts = [greedy(seed, tokens, count) for _, tokens, count in prompts]
    return SimpleNamespace(
        tokens=np.concatenate([tokens for _, tokens, _ in prompts]),
        spans=lambda: (
            (i, record, slice(ends[i], ends[i + 1])) for i, record in enumerate(records)
        ),
        greedy=lambda index: texts[index],
    )


def spell(ids: Any) -> str:
    return " ".join(map(str, ids))


def test_each_model_continues_greedily() -> None:
    tokens = np.array([1, 5, 7, 2])
    reference = file_of(0, [("a", tokens, 20)])
    (same,) = continuations(ToySession(0), reference, spell)
    assert (same.prompt, same.tokens, same.common) == ("5 7 2", 20, 20)
    assert same.reference == same.artifact == spell(greedy(0, tokens, 20))
    (other,) = continuations(ToySession(1), reference, spell)
    assert other.reference == same.reference
    assert other.artifact == spell(greedy(1, tokens, 20))
    pairs = list(zip(other.reference.split(), other.artifact.split(), strict=True))
    assert all(a == b for a, b in pairs[: other.common])
    assert other.common < 20 and pairs[other.common][0] != pairs[other.common][1]


def test_short_continuations_are_left_out() -> None:
    tokens = np.array([1, 5])
    prompts = [("short", tokens, LEAST_TOKENS - 1), ("empty", tokens[:1], 32)]
    prompts += [(f"p{i}", tokens, 32) for i in range(SHOWN + 1)]
    found = list(continuations(ToySession(), file_of(0, prompts), spell))
    assert [one.name for one in found] == [f"p{i}" for i in range(SHOWN)]
