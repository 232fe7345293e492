"""Answers side by side: greedy continuations by an artifact and by its reference.

Without a reference file, only a small original continues prompts: a larger one would be read once
for each token.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State, zero_state
from rgexport.progress import task
from rgexport.runtimes.session import Session
from rgexport.validate.measure import TokenText
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.reference_pass import ReferenceModel
from rgexport.validate.text import short_prompts

LEAST_TOKENS = 16
"""Shorter continuations in a file are skipped: they say little."""
MOST_TOKENS = 24
"""Longer continuations in a file are cut: they cost time."""
_MOST_PROMPTS = 3
"""Prompts of a file that are continued."""
_MOST_PROMPT_TOKENS = 128
"""Longer prompts of a file are not continued."""
SMALL_BYTES = 1 << 30
"""Float32 bytes of an original that continues prompts."""

ContinuedPrompt = tuple[str, np.ndarray, np.ndarray]
"""A prompt's name and ids [n], and the ids [m] of the reference's greedy continuation."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Each model's own most likely tokens after a prompt; the first `common` are the same.

    `shared` is their text. The next tokens are the first that differ; their texts may be empty.
    """

    name: str
    prompt: str
    reference: str
    artifact: str
    tokens: int
    common: int
    shared: str = ""
    reference_next: str = ""
    artifact_next: str = ""


def read_prompts(reference: ReferenceFile) -> list[ContinuedPrompt]:
    """Returns the file's first few short prompts with a continuation that is long enough."""
    prompts: list[ContinuedPrompt] = []
    for index, prompt, span in reference.spans():
        if len(prompts) == _MOST_PROMPTS:
            break
        is_short = 1 < prompt.tokens <= _MOST_PROMPT_TOKENS
        if is_short and prompt.greedy_tokens >= LEAST_TOKENS:
            greedy = reference.greedy(index)[:MOST_TOKENS]
            prompts.append((prompt.name, reference.tokens[span], greedy))
    return prompts


def continue_prompts(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[ContinuedPrompt]:
    """Continues built-in prompts; the model's weights stay in memory meanwhile."""
    model = NumpyReference(checkpoint.config, checkpoint.weights, keep=True)
    prompts = short_prompts(tokenizer)
    inputs = [(prompt.tokens[None], zero_state(model.config, 1)) for prompt in prompts]

    hidden = []
    states = []
    for last_hidden, prompt_states in model.run_each(inputs):
        hidden.append(last_hidden)
        states.append(prompt_states[-1])

    greedy = continue_greedily(model, hidden, states, MOST_TOKENS, tokenizer.stop_ids)
    continued = []
    for prompt, ids in zip(prompts, greedy, strict=True):
        continued.append((prompt.name, prompt.tokens, np.array(ids, np.int64)))
    return continued


def continue_greedily(
    model: ReferenceModel,
    hidden: Sequence[Any],
    ends: Sequence[State],
    count: int,
    stop_ids: Collection[int],
) -> list[list[int]]:
    """Continues texts, [1, T, width] each, in one batch by up to `count` tokens or a stop id."""
    state = {name: np.concatenate([end[name] for end in ends]) for name in ends[0]}
    following = [int(model.logits(last[:, -1:])[0, -1].argmax()) for last in hidden]
    continued = [[token] for token in following]
    with task("Continuing greedily", count, "tokens") as advance:
        for _ in range(count - 1):
            last, state = model.run(np.array(following, np.int64)[:, None], state)
            following = model.logits(last)[:, -1].argmax(1).tolist()
            for ids, token in zip(continued, following, strict=True):
                if ids[-1] not in stop_ids:
                    ids.append(token)
            advance(1)
    return continued


def compare(
    session: Session, prompts: Sequence[ContinuedPrompt], spell: TokenText
) -> Iterator[Continuation]:
    """Resets a session and continues prompts of more than one token."""
    for name, tokens, expected in prompts:
        chosen = _continue_in_session(session, tokens, len(expected))
        common = int(np.cumprod(np.array(chosen) == expected).sum())
        next_token = slice(common, common + 1)
        yield Continuation(
            name=name,
            prompt=spell(tokens[1:].tolist()),  # without the bos
            reference=spell(expected.tolist()),
            artifact=spell(chosen),
            tokens=len(expected),
            common=common,
            shared=spell(chosen[:common]),
            reference_next=spell(expected[next_token].tolist()),
            artifact_next=spell(chosen[next_token]),
        )


def _continue_in_session(session: Session, tokens: np.ndarray, count: int) -> list[int]:
    """Returns the `count` tokens that a session chooses greedily after a prompt [n]."""
    session.reset()
    logits = session.prefill(tokens[None])[0, -1]
    chosen = [int(logits.argmax())]
    while len(chosen) < count:
        logits = session.step(np.array(chosen[-1:], np.int64))[0]
        chosen.append(int(logits.argmax()))
    return chosen
