"""Advice to the kernel about somebody's memory, given by a thread that can be stopped."""

import threading
from collections.abc import Callable, Iterable

_PIECE = 16 << 20
"""At once: others wait who want to map memory meanwhile, and so does who stops it."""


class BackgroundAdvice:
    """Addresses outlive no memory: the thread holds its owner, and ends before that is freed."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(
        self,
        areas: Iterable[tuple[int, int]],
        give: Callable[[int, int], object],
        owner: object = None,
    ) -> None:
        """Begins to call `give(start, end)` for pieces of areas of memory.

        Args:
            areas: first addresses, and those behind the last ones.
            give: gives the advice on a piece.
            owner: what the memory lives as long as, if that is an object of Python.
        """
        arguments = list(areas), give, self._stopped, owner
        self._thread = threading.Thread(target=_give_all, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits for the piece at hand; from now on the memory may be freed."""
        self._stopped.set()
        # The thread itself may be the one that lets the last reference to a session go.
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None


def _give_all(
    areas: list[tuple[int, int]],
    give: Callable[[int, int], object],
    stopped: threading.Event,
    owner: object,
) -> None:
    """Takes nothing that leads to the object above, which may go away while this runs."""
    for start, end in areas:
        for at in range(start, end, _PIECE):
            if stopped.is_set():
                return
            give(at, min(at + _PIECE, end))
    del owner
