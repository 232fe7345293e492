"""A conversation that can be taken back, tried again, saved, and gone on with."""

import dataclasses
from collections.abc import Generator
from pathlib import Path

from rgexport.chat.model import Model
from rgexport.chat.prefix_key import Key, key_of
from rgexport.chat.reply import Reply, ReplyOptions
from rgexport.chat.reply_stream import ReplyStream
from rgexport.chat.state_file import SavedState
from rgexport.chat.template import Message
from rgexport.errors import RequestError

_BETWEEN = "\n\n"
"""What is between a text that was read and what is asked about it."""


class Conversation:
    """Turns of a user and a model.

    It holds the messages alone: the model finds the state by them, so that whatever is taken back
    or changed, only what comes after it is read.

    Attributes:
        messages: the turns so far, perhaps with a system prompt in front.
        options: of replies.
        last: the last reply.
    """

    def __init__(self, model: Model, options: ReplyOptions) -> None:
        """Begins an empty conversation.

        Raises:
            RequestError: the model cannot chat.
        """
        model.require_chat()
        self.model, self.options = model, options
        self.messages: list[Message] = []
        self.last: Reply | None = None
        self._attempts = 0
        self._document = ""
        self._unread: tuple[Path, Key] | None = None

    @property
    def system(self) -> str:
        """The system prompt, "" if there is none."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Replaces the system prompt; "" removes it."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *turns]

    def clear(self) -> None:
        """Forgets all turns, but not the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._document, self._unread = "", None

    def read(self, text: str) -> int:
        """Reads a text that the next message is about; its number of tokens.

        Raises:
            RequestError: the template refuses it, or it is not the text of a state that was loaded
                without one.
        """
        document = self._with_document(text)
        ids = self.model.opening_ids([*self.messages, _user(document)])
        if self._unread:
            path, key = self._unread
            if key_of(ids[: key[0]]) != key:
                raise RequestError(f"this is not the text that {path} was made from; give that one")
        self._document, self._unread = document, None
        reading = self.model.read(ids)
        try:
            reading.result()
        finally:
            reading.cancel()  # whoever interrupts the waiting ends the reading
        return len(ids)

    def send(self, text: str) -> Generator[str, None, None]:
        """Yields the reply to `text`, piece by piece.

        Closing the iterator ends the reply there, and what was said stays in the conversation. An
        error undoes the turn.

        Raises:
            RequestError: the template refuses the conversation, or the engine failed.
        """
        if self._unread:
            raise RequestError(
                f"{self._unread[0]} stores a hash of its text, not the text; first read the text "
                "again with /read FILE or --read FILE, which takes no time"
            )
        self._attempts = 0
        yield from self._answer([*self.messages, _user(self._with_document(text))])

    def retry(self) -> Generator[str, None, None]:
        """Yields another reply to the last message.

        Raises:
            RequestError: there is none; else see `send`.
        """
        self._attempts += 1
        yield from self._answer([*self._before_last(), self._last_message()])

    def edit(self, text: str) -> Generator[str, None, None]:
        """Yields the reply to `text` in place of the last message.

        Raises:
            RequestError: there is none; else see `send`.
        """
        self._attempts = 0
        yield from self._answer([*self._before_last(), _user(text)])

    def undo(self) -> None:
        """Takes the last message and its reply back.

        Raises:
            RequestError: there is none.
        """
        self.messages = self._before_last()

    def save(self, path: Path) -> SavedState:
        """Writes the conversation and its state into a file.

        Raises:
            RequestError: there is nothing to save, or the file cannot be written.
        """
        messages = list(self.messages)
        if self._document:
            messages.append(_user(self._document))
            return self.model.save_state(path, self.model.opening_ids(messages), messages)
        if not messages:
            raise RequestError("the conversation is empty: there is nothing to save")
        return self.model.save_state(path, self.model.conversation_ids(messages), messages)

    def load(self, path: Path) -> SavedState:
        """Goes on with a saved conversation, or with a document that was read.

        A file without text begins a new conversation, in which that text must be read next.

        Raises:
            RequestError: it is none, or of another model.
        """
        saved = self.model.load_state(path)
        if saved.tokens is None:
            self.clear()
            self._unread = path, saved.key
            return saved
        if saved.messages is None:
            raise RequestError(
                f"{path} is the state of a plain text; go on with it by "
                "`rgexport generate --load-state`"
            )
        self.messages, self._document, self._unread = list(saved.messages), "", None
        if self.messages and self.messages[-1]["role"] == "user":
            self._document = self.messages.pop()["content"]
        return saved

    def _answer(self, messages: list[Message]) -> Generator[str, None, None]:
        stream = self.model.reply_to(messages, self._options())
        try:
            yield from stream
        finally:
            self._end(messages, stream)

    def _end(self, messages: list[Message], stream: ReplyStream) -> None:
        """Takes what was said into the conversation, however it ended."""
        if stream.failed:
            return
        stream.cancel()
        self.last = stream.reply()
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
        self._document = ""

    def _options(self) -> ReplyOptions:
        """The options; another attempt with a seed has another seed."""
        sampling = self.options.sampling
        if sampling.seed is None or not self._attempts:
            return self.options
        other = dataclasses.replace(sampling, seed=sampling.seed + self._attempts)
        return dataclasses.replace(self.options, sampling=other)

    def _with_document(self, text: str) -> str:
        return _BETWEEN.join(filter(None, (self._document, text)))

    def _before_last(self) -> list[Message]:
        """The messages before the last one of the user."""
        return self.messages[: self._place_of_last()]

    def _last_message(self) -> Message:
        return self.messages[self._place_of_last()]

    def _place_of_last(self) -> int:
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise RequestError("there is no message yet")
        return places[-1]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
