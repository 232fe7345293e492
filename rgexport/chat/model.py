"""An artifact that answers: what the terminal, the server and Python share.

model = rgexport.load("demo-int4-onnx")
print(model.chat([{"role": "user", "content": "Hello"}]).text)
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rgexport.chat.artifact_text import open_template, open_tokenizer
from rgexport.chat.jobs import End, Job, Request, Token, require_ids
from rgexport.chat.prefix_key import key_of
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import Prompt, Prompts
from rgexport.chat.reply import Deliver, Piece, Reply, ReplyOptions, Writer, reply_options
from rgexport.chat.reply_stream import ReplyStream
from rgexport.chat.scheduler import Scheduler
from rgexport.chat.state_file import (
    SavedState,
    read_state,
    require_precision,
    require_replaceable,
    require_same_model,
    write_state,
)
from rgexport.chat.state_folder import StateFolder
from rgexport.chat.template import ChatTemplate, Message
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.identity import Identity, artifact_hash, identity_of
from rgexport.export.opening import open_artifact
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session, SessionInfo

CACHE_BYTES, FOLDER_BYTES = 1 << 30, 10 << 30
"""Memory and disk for states by default: 30 and 300 of a 2B's."""
_WAITING_SHARE = 4
"""States that wait to be written take at most this part of the memory for states."""


class Model(Prompts):
    """An artifact in its engine, with the states of what it has read.

    Several conversations may be under way at once, in any threads.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        identity: Identity,
        *,
        artifact: str = "",
        rows: int = 1,
        max_waiting: int = 1024,
        lookup: bool = True,
        cache_bytes: int = CACHE_BYTES,
        state_folder: Path | None = None,
        folder_bytes: int = FOLDER_BYTES,
        state_precision: str | None = None,
    ) -> None:
        """Takes an engine, which it owns from now on; `load` opens one.

        Args:
            session: the engine.
            tokenizer: its vocabulary.
            template: how conversations are written.
            identity: what its states are of.
            artifact: a hash of the artifact.
            rows: most conversations that are computed together.
            max_waiting: most requests that wait for their turn.
            lookup: whether several tokens are checked at once where a text repeats itself. It
                changes the speed of a reply, not its text.
            cache_bytes: memory for states.
            state_folder: where states are kept for the next start.
            folder_bytes: most bytes in that folder.
            state_precision: fp32 or fp16, in files; None for what the engine has.

        Raises:
            RequestError: the folder cannot be made, or memory is too small for the rows.
        """
        require_precision(state_precision)
        if rows < 1:
            raise RequestError(f"rows is {rows}; expected at least 1")
        self.identity = identity
        self.info, self._shapes = session.info, session.state_shapes
        self.vocab_size = session.vocab_size
        self.require_unchanged = session.require_unchanged
        self.state_precision = state_precision
        self._artifact = _numeric_identity(artifact, session.info, state_precision)
        folder = None
        if state_folder is not None:
            folder = StateFolder(
                state_folder,
                identity,
                self._shapes,
                artifact=self._artifact,
                vocab_size=self.vocab_size,
                max_bytes=folder_bytes,
                waiting_bytes=cache_bytes // _WAITING_SHARE,
                precision=state_precision,
            )
        store = PrefixStore(cache_bytes, folder)
        super().__init__(tokenizer, template, store.length)
        self._drafts = lookup and session.info.exact_tokens > 1
        self.scheduler = Scheduler(
            session, store, rows=rows, max_waiting=max_waiting, lookup=lookup
        )
        self._settling = ThreadPoolExecutor(1, thread_name_prefix="settling")

    @property
    def name(self) -> str:
        """The model's name."""
        return self.identity.name

    def require_chat(self) -> None:
        """Checks that it can chat.

        Raises:
            RequestError: the template writes turns that the vocabulary does not have.
        """
        self.template.check_turns(self.tokenizer)

    def chat(self, messages: Sequence[Message], **options: Any) -> Reply:
        """The reply to a conversation; for `options` see `stream`."""
        return self.stream(messages, **options).reply()

    def stream(self, messages: Sequence[Message], **options: Any) -> ReplyStream:
        """The reply to a conversation, piece by piece.

        Args:
            messages: `role` and `content` of each turn, the last one a user's.
            options: fields of `Sampling` and `ReplyOptions`, such as `temperature` and `stop`.

        Raises:
            RequestError: the template refuses the messages, or an option is outside its range.
        """
        return self.reply_to(messages, reply_options(**options))

    def reply_to(self, messages: Sequence[Message], options: ReplyOptions) -> ReplyStream:
        """As `stream`."""
        return ReplyStream(
            self, self.conversation_prompt(messages, namespace=options.namespace), options
        )

    def draft_of(self, text: str) -> list[int]:
        """The tokens of a text that replies may repeat; none if this engine checks no drafts."""
        return self.encode(text) if self._drafts else []

    def complete(self, text: str, **options: Any) -> ReplyStream:
        """The continuation of a text, piece by piece; for `options` see `stream`."""
        return ReplyStream(self, Prompt(self.text_ids(text)), reply_options(**options))

    async def astream(self, messages: Sequence[Message], **options: Any) -> AsyncIterator[str]:
        """As `stream`, for asyncio."""
        chosen = reply_options(**options)
        prompt = self.conversation_prompt(messages, namespace=chosen.namespace)
        async with contextlib.aclosing(self.deliver(prompt, chosen)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Piece):
                    yield piece.text

    async def deliver(
        self, prompt: Prompt, options: ReplyOptions
    ) -> AsyncGenerator[Piece | Reply, None]:
        """The pieces of a reply and, at last, the reply; closing it cancels the rest.

        Raises:
            RequestError: the request cannot be run, or the engine failed.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece | Reply | RequestError]()

        def take(item: Piece | Reply | RequestError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed meanwhile
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        job = self.start(prompt, options, take)
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, RequestError):
                    raise item
                yield item
                if isinstance(item, Reply):
                    return
        finally:
            job.cancel()

    def start(self, prompt: Prompt, options: ReplyOptions, deliver: Deliver) -> Job:
        """Begins a reply, whose pieces and end are given to `deliver` by other threads.

        Raises:
            Busy: too many requests wait.
            RequestError: the prompt is empty or has ids that the model does not have.
        """

        def end(last: Reply | RequestError) -> None:
            if isinstance(last, Reply) and last.reason != "cancelled" and prompt.messages:
                with contextlib.suppress(RuntimeError):  # it is shut down while replies end
                    self._settling.submit(self._settle, prompt, options, last, deliver)
                    return
            deliver(last)

        writer = Writer(self.tokenizer, prompt.ids, options, deliver, end)
        return self.scheduler.submit(
            Request(
                ids=prompt.ids,
                listener=writer,
                sampling=options.sampling,
                draft=options.draft,
                max_new_tokens=options.max_new_tokens,
                stop_ids=self.tokenizer.stop_ids,
                keep=prompt.keep,
                mask=options.mask,
                prompt_logits=writer.prompt if options.prompt_logprobs else None,
                client=options.client,
                namespace=options.namespace,
                lasting=prompt.messages is None,
            )
        )

    def read(
        self, ids: Sequence[int], *, client: str = "", namespace: str = "", first: bool = False
    ) -> Future[End]:
        """Reads tokens, so that prompts which begin with them go on from there.

        Cancelling the future ends the reading. For the options see `Request`.
        """
        done = Future[End]()
        request = Request(
            ids=ids,
            listener=_Reading(done),
            max_new_tokens=0,
            client=client,
            namespace=namespace,
            first=first,
        )
        job = self.scheduler.submit(request)
        done.add_done_callback(lambda future: job.cancel() if future.cancelled() else None)
        return done

    def state(self, ids: Sequence[int], *, client: str = "", namespace: str = "") -> State:
        """The canonical state of batch 1 (`griffin.state`) after these tokens.

        They are read if they were not. The arrays are the caller's own.

        Raises:
            RequestError: there are none, or the model was closed.
        """
        reading = self.read(ids, client=client, namespace=namespace)
        try:
            return _copy_of(reading.result())
        finally:
            reading.cancel()  # whoever interrupts the waiting ends the reading

    async def astate(self, ids: Sequence[int], *, client: str = "", namespace: str = "") -> State:
        """Returns what `state` returns, without holding up the event loop."""
        reading = self.read(ids, client=client, namespace=namespace)
        return _copy_of(await asyncio.wrap_future(reading))

    def save_state(
        self,
        path: str | Path,
        ids: Sequence[int],
        messages: Sequence[Message] | None = None,
        *,
        with_text: bool = True,
        client: str = "",
        namespace: str = "",
    ) -> SavedState:
        """Writes a state file of what these tokens lead to; they are read if they were not.

        The last token is left for whoever goes on: see `chat.state_file`. Without the text, the
        file has its hash alone: it is found when the same text is read.

        Raises:
            RequestError: the file cannot be written, is there and no state file, or the model was
                closed.
        """
        path = Path(path)
        require_replaceable(path)
        require_ids(ids, self.vocab_size)
        state = self.state(ids[:-1] or ids, client=client, namespace=namespace)
        saved = self.saved_state(ids, state, messages, with_text=with_text)
        write_state(path, saved, precision=self.state_precision)
        return saved

    def saved_state(
        self,
        ids: Sequence[int],
        state: State,
        messages: Sequence[Message] | None = None,
        *,
        with_text: bool = True,
    ) -> SavedState:
        """Returns the contents of a state file of these tokens, see `save_state`."""
        seen = int(state[POSITION][0])
        return SavedState(
            self.identity,
            key_of(ids[:seen]),
            state,
            np.array(ids, np.int64) if with_text else None,
            messages if with_text else None,
            f"{self.info.engine} {self.info.engine_version}",
            artifact=self._artifact,
        )

    def load_state(self, path: str | Path, *, namespace: str = "") -> SavedState:
        """Takes a state file: prompts of the namespace that begin with its tokens go on from there.

        Raises:
            RequestError: it is damaged, or of another model, window or chat template.
        """
        path = Path(path)
        saved = read_state(path, self._shapes)
        require_same_model(path, saved, self.identity)
        is_foreign = saved.artifact != self._artifact
        self.scheduler.store.add(saved.key, saved.state, foreign=is_foreign, namespace=namespace)
        return saved

    def close(self) -> None:
        """Ends all replies and frees the engine."""
        self._settling.shutdown()
        self.scheduler.close()

    def __enter__(self) -> Self:
        """Itself; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def _settle(
        self, prompt: Prompt, options: ReplyOptions, reply: Reply, deliver: Deliver
    ) -> None:
        """Reads the end of the turn, so that the next one goes on from there.

        The tokens of a reply may differ from those that its text encodes to: the template may trim
        it, and a model can spell a word in pieces that the tokenizer would not choose. Then the
        reply is read again, as the template renders it.
        """
        with contextlib.suppress(RequestError):
            said = [*(prompt.messages or ()), {"role": "assistant", "content": reply.text}]
            ids, namespace = self.conversation_ids(said), options.namespace
            done = self.read(ids, client=options.client, namespace=namespace, first=True)
            done.add_done_callback(lambda _: self._forget(prompt.ids, reply.ids, ids, namespace))
        deliver(reply)

    def _forget(
        self, prompt: list[int], reply: Sequence[int], settled: list[int], namespace: str
    ) -> None:
        """Frees the state of a reply as it was written: that of its template serves from now on.

        The last token was fed only where a stop token came after it.
        """
        for count in (len(reply), len(reply) - 1):
            ids = [*prompt, *reply[:count]]
            if count > 0 and ids != settled:
                self.scheduler.store.forget(ids, namespace)


@dataclass(frozen=True)
class _Reading:
    """Hears of a prompt that is only read."""

    done: Future[End]

    def token(self, token: Token) -> bool:
        """Never called."""
        return False

    def end(self, end: End) -> None:
        """Takes the end, unless the caller has cancelled the future."""
        if not self.done.set_running_or_notify_cancel():
            return
        if end.error is not None:
            self.done.set_exception(end.error)
        else:
            self.done.set_result(end)


def _copy_of(end: End) -> State:
    if end.state is None:
        raise RequestError("the model was closed before the text was read")
    return {name: array.copy() for name, array in end.state.items()}


def load(
    path: str | Path, *, threads: int | None = None, allow_foreign: bool = False, **options: Any
) -> Model:
    """Opens an artifact.

    Args:
        path: an artifact of any format, or `hf:owner/name`.
        threads: processors that the engine uses; all, by default.
        allow_foreign: whether a graph with ops that rgexport does not write may run; such a graph
            can take any time and memory.
        options: see `Model`.

    Raises:
        RequestError: it is no sound artifact, has no tokenizer, or its engine cannot open it.
    """
    return open_model(open_artifact(path, allow_foreign=allow_foreign), threads=threads, **options)


def open_model(artifact: Artifact, *, threads: int | None = None, **options: Any) -> Model:
    """As `load`, for an artifact that is open."""
    tokenizer, template = open_tokenizer(artifact), open_template(artifact)
    identity = identity_of(artifact.manifest, template.source)
    session = open_session(artifact, threads=threads)
    options["artifact"] = artifact_hash(artifact.manifest)
    return Model(session, tokenizer, template, identity, **options)


def _numeric_identity(artifact: str, info: SessionInfo, precision: str | None) -> str:
    """Returns a hash of all that the bits of a state file depend on."""
    facts = [artifact, info.engine, info.engine_version, info.kernels, info.activation_dtype]
    return hashlib.sha256(json.dumps([*facts, precision]).encode()).hexdigest()
