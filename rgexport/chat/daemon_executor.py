"""A thread that runs calls in order, and that the end of the process does not wait for."""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_LOW_PRIORITY = 10
"""Nice value of a thread for slow calls (on Linux each thread has its own)."""


class DaemonExecutor:
    """One daemon thread, which starts with the first call.

    An interpreter that ends joins the threads of `ThreadPoolExecutor`: one native call of minutes
    would keep the process alive.
    """

    def __init__(self, name: str, *, low_priority: bool = False) -> None:
        self._name, self._low_priority = name, low_priority
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Returns the future result; cancelling it skips a call that has not begun."""
        future: Future[T] = Future()
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._calls.put(lambda: _resolve(future, function))
        return future

    def shutdown(self, seconds: float) -> None:
        """Ends the thread after the submitted calls; waits for it at most `seconds`."""
        self._calls.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        if self._low_priority and sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
        while (call := self._calls.get()) is not None:
            call()


def _resolve(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
