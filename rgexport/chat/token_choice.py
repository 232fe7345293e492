"""The choice of the next tokens of a reply, with its mask, its sampler and its listener."""

import time

import numpy as np

from rgexport.chat.counters import Counters
from rgexport.chat.jobs import Ending, EngineError, GenerationJob
from rgexport.errors import RequestError


class TokenSelector:
    """Chooses tokens for the jobs of a scheduler. Only the scheduler's thread may use it.

    Attributes:
        mask_deadline: `perf_counter` until which a choice waits for its mask.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.mask_deadline = 0.0

    def follow(self, job: GenerationJob, tokens: np.ndarray, logits: np.ndarray) -> Ending | None:
        """Chooses a token after each of `tokens` [T], up to the first rejected draft.

        `logits` are [T, vocab]. Returns the ending of the reply if it ends.
        """
        for index, row in enumerate(logits):
            job.fed += 1
            ending = self.advance(job, row)
            if ending:
                return ending
            if job.held is not None or index + 1 == len(tokens):
                break
            if job.ids[-1] != tokens[index + 1]:
                break
        return None

    def advance(self, job: GenerationJob, logits: np.ndarray) -> Ending | None:
        """Chooses the next token from logits [vocab]; returns the ending of the reply if it ends.

        Any failure, also of the listener, ends only this reply. If the mask is not ready, no token
        is chosen, and `job.held` has the logits.
        """
        try:
            return self._choose(job, logits)
        except RequestError as error:
            return "error", error
        except Exception as error:
            return "error", EngineError(f"a reply cannot go on: {error!r}")

    def _choose(self, job: GenerationJob, logits: np.ndarray) -> Ending | None:
        request = job.request
        job.held = None
        bias = None
        if job.mask is not None:
            bias = job.mask.bias(self.mask_deadline - time.perf_counter())
            if bias is None:
                job.held = logits
                return None

        token = job.sampler(logits, bias)
        if token in request.stop_ids:
            return "stop", None
        job.ids.append(token)
        job.written += 1
        self._counters.new_tokens += 1

        if not request.listener.token(token, logits):
            return "stop", None
        if job.written >= request.max_new_tokens:
            return "length", None
        if job.mask is not None:
            job.mask.accept(token)
        return None
