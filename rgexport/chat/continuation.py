"""A plain text that a model continues, from its beginning or from a saved state."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rgexport.chat.model import Model, ReplyStream
from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Reply, ReplyOptions
from rgexport.chat.sampling import Sampling


class Continuation:
    """One continuation.

    Attributes:
        ids: the tokens before it.
        reply: what came after them, once it is there.
    """

    reply: Reply

    def __init__(self, model: Model, text: str, state: Path | None = None) -> None:
        """Begins with `text`, after the tokens of a state file if there is one.

        Raises:
            RequestError: no tokens, or a state of another model.
        """
        self._model = model
        if state is None:
            self.ids = model.text_ids(text)
        else:
            known = model.load_state(state).tokens.tolist()
            self.ids = known + model.tokenizer.encode_text(text)

    def run(
        self, sampling: Sampling, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yields the continuation.

        Raises:
            RequestError: the engine failed.
        """
        options = ReplyOptions(sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)
        stream = ReplyStream(self._model, Prompt(self.ids), options)
        yield from stream
        self.reply = stream.reply()

    def save(self, path: Path) -> None:
        """Writes a state file of all tokens, the continuation's included.

        Raises:
            RequestError: it cannot be written.
        """
        self._model.save_state(path, [*self.ids, *self.reply.ids])
