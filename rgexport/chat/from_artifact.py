"""Opening an artifact for `rgexport generate`, `chat` and `state`, with words for a person."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat.model import Model
from rgexport.chat.model import open_model as model_of
from rgexport.chat.reply import Reply
from rgexport.chat.sampling import Sampler, Sampling
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.opening import open_artifact
from rgexport.progress import detail, warn
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import SessionInfo
from rgexport.units import amount

_DIGITS = 20
"""The most digits of a token id that an error shows."""


def open_model(path: Path, *, chat: bool, allow_foreign: bool = False, **options: Any) -> Model:
    """Opens an artifact; for `options` see `model.open_model`.

    Warns if the self-check of its export failed, or if it shall `chat` and was not tuned for that.

    Raises:
        RequestError: no sound artifact, or a tokenizer that is missing or has no turn tokens.
    """
    artifact = _open(path, allow_foreign)
    if chat and artifact.manifest.instruction_tuned is False:
        warn(
            f"{artifact.manifest.name} is a base model: it continues text, but answers poorly; "
            f"try rgexport generate {path} -p TEXT"
        )
    model = model_of(artifact, **options)
    _tell(model.info)
    if chat:
        model.require_chat()
    return model


def continue_ids(
    path: Path,
    ids: str,
    sampling: Sampling,
    max_new_tokens: int,
    threads: int | None,
    *,
    allow_foreign: bool = False,
) -> Iterator[int]:
    """Continues ids such as `2,651,603`; no token ends that early.

    Raises:
        RequestError: no sound artifact, or no ids.
    """
    words = ids.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise RequestError(f"--ids is {ids!r}; expected token ids such as 2,651,603")
    if longest := max((n for n in map(len, words) if n > _DIGITS), default=0):
        raise RequestError(f"--ids has a number of {longest} digits; expected token ids")
    artifact, numbers = _open(path, allow_foreign), list(map(int, words))
    size = artifact.manifest.config.vocab_size
    if max(numbers) >= size:  # before NumPy sees a number that has more than 64 bits
        raise RequestError(f"token id {max(numbers)} is outside of the vocabulary of {size}")
    prompt = np.array([numbers], np.int64)
    session = open_session(artifact, threads=threads)
    _tell(session.info)
    sampler = Sampler(sampling, prompt[0].tolist())
    token = sampler(session.prefill(prompt)[0, -1])
    for left in reversed(range(max_new_tokens)):
        yield token
        if left:
            token = sampler(session.step(np.array([token], np.int64))[0])


def summary(reply: Reply) -> str:
    """The speed of a reply, in one line."""
    read = reply.prompt_tokens - reply.cached_tokens
    known = f" ({reply.cached_tokens} more were known)" if reply.cached_tokens else ""
    cut = "; cut at --max-new-tokens" if reply.reason == "length" else ""
    return (
        f"{read} prompt tokens{known} at {reply.read_rate:.1f}/s, "
        f"{reply.new_tokens} new tokens at {reply.write_rate:.1f}/s{cut}"
    )


def _open(path: Path, allow_foreign: bool) -> Artifact:
    """Opens an artifact; warns if the self-check of its export failed."""
    artifact = open_artifact(path, allow_foreign=allow_foreign)
    if (found := artifact.manifest.check).status == "unverified":
        warn(f"what {path} says may be wrong. {found.sentence}")
    return artifact


def _tell(info: SessionInfo) -> None:
    detail(
        f"{info.title}, {info.threads} threads; one step reads "
        f"{amount(info.weight_bytes)} of weights and {amount(info.state_bytes)} of state"
    )
