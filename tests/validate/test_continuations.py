"""What a reference file and an artifact write after the same prompts."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from rgexport.griffin.state import State
from rgexport.validate.continuations import (
    LEAST_TOKENS,
    MOST_TOKENS,
    SHOWN,
    continuations,
    prompts_of_file,
    prompts_of_model,
)
from rgexport.validate.report.words import answers_of
from tests.models import make_config
from tests.validate.toys import ToyReference, ToySession, character_tokenizer


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


def test_each_model_continues_greedily():
    tokens = np.array([1, 5, 7, 2])
    reference = file_of(0, [("a", tokens, 20)])
    prompts = prompts_of_file(reference)
    (same,) = continuations(ToySession(0), prompts, spell)
    assert (same.prompt, same.tokens, same.common) == ("5 7 2", 20, 20)
    assert same.reference == same.artifact == spell(greedy(0, tokens, 20))
    (other,) = continuations(ToySession(1), prompts, spell)
    assert other.reference == same.reference
    assert other.artifact == spell(greedy(1, tokens, 20))
    pairs = list(zip(other.reference.split(), other.artifact.split(), strict=True))
    assert all(a == b for a, b in pairs[: other.common])
    assert other.common < 20 and pairs[other.common][0] != pairs[other.common][1]
    assert (other.reference_next, other.artifact_next) == pairs[other.common]
    for answer, text in zip(answers_of(other), (other.reference, other.artifact), strict=True):
        assert (
            answer.shared == other.shared and answer.shared.split() == text.split()[: other.common]
        )
        assert text.startswith(answer.shared) and text.endswith(answer.rest) and answer.differing


def test_short_continuations_are_left_out():
    tokens = np.array([1, 5])
    prompts = [("short", tokens, LEAST_TOKENS - 1), ("empty", tokens[:1], 32)]
    prompts += [(f"p{i}", tokens, 32) for i in range(SHOWN + 1)]
    found = prompts_of_file(file_of(0, prompts))
    assert [one.name for one in found] == [f"p{i}" for i in range(SHOWN)]


class WholeToy(ToyReference):
    """The toy with what continuing a batch takes."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.config = make_config("r", width=8, heads=1, lru_width=8, vocab_size=23)

    def run_each(self, texts: Any) -> list[tuple[np.ndarray, list[State]]]:
        found = (self.run(tokens) for tokens, _ in texts)
        return [(hidden, [state]) for hidden, state in found]


def test_a_small_original_continues_the_built_in_prompts():
    """All in one batch, as each alone."""
    model, tokenizer = WholeToy(3), character_tokenizer()
    prompts = prompts_of_model(model, tokenizer)
    assert [prompt.name for prompt in prompts] == ["prose", "code", "chat turns"]
    for prompt in prompts:
        assert prompt.tokens[0] == tokenizer.bos_id and len(prompt.greedy) == MOST_TOKENS
        np.testing.assert_array_equal(prompt.greedy, greedy(3, prompt.tokens, MOST_TOKENS))
