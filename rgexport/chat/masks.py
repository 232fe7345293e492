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
from typing import Protocol, TypeVar

import numpy as np

from rgexport.errors import RequestError

T = TypeVar("T")

MASK_SECONDS = 1.0
"""Longest time for the mask of one token; most take less than a thousandth of it."""

_QUICK_SECONDS = 0.01
"""After a slower mask, the thread for slow grammars computes all masks of the reply."""

_QUEUE_SECONDS = 30.0
"""Longest time that a mask waits for masks of other replies."""

_CLOSING_SECONDS = 0.2
"""Longest wait for each thread when masks are no longer needed; it may hang in a grammar."""

_LOW_PRIORITY = 10
"""Nice value of a thread for slow calls; on Linux each thread has its own."""

_BIAS = np.array([-np.inf, 0.0], np.float32)
"""Summand of the logit of a token that is not allowed, and of one that is."""


class Mask(Protocol):
    """The tokens that a grammar allows next, for one reply.

    A thread of `MaskThreads` calls it. Its error, or slowness (`MASK_SECONDS`), ends only its
    reply.
    """

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, bool [vocab]."""
        ...

    def accept(self, token: int) -> None:
        """Takes the next token of the reply."""
        ...


class DaemonExecutor:
    """One daemon thread. It does not delay the end of the process, as a pool's threads do.

    Any thread may call its methods.
    """

    def __init__(self, name: str, *, low_priority: bool = False) -> None:
        self._low_priority = low_priority
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Returns the future result; cancelling it skips a call that has not begun."""
        future: Future[T] = Future()
        self._calls.put(partial(_resolve, future, function))
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
    """Calls a function unless its future was cancelled, and sets the result or the error."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class MaskThreads:
    """Two threads that compute the masks of all replies: one for quick grammars, one for slow ones.

    The scheduler's thread submits; `ready` is called in the thread that computed a mask.
    """

    def __init__(
        self,
        vocab_size: int,
        ready: Callable[[], None],
        *,
        seconds: float = MASK_SECONDS,
        quick_seconds: float = _QUICK_SECONDS,
    ) -> None:
        self.vocab_size = vocab_size
        self.seconds = seconds
        self.quick_seconds = quick_seconds
        self._ready = ready
        self._quick = DaemonExecutor("masks")
        self._slow = DaemonExecutor("slow masks", low_priority=True)

    def submit(self, compute: Callable[[], np.ndarray], *, slow: bool) -> Future[np.ndarray]:
        """Returns the future mask; `ready` is called when it is done."""
        executor = self._slow if slow else self._quick
        future = executor.submit(compute)
        future.add_done_callback(self._on_done)
        return future

    def close(self) -> None:
        """Ends both threads; one that hangs in a grammar is left to the end of the process."""
        for executor in (self._quick, self._slow):
            executor.shutdown(_CLOSING_SECONDS)

    def _on_done(self, _: Future[np.ndarray]) -> None:
        self._ready()


class ReplyMask:
    """The mask of one reply's next token, computed one token ahead.

    The scheduler's thread calls the public methods; a thread of `MaskThreads` computes the mask.
    """

    def __init__(self, mask: Mask, threads: MaskThreads) -> None:
        self._mask = mask
        self._threads = threads
        self._slow = False
        self.accept(None)

    @property
    def is_ready(self) -> bool:
        """Whether `bias` would return a mask or raise an error at once."""
        return self._bias.done() or self._overdue() is not None

    def bias(self, seconds: float) -> np.ndarray | None:
        """Returns the mask as a summand of logits [vocab], 0 or -inf; None after `seconds`.

        Raises RequestError if the mask failed, or took too long.
        """
        if seconds > 0 and not self._slow and not self._bias.done():
            with contextlib.suppress(TimeoutError):
                self._bias.exception(seconds)  # only waits
        if self._bias.done():
            return self._bias.result()
        overdue = self._overdue()
        if overdue:
            raise overdue
        return None

    def accept(self, token: int | None) -> None:
        """Begins to compute the mask after a token; None for the mask of the first one."""
        self._queued = time.perf_counter()
        self._began = 0.0
        self._bias = self._threads.submit(partial(self._compute, token), slow=self._slow)

    def cancel(self) -> None:
        """Skips the mask if its computation has not begun."""
        self._bias.cancel()

    def _compute(self, token: int | None) -> np.ndarray:
        """Returns the mask after `token` as float32 [vocab]; runs in a thread for masks."""
        self._began = time.perf_counter()
        allowed = self._allowed(token)
        self._require_valid(allowed)
        bias: np.ndarray = _BIAS.take(allowed.view(np.uint8))

        overdue = self._overdue()
        if overdue:
            raise overdue
        seconds = time.perf_counter() - self._began
        self._slow = self._slow or seconds > self._threads.quick_seconds
        return bias

    def _allowed(self, token: int | None) -> np.ndarray:
        try:
            if token is not None:
                self._mask.accept(token)
            return np.asarray(self._mask.allowed())
        except RequestError:
            raise
        except Exception as error:  # raised by a mask of the Python API
            raise RequestError(f"the mask failed: {error}") from error

    def _require_valid(self, allowed: np.ndarray) -> None:
        if allowed.shape != (self._threads.vocab_size,) or allowed.dtype != bool:
            raise RequestError(
                f"the mask is {allowed.dtype} {list(allowed.shape)}; "
                f"expected bool [{self._threads.vocab_size}]"
            )
        if not allowed.any():
            raise RequestError("the mask allows no token")

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
