"""A chat conversation: its turns can be undone, retried, edited, saved and loaded."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from rgexport.chat.model import Model
from rgexport.chat.prompts import Message
from rgexport.chat.reply import ModelReply, ReplyOptions
from rgexport.chat.state_file import Key, SavedState, key_of
from rgexport.errors import RequestError

Replies = Generator[str, None, None]


class Conversation:
    """Turns of a user and a model. It holds only messages: the model finds its states by them.

    `messages` are the turns so far, perhaps after a system prompt; `last` is the last reply.
    A terminal shows Markdown in styles if it is `styled`.
    """

    def __init__(self, model: Model, options: ReplyOptions) -> None:
        model.require_chat()
        self.model, self.options = model, options
        self.messages: list[Message] = []
        self.last: ModelReply | None = None
        self.styled = True
        self._attempts = 0
        self._asked: tuple[list[Message], ReplyOptions] | None = None  # for the last reply
        self._document, self._documents = "", dict[str, str]()
        self._unread: tuple[Path, Key] | None = None
        """A loaded state file without its text, and the key of the text."""

    @property
    def system(self) -> str:
        return next((m["content"] for m in self.messages if m["role"] == "system"), "")

    def set_system(self, text: str) -> None:
        """Replaces the system prompt; "" removes it."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *turns]

    def clear(self) -> None:
        """Removes all turns, but not the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._document, self._unread = "", None

    def read(self, text: str) -> int:
        """Reads a document that the next message is about; returns the length in tokens.

        Raises RequestError if the template refuses it, or it is another text than a loaded state's.
        """
        message = self._message(self._document, text)
        ids = self.model.opening_ids([*self.messages, message])
        if self._unread:
            path, key = self._unread
            if key_of(ids[: key[0]]) != key:
                raise RequestError(f"this is not the text that {path} was made from; give that one")
        self.model.state(ids)  # a cancelled reading leaves the conversation as it was
        self._document, self._unread = message["content"], None
        return len(ids)

    def send(self, text: str) -> Replies:
        """Yields the reply to `text`; closing the iterator ends it, an error undoes the turn.

        Raises RequestError if the template refuses the conversation, or the engine failed.
        """
        if self._unread:
            raise RequestError(
                f"{self._unread[0]} stores a hash of its text, not the text; first read the text "
                "again with /read FILE or --read FILE, which takes no time"
            )
        yield from self._reply_to([*self.messages, self._message(self._document, text)], "")

    @property
    def repeats(self) -> bool:
        """Whether `retry` is certain to give the last reply again."""
        is_same = self._asked == (self.messages[:-1], self.options)
        is_whole = self.last is not None and self.last.reason != "cancelled"
        return is_same and is_whole and not self.options.sampling.temperature

    def retry(self) -> Replies:
        before = self.messages[: self._last_index() + 1]
        yield from self._reply_to(before, self._document, self._attempts + 1)

    def edit(self, text: str) -> Replies:
        """Yields the reply to `text` in the last message's place, after the same document."""
        index = self._last_index()
        message = self._message(self._document_of(index), text)
        yield from self._reply_to([*self.messages[:index], message], self._document)

    def undo(self) -> str:
        """Removes a document that no message is about yet, or the last turn; says which.

        The document that the turn was about is there again for the next message.
        """
        if self._document:
            self._document = self._documents.get(self._document, "")
            return "The text that was read last is gone."
        index = self._last_index()
        self._document, self.messages = self._document_of(index), self.messages[:index]
        again = " The text before it stays; /undo removes it, too." * bool(self._document)
        return f"The last message and its reply are gone.{again}"

    def save(self, path: Path) -> SavedState:
        """Writes the conversation and its state into a file; RequestError if it is empty."""
        messages, encode = list(self.messages), self.model.conversation_ids
        if self._document:
            messages.append({"role": "user", "content": self._document})
            encode = self.model.opening_ids
        if all(message["role"] == "system" for message in messages):
            raise RequestError("the conversation is empty: there is nothing to save")
        return self.model.save_state(path, encode(messages), messages)

    def load(self, path: Path) -> SavedState:
        """Replaces the conversation by a saved one, or by a document that was read.

        A file without text starts an empty conversation, in which that text must be read next.
        Raises RequestError for another kind of file, or another model.
        """
        saved = self.model.load_state(path)
        if saved.tokens is None:
            self.clear()
            self._unread = path, saved.key
            return saved
        if saved.messages is None:
            raise RequestError(
                f"{path} is the state of a plain text; go on by `rgexport generate --load-state`"
            )
        self.messages, self._document, self._unread = list(saved.messages), "", None
        if self.messages and self.messages[-1]["role"] == "user":
            self._document = self.messages.pop()["content"]
        return saved

    def _reply_to(self, messages: list[Message], document: str, attempts: int = 0) -> Replies:
        self._attempts = attempts
        options, sampling = self.options, self.options.sampling
        if attempts and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + attempts)
            options = replace(options, sampling=sampling)
        stream = self.model.reply_to(messages, options)
        try:
            yield from stream
        finally:
            if not stream.failed:
                stream.cancel()
                self.last = stream.reply()
                self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
                self._document, self._asked = document, (messages, self.options)

    def _message(self, document: str, text: str) -> Message:
        content = "\n\n".join(filter(None, (document, text)))
        self._documents[content] = document
        return {"role": "user", "content": content}

    def _document_of(self, index: int) -> str:
        return self._documents.get(self.messages[index]["content"], "")

    def _last_index(self) -> int:
        indices = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not indices:
            raise RequestError("there is no message yet")
        return indices[-1]
