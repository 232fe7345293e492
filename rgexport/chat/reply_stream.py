"""A reply as an iterator, for who is not in asyncio."""

import queue
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import Piece, Reply, ReplyOptions
from rgexport.errors import RequestError

if TYPE_CHECKING:
    from rgexport.chat.model import Model


class ReplyStream(Iterator[str]):
    """The pieces of a reply as they come; `reply` waits for the end.

    A stream that nobody refers to any more cancels its reply.
    """

    def __init__(self, model: "Model", prompt: Prompt, options: ReplyOptions) -> None:
        """Begins the reply."""
        self._arrived: queue.SimpleQueue[Piece | Reply | RequestError] = queue.SimpleQueue()
        self._job = model.start(prompt, options, self._arrived.put)
        self._end: Reply | RequestError | None = None
        weakref.finalize(self, self._job.cancel).atexit = False

    @property
    def failed(self) -> bool:
        """Whether the engine ended the reply by an error."""
        return isinstance(self._end, RequestError)

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
            RequestError: the engine failed; raised again by each call.
        """
        for _ in self:
            pass
        assert isinstance(self._end, Reply)
        return self._end

    def cancel(self) -> None:
        """Ends the reply soon; what was said is kept."""
        self._job.cancel()

    def _next_item(self) -> Piece | None:
        """Returns the next piece, or None after the last one; raises the error that was the end."""
        if self._end is None:
            item = self._arrived.get()
            if isinstance(item, Piece):
                return item
            self._end = item
        if isinstance(self._end, RequestError):
            raise self._end
        return None
