"""Grammars of requests, compiled in a thread of their own."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from rgexport.chat.daemon_executor import DaemonExecutor
from rgexport.chat.jobs import Busy
from rgexport.errors import RequestError
from rgexport.serve.errors import Gone
from rgexport.serve.grammar import CompiledGrammar, Grammars, GrammarSource

ClientLeft = Callable[[], Coroutine[Any, Any, None]]
"""Returns when the client has left."""

COMPILE_SECONDS, MOST_COMPILING = 10.0, 64
"""Longest wait for a grammar; most that wait at once."""
_CLOSING_SECONDS = 0.2


class Compiler:
    """A queue of grammars and the thread that compiles them, unless their clients have left."""

    def __init__(self, seconds: float = COMPILE_SECONDS, most: int = MOST_COMPILING) -> None:
        """Takes the longest wait for a grammar, and how many may wait."""
        self._seconds, self._most = seconds, most
        self._thread = DaemonExecutor("grammars", low_priority=True)
        self._waiting = 0

    async def compile(
        self, grammars: Grammars, source: GrammarSource, client_left: ClientLeft
    ) -> CompiledGrammar:
        """Returns the compiled grammar, at once if it is known.

        Raises:
            Busy: too many grammars wait, or those before take too long.
            Gone: the client has left.
            RequestError: the grammar cannot be used, or takes too long.
        """
        if compiled := grammars.known(source):
            return compiled
        if self._waiting >= self._most:
            raise Busy(f"{self._waiting} grammars wait to be compiled; try again later")
        self._waiting += 1
        call = self._thread.submit(partial(grammars.compile, source))
        result, leaving = asyncio.wrap_future(call), asyncio.create_task(client_left())
        either: set[asyncio.Future[Any]] = {result, leaving}
        try:
            await asyncio.wait(either, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            raise Gone if leaving.done() else self._too_slow(call)
        finally:
            self._waiting -= 1
            result.cancel()  # a call that has not begun is skipped
            leaving.cancel()

    def close(self) -> None:
        """Ends the thread; a grammar that takes too long is left to the end of the process."""
        self._thread.shutdown(_CLOSING_SECONDS)

    def _too_slow(self, call: Future[CompiledGrammar]) -> RequestError:
        if call.cancel():
            return Busy(f"other grammars took {self._seconds:g} s to compile; try again later")
        return RequestError(
            f"the grammar takes longer than {self._seconds:g} s to compile; "
            "use a simpler grammar or schema"
        )
