"""A plain text that a model continues, from its beginning or from a saved state."""

from collections.abc import Iterator
from pathlib import Path

from rgexport.chat.model import Model
from rgexport.chat.prefix_key import key_of
from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Reply, ReplyOptions
from rgexport.chat.reply_stream import ReplyStream
from rgexport.errors import RequestError


class Continuation:
    """One continuation.

    Attributes:
        ids: the tokens before it.
        reply: what came after them, once it is there.
    """

    reply: Reply

    def __init__(self, model: Model, text: str, state: Path | None = None) -> None:
        """Begins with `text`, after the tokens of a state file if it has them.

        Raises:
            RequestError: no tokens, a state of another model, or one whose text is not in the file
                and does not begin `text`.
        """
        self._model = model
        saved = None if state is None else model.load_state(state)
        if saved and saved.tokens is not None:
            self.ids = [*saved.tokens.tolist(), *model.tokenizer.encode_text(text)]
            return
        self.ids = model.text_ids(text)
        if saved and key_of(self.ids[: saved.position]) != saved.key:
            raise RequestError(
                f"{state} stores a hash of its text, not the text; the prompt must begin with "
                "that text, which is not read again (--prompt-file FILE takes a long one)"
            )

    def run(self, options: ReplyOptions) -> Iterator[str]:
        """Yields the continuation.

        Raises:
            RequestError: the engine failed.
        """
        stream = ReplyStream(self._model, Prompt(self.ids), options)
        yield from stream
        self.reply = stream.reply()

    def save(self, path: Path) -> None:
        """Writes a state file of all tokens, the continuation's included.

        Raises:
            RequestError: it cannot be written.
        """
        self._model.save_state(path, [*self.ids, *self.reply.ids])
