"""A process of low priority for long texts and bodies.

Parsing megabytes takes seconds, and holds the interpreter's lock, which each step needs.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from rgexport.artifacts.manifest import Identity, identity_of
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.artifact_text import open_template, open_tokenizer
from rgexport.chat.jobs import EngineError
from rgexport.chat.prompts import PromptEncoder
from rgexport.errors import RequestError
from rgexport.progress import warn
from rgexport.serve.errors import TooLong

_CALL_SECONDS = 120.0
_NICE = 10


class TextProcess:
    """The process: it starts at the first call, and runs one call at a time."""

    def __init__(self, openers: Mapping[str, Callable[[], PromptEncoder]]) -> None:
        self._openers = dict(openers)
        self._turn = threading.Lock()
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._closed = False

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns `function(*args)`, all picklable; raises TooLong, and ends a slow process."""
        with self._turn:
            try:
                is_error, result = self._exchange(function, args)
            except (EOFError, OSError):
                self._end()
                raise EngineError("the process for long texts ended; memory may be full") from None
            except TooLong:
                self._end()
                raise
        if is_error:
            raise result
        return result

    def close(self) -> None:
        self._closed = True
        if self._process:
            self._process.kill()

    def _exchange(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
        if self._closed:
            raise RequestError("the server ends")
        connection = self._connection or self._start()
        connection.send((function, args))
        if not connection.poll(_CALL_SECONDS):
            raise TooLong(
                f"the text takes longer than {_CALL_SECONDS:g} s to read; send less at once"
            )
        answer: tuple[bool, Any] = connection.recv()
        return answer

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._openers), name="long texts", daemon=True
        )
        self._process.start()
        theirs.close()  # so that a process that has ended is noticed
        return self._connection

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.join()
        if self._connection:
            self._connection.close()
        self._process = self._connection = None


def open_encoder(path: Path, identity: Identity, most_tokens: int) -> PromptEncoder:
    """Opens the encoder of an artifact, if it is `identity`, without its weights."""
    artifact = open_artifact(path)
    tokenizer, template = open_tokenizer(artifact), open_template(artifact)
    if identity_of(artifact.manifest, template.source) != identity:
        raise EngineError(f"{path} changed while it was open; start the server again")
    encoder = PromptEncoder(tokenizer, template, known=lambda ids, namespace: 0)
    encoder.most_tokens = most_tokens
    return encoder


def with_encoder(name: str, function: Callable[..., Any], *args: Any) -> Any:
    return function(_encoder(name), *args)


_openers: dict[str, Callable[[], PromptEncoder]] = {}


@functools.cache
def _encoder(name: str) -> PromptEncoder:
    return _openers[name]()


def _serve(connection: Connection, openers: dict[str, Callable[[], PromptEncoder]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this
    if hasattr(os, "nice"):
        os.nice(_NICE)
    _openers.update(openers)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(function, args))


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return False, function(*args)
    except RequestError as error:
        return True, error
    except Exception as error:
        warn(f"the process for long texts: {type(error).__name__}")
        return True, EngineError(f"the process for long texts: {type(error).__name__}")
