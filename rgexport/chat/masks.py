"""Masks of replies, computed in daemon threads while the model takes its step."""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import numpy as np

from rgexport.chat.jobs import Mask
from rgexport.errors import RequestError

T = TypeVar("T")

_LOW_PRIORITY = 10  # nice value of a thread for slow calls (on Linux each thread has its own)
MASK_SECONDS = 1.0
"""Longest time for the mask of one token; most take less than a thousandth of it."""
_QUICK_SECONDS = 0.01
"""After a slower mask, the thread for slow grammars computes all masks of the reply."""
_QUEUE_SECONDS = 30.0  # longest time that a mask waits for masks of other replies
_CLOSING_SECONDS = 0.2
_BIAS = np.array([-np.inf, 0.0], np.float32)


class DaemonExecutor:
    """One daemon thread. It does not delay the end of the process, as a pool's threads do."""

    def __init__(self, name: str, *, low_priority: bool = False) -> None:
        self._low_priority = low_priority
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Returns the future result; cancelling it skips a call that has not begun."""
        future: Future[T] = Future()
        self._calls.put(lambda: _resolve(future, function))
        return future

    def shutdown(self, seconds: float) -> None:
        """Ends the thread after the submitted calls; waits for it at most `seconds`."""
        self._calls.put(None)
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


class MaskThreads:
    def __init__(
        self,
        vocab_size: int,
        ready: Callable[[], None],
        *,
        seconds: float = MASK_SECONDS,
        quick_seconds: float = _QUICK_SECONDS,
    ) -> None:
        self.vocab_size, self.seconds, self.quick_seconds = vocab_size, seconds, quick_seconds
        self._ready = ready
        self._quick = DaemonExecutor("masks")
        self._slow = DaemonExecutor("slow masks", low_priority=True)

    def submit(self, compute: Callable[[], np.ndarray], *, slow: bool) -> Future[np.ndarray]:
        future = (self._slow if slow else self._quick).submit(compute)
        future.add_done_callback(lambda _: self._ready())
        return future

    def close(self) -> None:
        for thread in (self._quick, self._slow):
            thread.shutdown(_CLOSING_SECONDS)


class ReplyMask:
    def __init__(self, mask: Mask, threads: MaskThreads) -> None:
        self._mask, self._threads = mask, threads
        self._slow = False
        self.accept(None)

    @property
    def is_ready(self) -> bool:
        return self._bias.done() or self._overdue() is not None

    def bias(self, seconds: float) -> np.ndarray | None:
        """Returns the mask as a summand of logits [vocab], 0 or -inf; None after `seconds`."""
        if seconds > 0 and not self._slow and not self._bias.done():
            with contextlib.suppress(TimeoutError):
                self._bias.exception(seconds)
        if self._bias.done():
            return self._bias.result()
        if overdue := self._overdue():
            raise overdue
        return None

    def accept(self, token: int | None) -> None:
        """Begins to compute the mask after a token; None for the mask of the first one."""
        self._queued, self._began = time.perf_counter(), 0.0
        self._bias = self._threads.submit(partial(self._compute, token), slow=self._slow)

    def cancel(self) -> None:
        self._bias.cancel()

    def _compute(self, token: int | None) -> np.ndarray:
        self._began = time.perf_counter()
        try:
            if token is not None:
                self._mask.accept(token)
            allowed = np.asarray(self._mask.allowed())
        except RequestError:
            raise
        except Exception as error:  # raised by a mask of the Python API
            raise RequestError(f"the mask failed: {error}") from error
        if allowed.shape != (self._threads.vocab_size,) or allowed.dtype != bool:
            raise RequestError(
                f"the mask is {allowed.dtype} {list(allowed.shape)}; "
                f"expected bool [{self._threads.vocab_size}]"
            )
        if not allowed.any():
            raise RequestError("the mask allows no token")
        bias: np.ndarray = _BIAS.take(allowed.view(np.uint8))
        if overdue := self._overdue():
            raise overdue
        seconds = time.perf_counter() - self._began
        self._slow = self._slow or seconds > self._threads.quick_seconds
        return bias

    def _overdue(self) -> RequestError | None:
        """Returns the error of a mask that takes too long, or waits too long for other replies'."""
        now = time.perf_counter()
        if self._began and now - self._began > self._threads.seconds:
            return RequestError(
                f"the grammar takes longer than {self._threads.seconds:g} s for one token; "
                "use a simpler grammar or schema"
            )
        if not self._began and now - self._queued > _QUEUE_SECONDS:
            return RequestError(
                f"the grammar waited longer than {_QUEUE_SECONDS:g} s for others; try again later"
            )
        return None
