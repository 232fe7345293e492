"""Opens artifacts for `rgexport generate`, `chat` and `state`, with remarks for the user."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.opening import open_artifact
from rgexport.chat import model as models
from rgexport.chat.jobs import GenerationJob, GenerationRequest, require_ids
from rgexport.chat.model import Model
from rgexport.chat.reading import Reading, show_reading
from rgexport.chat.reply import ModelReply, ReplyOptions
from rgexport.chat.state_file import key_of
from rgexport.errors import RequestError
from rgexport.progress import detail, note, warn
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session, SessionInfo, block_size
from rgexport.units import amount

_ID = re.compile("[0-9]{1,20}")
"""A token id on the command line; Python refuses to convert numbers of thousands of digits."""


def open_model(
    path: Path | str, *, chat: bool, allow_foreign: bool = False, **options: Any
) -> Model:
    """Opens an artifact as `model.open_model` does, with warnings for the user."""
    artifact = _open(path, allow_foreign)
    if chat and artifact.manifest.instruction_tuned is False:
        warn(
            f"{artifact.manifest.name} is a base model: it continues text, but answers poorly; "
            f"try rgexport generate {path} -p TEXT"
        )
    model = models.open_model(artifact, **options)
    model.shows_reading = True
    _log_session(model.info)
    if chat:
        model.require_chat()
    return model


def continued_ids(model: Model, text: str, state: Path | None) -> list[int]:
    """Returns the tokens of a plain text, after the tokens of a state file if it has them."""
    saved = None if state is None else model.load_state(state)
    if saved and saved.messages is not None:
        note(f"{state} is of a chat, whose template only `rgexport chat --load-state` applies")
    if saved and saved.tokens is not None:
        return [*saved.tokens.tolist(), *model.tokenizer.encode_text(text)]
    ids = model.text_ids(text)
    if saved and key_of(ids[: saved.position]) != saved.key:
        raise RequestError(
            f"{state} stores a hash of its text, not the text; the prompt must begin with "
            "that text, which is not read again (--prompt-file FILE takes a long one)"
        )
    return ids


def continue_ids(
    path: Path | str, ids: str, options: ReplyOptions, threads: int | None, allow_foreign: bool
) -> Iterator[int]:
    """Yields the most tokens that `options` allow after ids such as `2,651,603`."""
    tokens = _parse_ids(ids)
    artifact = _open(path, allow_foreign)
    require_ids(tokens, artifact.manifest.config.vocab_size)  # NumPy fails on more than 64 bits
    session = open_session(artifact, threads=threads)
    _log_session(session.info)

    request = GenerationRequest(ids=tokens, listener=Reading(), sampling=options.sampling)
    job = GenerationJob(request)
    logits = _read_prompt(session, job)
    for remaining in reversed(range(options.max_new_tokens)):
        token = job.sampler(logits)
        yield token
        if remaining:
            logits = session.step(np.array([token], np.int64))[0]


def _parse_ids(ids: str) -> list[int]:
    numbers = ids.replace(",", " ").split()
    if not numbers or not all(map(_ID.fullmatch, numbers)):
        raise RequestError(f"--ids is {ids!r}; expected token ids such as 2,651,603")
    return [int(number) for number in numbers]


def _read_prompt(session: Session, job: GenerationJob) -> np.ndarray:
    """Reads the tokens of a job, and shows the progress; returns the last logits [vocab]."""
    prompt = np.array([job.ids], np.int64)
    size = block_size(session)
    logits = np.zeros(0)

    def read(seconds: float) -> bool:
        nonlocal logits
        end = time.monotonic() + seconds
        while job.fed < len(job.ids) and time.monotonic() < end:
            logits = session.prefill(prompt[:, job.fed : job.fed + size])[0, -1]
            job.fed += size
        return job.fed >= len(job.ids)

    show_reading(job, read)
    return logits


def summary(reply: ModelReply) -> str:
    """Returns a line with the numbers of tokens of a reply, and their speed."""
    read = reply.prompt_tokens - reply.cached_tokens
    known = ""
    if reply.cached_tokens:
        known = f" ({reply.cached_tokens} more were read before)"
    cut = ""
    if reply.reason == "length":
        cut = "; cut at --max-new-tokens"
    return (
        f"{read} prompt tokens{known} at {reply.read_rate:.1f}/s, "
        f"{reply.new_tokens} new tokens at {reply.write_rate:.1f}/s{cut}"
    )


def _open(path: Path | str, allow_foreign: bool) -> Artifact:
    artifact = open_artifact(path, allow_foreign=allow_foreign)
    check = artifact.manifest.check
    if check.status == "unverified":
        warn(f"what {path} says may be wrong. {check.sentence}")
    return artifact


def _log_session(info: SessionInfo) -> None:
    detail(
        f"{info.title}, {info.threads} threads; one step reads "
        f"{amount(info.weight_bytes)} of weights and {amount(info.state_bytes)} of state"
    )
