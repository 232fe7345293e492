"""Answers the three kinds of requests of lm_eval with a session.

The tokens that are read and scored are those of lm_eval's own `HFLM`, except that no text is cut:
the state has the same size after any number of tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.evaluate.harness.generations import Generations, GreedyReply
from rgexport.evaluate.harness.prefixes import Likelihoods, ScoredText
from rgexport.evaluate.pieces import Result
from rgexport.runtimes.session import Session

ROLLING, GENERATION = "loglikelihood_rolling", "generate_until"


@dataclass(frozen=True)
class LmRequest:
    """A request of lm_eval: its kind, and its arguments as JSON.

    | kind | arguments | answer |
    |---|---|---|
    | `loglikelihood` | context, continuation | log-likelihood, whether it is the likeliest |
    | `loglikelihood_rolling` | text | log-likelihood |
    | `generate_until` | context, settings | text |
    """

    kind: str
    arguments: str

    @classmethod
    def of(cls, kind: str, *arguments: Any) -> "LmRequest":
        """Makes a request with these arguments."""
        return cls(kind, json.dumps(arguments))

    @cached_property
    def values(self) -> list[Any]:
        """The arguments."""
        values: list[Any] = json.loads(self.arguments)
        return values


def sha256_of(requests: Sequence[LmRequest]) -> str:
    """Returns a hash of requests."""
    text = json.dumps([[request.kind, request.arguments] for request in requests])
    return hashlib.sha256(text.encode()).hexdigest()


def answer(tokenizer: Tokenizer, session: Session, requests: Sequence[LmRequest]) -> Result:
    """Returns the answers in the order of the requests, the tokens read, and the total of tokens.

    The session reads fewer tokens than the total where requests have a common prefix.

    Raises:
        RequestError: the model's logits are NaN or infinite, or a request has no answer.
    """
    generated = [i for i, request in enumerate(requests) if request.kind == GENERATION]
    judged = [i for i, request in enumerate(requests) if request.kind != GENERATION]
    scored = [_scored_text(tokenizer, requests[i]) for i in judged]
    contexts = [
        tuple(encoded(tokenizer, requests[i].values[0]) or [_first(tokenizer)]) for i in generated
    ]
    replies = [GreedyReply(tokenizer, requests[i].values[1]) for i in generated]
    likelihoods = Likelihoods(session, scored)
    generations = Generations(session, contexts, replies)
    likelihoods.run()
    generations.run()
    answers: list[Any] = [None] * len(requests)
    for i, reply in zip(generated, replies, strict=True):
        answers[i] = reply.text
    for index, i in enumerate(judged):
        log, likeliest = -float(likelihoods.nats[index]), bool(likelihoods.likeliest[index])
        answers[i] = log if requests[i].kind == ROLLING else [log, likeliest]
    return {
        "answers": answers,
        "read": likelihoods.read + generations.read,
        "asked": sum(len(text.ids) for text in scored) + sum(map(len, contexts)),
    }


def _scored_text(tokenizer: Tokenizer, request: LmRequest) -> ScoredText:
    """Returns the ids to read and the targets.

    Raises:
        RequestError: the text to be judged has no tokens.
    """
    if request.kind == ROLLING:
        # Like HFLM, the text's own bos is a target, too.
        before, after = [_first(tokenizer)], encoded(tokenizer, request.values[0])
    else:
        before, after = _pair(tokenizer, *request.values)
    if not after:
        raise RequestError(
            f"a task asks how likely an empty text is, after {request.values[0][-40:]!r}; correct "
            "its documents, or choose another --task"
        )
    return ScoredText((*before, *after[:-1]), tuple(after))


def _pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes both; spaces at the end of the context become part of the continuation."""
    text, context = context + continuation, context.rstrip()
    if context:
        before = encoded(tokenizer, context)
        return before, encoded(tokenizer, text)[len(before) :]
    first, after = _first(tokenizer), _plain(tokenizer, text)
    return ([first], after) if after[:1] != [first] else (after[:1], after[1:])


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns bos and the ids of a text; literals of special tokens become their ids.

    There is one bos, also if the text begins with its literal.
    """
    bos, ids = tokenizer.bos_id, _plain(tokenizer, text)
    literal = tokenizer.literal(bos)
    return ids if bos is None or (literal and text.startswith(literal)) else [bos, *ids]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_markup(text.encode(errors="replace").decode())


def _first(tokenizer: Tokenizer) -> int:
    """Returns the token in front of an empty context: the bos, or else the eos.

    Raises:
        RequestError: the vocabulary has neither.
    """
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return token
    raise RequestError("the tokenizer has neither a bos nor an eos, which the suite tasks needs")
