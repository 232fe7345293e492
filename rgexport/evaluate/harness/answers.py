"""Answers the three kinds of requests of lm_eval, with a session.

What a model reads, and what counts, is that of lm_eval's own `HFLM`, but for one thing: nothing is
cut to a greatest length, since the state has the same size after any number of tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.evaluate.harness.generations import Generations, Reply
from rgexport.evaluate.harness.likelihoods import Likelihoods, Scored
from rgexport.evaluate.pieces import Result
from rgexport.runtimes.session import Session

ROLLING, GENERATION = "loglikelihood_rolling", "generate_until"


@dataclass(frozen=True)
class Asked:
    """A request: its kind, and its arguments as JSON.

    | kind | arguments | answer |
    |---|---|---|
    | `loglikelihood` | context, continuation | log likelihood, and whether it is the likeliest |
    | `loglikelihood_rolling` | text | log likelihood |
    | `generate_until` | context, settings | text |
    """

    kind: str
    arguments: str

    @classmethod
    def of(cls, kind: str, *arguments: Any) -> "Asked":
        """A request with these arguments."""
        return cls(kind, json.dumps(arguments))

    @cached_property
    def given(self) -> list[Any]:
        """The arguments."""
        found: list[Any] = json.loads(self.arguments)
        return found


def sha256_of(asked: Sequence[Asked]) -> str:
    """A hash of requests."""
    return hashlib.sha256(json.dumps([[a.kind, a.arguments] for a in asked]).encode()).hexdigest()


def answered(tokenizer: Tokenizer, session: Session, asked: Sequence[Asked]) -> Result:
    """The answers in the order of the requests; tokens that were read, and that there were to read.

    Raises:
        RequestError: the model's logits are NaN or infinite, or it cannot do what is asked.
    """
    written = [place for place, one in enumerate(asked) if one.kind == GENERATION]
    judged = [place for place, one in enumerate(asked) if one.kind != GENERATION]
    scored = [_scored(tokenizer, asked[place]) for place in judged]
    contexts = [_context(tokenizer, asked[place].given[0]) for place in written]
    replies = [Reply(tokenizer, asked[place].given[1]) for place in written]
    likelihoods = Likelihoods(session, scored)
    generations = Generations(session, contexts, replies)
    likelihoods.run()
    generations.run()
    answers: dict[int, Any] = {}
    for place, reply in zip(written, replies, strict=True):
        answers[place] = reply.text
    for index, place in enumerate(judged):
        log, likeliest = -float(likelihoods.nats[index]), bool(likelihoods.likeliest[index])
        answers[place] = log if asked[place].kind == ROLLING else [log, likeliest]
    return {
        "answers": [answers[place] for place in range(len(asked))],
        "read": likelihoods.read + generations.read,
        "asked": sum(len(one.ids) for one in scored) + sum(map(len, contexts)),
    }


def _context(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(encoded(tokenizer, text) or [_first(tokenizer)])


def _scored(tokenizer: Tokenizer, asked: Asked) -> Scored:
    """What is to be read, and expected.

    Raises:
        RequestError: what is to be judged has no tokens.
    """
    if asked.kind == ROLLING:
        # A bos is expected too, after the one before everything: so does HFLM.
        before, after = [_first(tokenizer)], encoded(tokenizer, asked.given[0])
    else:
        before, after = _pair(tokenizer, *asked.given)
    if not after:
        raise RequestError(
            f"a task asks how likely an empty text is, after {asked.given[0][-40:]!r}; correct its "
            "documents, or choose another --task"
        )
    return Scored((*before, *after[:-1]), tuple(after))


def _pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of both; spaces at the end of the context belong to what follows."""
    text, context = context + continuation, context.rstrip()
    if context:
        before = encoded(tokenizer, context)
        return before, encoded(tokenizer, text)[len(before) :]
    first, after = _first(tokenizer), _plain(tokenizer, text)
    return ([first], after) if after[:1] != [first] else (after[:1], after[1:])


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text after a bos, unless it begins with one; literals are special tokens."""
    bos, ids = tokenizer.bos_id, _plain(tokenizer, text)
    literal = tokenizer.literal(bos)
    return ids if bos is None or (literal and text.startswith(literal)) else [bos, *ids]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_markup(text.encode(errors="replace").decode())


def _first(tokenizer: Tokenizer) -> int:
    """What stands before a text that nothing else stands before.

    Raises:
        RequestError: the vocabulary has neither a bos nor an eos.
    """
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return token
    raise RequestError("the tokenizer has neither a bos nor an eos, which the suite tasks needs")
