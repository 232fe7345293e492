"""Models that reply: the interface that the terminal, the server and Python share.

model = rgexport.load("demo-int4-onnx")
print(model.chat([{"role": "user", "content": "Hello"}]).text)
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Identity, artifact_hash, identity_of
from rgexport.artifacts.opening import open_artifact
from rgexport.chat import state_file
from rgexport.chat.artifact_text import open_template, open_tokenizer
from rgexport.chat.jobs import End, GenerationJob, GenerationOptions, GenerationRequest, require_ids
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import ChatTemplate, Message, PromptEncoder, PromptTokens
from rgexport.chat.reading import Reading, show_reading
from rgexport.chat.reply import (
    Deliver,
    Item,
    ModelReply,
    ReplyOptions,
    ReplyStream,
    ReplyWriter,
    TextPiece,
    reply_options,
)
from rgexport.chat.scheduler import Scheduler
from rgexport.chat.state_folder import StateFolder
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.progress import Listener, heard_by
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session, SessionInfo

CACHE_BYTES = 1 << 30
"""Default memory for states: 30 states of a 2B model."""

FOLDER_BYTES = 10 << 30
"""Default disk for states: 300 states of a 2B model."""

_UNWRITTEN_SHARE = 4
"""States that wait to be written take at most this fraction (1/4) of the memory for states."""


class Model(PromptEncoder):
    """An artifact in its engine, with the states of earlier prompts.

    Any thread may call any method.

    Attributes:
        identity: the model, its window and its template, for state files.
        info: facts about the engine.
        vocab_size: number of logits of the model.
        require_unchanged: raises RequestError if the artifact's files have changed.
        state_precision: of state files, fp32 or fp16; None for the engine's.
        shows_reading: whether progress is shown while this thread waits for a long prompt to be
            read.
        scheduler: runs the requests.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        identity: Identity,
        *,
        artifact: str = "",
        path: Path | None = None,
        rows: int = 1,
        max_waiting: int = 1024,
        lookup: bool = True,
        cache_bytes: int = CACHE_BYTES,
        state_folder: Path | None = None,
        folder_bytes: int = FOLDER_BYTES,
        state_precision: str | None = None,
    ) -> None:
        """Takes ownership of an engine; `load` opens one.

        `rows` conversations share a step. With `lookup`, drafts are checked where a text repeats
        itself, which changes only the speed. `state_folder` keeps states for the next start.
        `state_precision` is fp32 or fp16, of files; None for the engine's. `artifact` is a hash of
        the artifact at `path`, which `repr` names.
        """
        state_file.require_precision(state_precision)
        if rows < 1:
            raise RequestError(f"rows is {rows}; expected at least 1")
        self.identity = identity
        self.info = session.info
        self.vocab_size = session.vocab_size
        self.require_unchanged = session.require_unchanged
        self.state_precision = state_precision
        self.shows_reading = False
        self._path = path
        self._shapes = session.state_shapes
        self._numeric_identity = _numeric_identity(artifact, session.info, state_precision)
        self._uses_drafts = lookup and session.info.exact_tokens > 1

        folder = None
        if state_folder is not None:
            folder = StateFolder(
                state_folder,
                identity,
                self._shapes,
                artifact=self._numeric_identity,
                vocab_size=self.vocab_size,
                max_bytes=folder_bytes,
                waiting_bytes=cache_bytes // _UNWRITTEN_SHARE,
                precision=state_precision,
            )
        store = PrefixStore(cache_bytes, folder)
        super().__init__(tokenizer, template, store.length)
        self.scheduler = Scheduler(
            session, store, rows=rows, max_waiting=max_waiting, lookup=lookup
        )
        self._settling = ThreadPoolExecutor(1, thread_name_prefix="settling")
        """Reads the ends of finished turns, as `_settle` does."""

    def __repr__(self) -> str:
        return f"<Model {self._path or self.name} in {self.info.title}>"

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.identity.name

    def require_chat(self) -> None:
        """Raises RequestError if the template writes turns that the vocabulary does not have."""
        self.template.check_turns(self.tokenizer)

    def chat(self, messages: Sequence[Message], **options: Any) -> ModelReply:
        """Returns the reply to a conversation; options and errors are as in `stream`."""
        return self.stream(messages, **options).reply()

    def stream(self, messages: Sequence[Message], **options: Any) -> ReplyStream:
        """Returns the reply to a conversation, piece by piece.

        Messages have `role` and `content`; the last one is a user's. The options are fields of
        `Sampling` and `ReplyOptions`, such as `temperature` and `stop`. Raises RequestError if the
        template refuses the messages, or an option is outside its range.
        """
        return self.reply_to(messages, reply_options(**options))

    def reply_to(self, messages: Sequence[Message], options: ReplyOptions) -> ReplyStream:
        """Returns the reply to a conversation, piece by piece; raises as `stream` does."""
        prompt = self.conversation_prompt(messages, namespace=options.namespace)
        return ReplyStream(partial(self.start, prompt, options), shows_reading=self.shows_reading)

    def complete(self, text: str, **options: Any) -> ReplyStream:
        """Returns the continuation of a text, piece by piece; options are as in `stream`."""
        return self.continue_ids(self.text_ids(text), reply_options(**options))

    def continue_ids(self, ids: list[int], options: ReplyOptions) -> ReplyStream:
        """Returns the continuation of tokens, piece by piece."""
        start = partial(self.start, PromptTokens(ids), options)
        return ReplyStream(start, shows_reading=self.shows_reading)

    def draft_of(self, text: str) -> list[int]:
        """Returns the tokens of a text that replies may repeat; none if drafts are not used."""
        return self.encode(text) if self._uses_drafts else []

    async def astream(self, messages: Sequence[Message], **options: Any) -> AsyncIterator[str]:
        """Yields the pieces of a reply as `stream` does, for asyncio; closing it ends the reply."""
        chosen = reply_options(**options)
        prompt = self.conversation_prompt(messages, namespace=chosen.namespace)
        loop = asyncio.get_running_loop()
        items = asyncio.Queue[Item]()

        def deliver(item: Item) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed meanwhile
                loop.call_soon_threadsafe(items.put_nowait, item)

        job = self.start(prompt, chosen, deliver)
        try:
            while isinstance(item := await items.get(), TextPiece):
                yield item.text
            if isinstance(item, RequestError):
                raise item
        finally:
            job.cancel()

    def start(self, prompt: PromptTokens, options: ReplyOptions, deliver: Deliver) -> GenerationJob:
        """Starts a reply. Other threads pass its pieces and its end to `deliver`.

        Raises Busy if too many requests wait, RequestError for an empty prompt and unknown ids.
        """

        def deliver_settled(item: Item) -> None:
            if isinstance(item, ModelReply) and item.reason != "cancelled" and prompt.messages:
                with contextlib.suppress(RuntimeError):  # it is shut down while replies end
                    self._settling.submit(self._settle, prompt, options, item, deliver)
                    return
            deliver(item)

        writer = ReplyWriter(self.tokenizer, prompt.ids, options, deliver_settled)
        names = [option.name for option in fields(GenerationOptions)]
        generation_options = {name: getattr(options, name) for name in names}
        request = GenerationRequest(
            ids=prompt.ids,
            listener=writer,
            stop_ids=self.tokenizer.stop_ids,
            keep=prompt.keep,
            prompt_logits=writer.prompt if options.prompt_logprobs else None,
            lasting=prompt.messages is None,
            **generation_options,
        )
        return self.scheduler.submit(request)

    def read(
        self, ids: Sequence[int], *, client: str = "", namespace: str = "", first: bool = False
    ) -> Reading:
        """Reads tokens, so that prompts which begin with them go on from their state.

        Cancelling the future ends the reading. The options are those of `GenerationRequest`.
        """
        reading = Reading()
        request = GenerationRequest(
            ids=ids,
            listener=reading,
            max_new_tokens=0,
            client=client,
            namespace=namespace,
            first=first,
        )
        job = self.scheduler.submit(request)
        reading.job = job

        def cancel_job(future: Future[End]) -> None:
            if future.cancelled():
                job.cancel()

        reading.add_done_callback(cancel_job)
        return reading

    def state(self, ids: Sequence[int]) -> State:
        """Returns a copy of the canonical state of batch 1 (`griffin.state`) after these tokens.

        Raises RequestError if there are none, or the model was closed.
        """
        reading = self.read(ids)

        def has_ended(seconds: float) -> bool:
            return bool(wait([reading], seconds).done)

        try:
            if self.shows_reading:
                show_reading(reading.job, has_ended)
            return _copy_state(reading.result())
        finally:
            reading.cancel()  # an interrupted wait ends the reading

    async def astate(self, ids: Sequence[int], *, client: str = "", namespace: str = "") -> State:
        """Returns a copy of the state after these tokens as `state` does, for asyncio."""
        reading = self.read(ids, client=client, namespace=namespace)
        return _copy_state(await asyncio.wrap_future(reading))

    def save_state(
        self,
        path: str | Path,
        ids: Sequence[int],
        messages: Sequence[Message] | None = None,
        *,
        with_text: bool = True,
    ) -> state_file.SavedState:
        """Writes a state file of these tokens, which are read if their state is not known.

        The state has not seen the last token: see `chat.state_file`. Without the text, the file has
        only its hash, and is used when the same text is read again. Raises RequestError if the file
        cannot be written, or exists and is no state file.
        """
        path = Path(path)
        state_file.require_replaceable(path)
        require_ids(ids, self.vocab_size)
        state = self.state(ids[:-1] or ids)
        saved = self.saved_state(ids, state, messages)
        if not with_text:
            saved = replace(saved, tokens=None, messages=None)
        state_file.write_state(path, saved, precision=self.state_precision)
        return saved

    def saved_state(
        self, ids: Sequence[int], state: State, messages: Sequence[Message] | None
    ) -> state_file.SavedState:
        """Returns the contents of a state file; the state has seen all `ids`, or all but one."""
        seen = int(state[POSITION][0])
        return state_file.SavedState(
            self.identity,
            state_file.key_of(ids[:seen]),
            state,
            np.array(ids, np.int64),
            messages,
            f"{self.info.engine} {self.info.engine_version}",
            artifact=self._numeric_identity,
        )

    def load_state(self, path: str | Path, *, namespace: str = "") -> state_file.SavedState:
        """Loads a state file: prompts of the namespace that begin with its tokens go on from it.

        Raises RequestError for damage, and another model, window or chat template.
        """
        path = Path(path)
        saved = state_file.read_state(path, self._shapes)
        state_file.require_same_model(path, saved, self.identity)
        is_foreign = saved.artifact != self._numeric_identity
        self.scheduler.store.put(saved.key, saved.state, foreign=is_foreign, namespace=namespace)
        return saved

    def close(self) -> None:
        """Cancels all requests, and frees the engine's memory and the artifact's files."""
        self._settling.shutdown()
        self.scheduler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _settle(
        self, prompt: PromptTokens, options: ReplyOptions, reply: ModelReply, deliver: Deliver
    ) -> None:
        """Reads the end of the turn: the template may write other tokens for it than the reply."""
        with contextlib.suppress(RequestError):
            messages = [*(prompt.messages or ()), {"role": "assistant", "content": reply.text}]
            settled = self.conversation_ids(messages)
            namespace = options.namespace
            reading = self.read(settled, client=options.client, namespace=namespace, first=True)

            def forget(_: Future[End]) -> None:
                self._forget(prompt.ids, reply.ids, settled, namespace)

            reading.add_done_callback(forget)
        deliver(reply)

    def _forget(
        self, prompt: list[int], reply: Sequence[int], settled: list[int], namespace: str
    ) -> None:
        """Removes the states after the reply, which no prompt continues, from memory.

        A reply that a stop id ended has a state after all its tokens, others after all but one.
        """
        for count in (len(reply), len(reply) - 1):
            ids = [*prompt, *reply[:count]]
            if count > 0 and ids != settled:
                self.scheduler.store.forget(ids, namespace)


def _copy_state(end: End) -> State:
    """Returns a copy of the state after a reading; the store shares the original."""
    if end.state is None:
        raise RequestError("the model was closed before the text was read")
    return {name: array.copy() for name, array in end.state.items()}


class ModelOptions(TypedDict, total=False):
    """The arguments of `Model` that `load` passes on; others take the defaults."""

    rows: int
    max_waiting: int
    lookup: bool
    cache_bytes: int
    state_folder: Path | None
    folder_bytes: int
    state_precision: str | None


def load(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    allow_foreign: bool = False,
    progress: Listener | None = None,
    **options: Unpack[ModelOptions],
) -> Model:
    """Opens an artifact with its tokenizer and chat template.

    Args:
        path: an artifact of any format, opened or not, or `hf:owner/name`.
        threads: number of processors that the engine uses; all by default.
        allow_foreign: whether a graph with ops that rgexport does not write may run; such a graph
            can take any time and memory.
        progress: called with the stage, and the number of units done and expected.
        options: see `ModelOptions` and `Model`.

    Raises:
        RequestError: no sound artifact, no tokenizer, or an engine that cannot open it.
    """
    with heard_by(progress):
        artifact = open_artifact(fspath(path), allow_foreign=allow_foreign)
        return open_model(artifact, threads=threads, **options)


def open_model(
    artifact: Artifact, *, threads: int | None = None, **options: Unpack[ModelOptions]
) -> Model:
    """Opens an opened artifact's engine, tokenizer and chat template; raises as `load` does."""
    tokenizer = open_tokenizer(artifact)
    template = open_template(artifact)
    identity = identity_of(artifact.manifest, template.source)
    session = open_session(artifact, threads=threads)
    return Model(
        session,
        tokenizer,
        template,
        identity,
        artifact=artifact_hash(artifact.manifest),
        path=artifact.path,
        **options,
    )


def _numeric_identity(artifact: str, info: SessionInfo, precision: str | None) -> str:
    """Returns a hash of everything that the bits of a state file depend on."""
    facts = [
        artifact,
        info.engine,
        info.engine_version,
        info.kernels,
        info.activation_dtype,
        precision,
    ]
    text = json.dumps(facts)
    return hashlib.sha256(text.encode()).hexdigest()
