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

    One thread at a time may use it.

    Attributes:
        messages: the turns so far, perhaps after a system prompt.
        last: the last reply.
        styled: whether a terminal shows Markdown in styles.
    """

    def __init__(self, model: Model, options: ReplyOptions) -> None:
        model.require_chat()
        self.model = model
        self.options = options
        self.messages: list[Message] = []
        self.last: ModelReply | None = None
        self.styled = True
        self._attempts = 0
        """Number of retries of the last reply."""
        self._request: tuple[list[Message], ReplyOptions] | None = None
        """Messages and options that the last reply answered."""
        self._document = ""
        """Text that the next message is about."""
        self._documents: dict[str, str] = {}
        """Content of a message → the document in it."""
        self._unread: tuple[Path, Key] | None = None
        """A loaded state file without its text, and the key of the text."""

    @property
    def system(self) -> str:
        """The system prompt, "" if there is none."""
        return next((m["content"] for m in self.messages if m["role"] == "system"), "")

    def set_system(self, text: str) -> None:
        """Replaces the system prompt; "" removes it."""
        turns = [message for message in self.messages if message["role"] != "system"]
        if text:
            turns.insert(0, {"role": "system", "content": text})
        self.messages = turns

    def clear(self) -> None:
        """Removes all turns, but not the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._document = ""
        self._unread = None

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
        self._document = message["content"]
        self._unread = None
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
        message = self._message(self._document, text)
        yield from self._reply_to([*self.messages, message], "")

    @property
    def repeats(self) -> bool:
        """Whether `retry` is certain to give the last reply again."""
        is_same = self._request == (self.messages[:-1], self.options)
        is_whole = self.last is not None and self.last.reason != "cancelled"
        return is_same and is_whole and not self.options.sampling.temperature

    def retry(self) -> Replies:
        """Yields another reply to the last message; with a seed, the seed is raised by 1."""
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
        self._document = self._document_of(index)
        self.messages = self.messages[:index]
        if self._document:
            return (
                "The last message and its reply are gone. "
                "The text before it stays; /undo removes it, too."
            )
        return "The last message and its reply are gone."

    def save(self, path: Path) -> SavedState:
        """Writes the conversation and its state into a file; RequestError if it is empty."""
        messages = list(self.messages)
        encode = self.model.conversation_ids
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
        self.messages = list(saved.messages)
        self._document = ""
        self._unread = None
        if self.messages and self.messages[-1]["role"] == "user":
            self._document = self.messages.pop()["content"]
        return saved

    def _reply_to(self, messages: list[Message], document: str, attempts: int = 0) -> Replies:
        """Yields the reply to messages; at its end, they and the reply are the conversation.

        `document` is the text that the message after them is about.
        """
        self._attempts = attempts
        stream = self.model.reply_to(messages, self._options_of_attempt(attempts))
        try:
            yield from stream
        finally:
            if not stream.failed:
                stream.cancel()
                self.last = stream.reply()
                self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
                self._document = document
                self._request = (messages, self.options)

    def _options_of_attempt(self, attempts: int) -> ReplyOptions:
        """Returns the options with another seed for each attempt, if there is a seed."""
        sampling = self.options.sampling
        if not attempts or sampling.seed is None:
            return self.options
        sampling = replace(sampling, seed=sampling.seed + attempts)
        return replace(self.options, sampling=sampling)

    def _message(self, document: str, text: str) -> Message:
        """Returns a user's message of a document and a text after it; either may be ""."""
        content = "\n\n".join(filter(None, (document, text)))
        self._documents[content] = document
        return {"role": "user", "content": content}

    def _document_of(self, index: int) -> str:
        """Returns the document in a message, "" if it has none."""
        content = self.messages[index]["content"]
        return self._documents.get(content, "")

    def _last_index(self) -> int:
        """Returns the index of the last message of the user; RequestError if there is none."""
        indices = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not indices:
            raise RequestError("there is no message yet")
        return indices[-1]
