"""A reply as an iterator, for who is not in asyncio."""

import queue
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Piece, Reply, ReplyOptions
from rgexport.errors import RequestError

if TYPE_CHECKING:
    from rgexport.chat.model import Model


class ReplyStream(Iterator[str]):
    """The pieces of a reply as they come; `reply` waits for the end."""

    def __init__(self, model: "Model", prompt: Prompt, options: ReplyOptions) -> None:
        """Begins the reply."""
        self._arrived: queue.SimpleQueue[Piece | Reply | RequestError] = queue.SimpleQueue()
        self._job = model.start(prompt, options, self._arrived.put)
        self._reply: Reply | None = None
        self.failed = False
        """Whether the engine ended the reply by an error."""

    def __next__(self) -> str:
        """The next piece."""
        item = self._next_item()
        if item is None:
            raise StopIteration
        return item.text

    def pieces(self) -> Iterator[Piece]:
        """The rest of the reply, with log probabilities if they were asked for."""
        while (item := self._next_item()) is not None:
            yield item

    def reply(self) -> Reply:
        """The whole reply.

        Raises:
            RequestError: the engine failed.
        """
        for _ in self:
            pass
        assert self._reply is not None
        return self._reply

    def cancel(self) -> None:
        """Ends the reply soon; what was said is kept."""
        self._job.cancel()

    def _next_item(self) -> Piece | None:
        if self._reply is not None:
            return None
        item = self._arrived.get()
        if isinstance(item, RequestError):
            self.failed = True
            raise item
        if isinstance(item, Reply):
            self._reply = item
            return None
        return item
