"""Continuous batching: all conversations share each pass over the weights.

One thread owns the session. Its rows are conversations: the first ones decode one token each in a
common step; the others read their prompts, in chunks between the steps. Rows are taken and freed
between steps. The states of prompts go into a prefix store, so that no prompt is read twice.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.chat.jobs import (
    End,
    Ending,
    EngineError,
    GenerationJob,
    GenerationRequest,
    Reason,
    require_ids,
)
from rgexport.chat.masks import MaskThreads, ReplyMask
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.rows import Admission, RowAssignment, Rows
from rgexport.chat.speculation import ChunkSize, Speculation
from rgexport.chat.state_file import key_of
from rgexport.errors import RequestError
from rgexport.griffin.state import State
from rgexport.progress import warn
from rgexport.runtimes.session import Session

_LAST_CHUNK_FACTOR = 1.5
"""A last chunk may be so many times as long, instead of leaving a short one."""
_MOST_FAILURES = 3  # consecutive passes that may fail before the engine counts as broken
_LOGITS_BYTES = 32 << 20  # maximum size of the logits of a chunk if all its tokens need logits
_FOLDER_SECONDS = 0.02  # longest wait of an idle scheduler for the folder of states
_MASK_STEPS = 0.25
_POLL_SECONDS = 0.05
"""Interval of the check for cancelled replies while all rows wait for their masks."""


@dataclass
class Counters:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    read_seconds: float = 0.0
    step_seconds: float = 0.0


class Scheduler:
    def __init__(
        self,
        session: Session,
        store: PrefixStore,
        *,
        rows: int = 1,
        max_waiting: int = 1024,
        lookup: bool = True,
    ) -> None:
        """Starts its thread.

        Each of `rows` takes the memory of one state, or of two while clients share too few rows.
        With `lookup`, steps check drafts if the engine's results stay bit-identical.
        """
        self.counters, self.store = Counters(), store
        self.on_reading: Callable[[GenerationJob], None] = lambda job: None
        """Called in the scheduler's thread when a chunk of a prompt was read."""
        self._session, self.most_requests = session, rows + max_waiting
        self._rows, self._admission = Rows(session, rows), Admission(rows, max_waiting)
        self._assignment = RowAssignment(self._admission, self._rows, store)
        self._last_read: dict[str, float] = {}
        """Client whose prompts are being read → end of its last chunk."""
        self._chunk_size = ChunkSize(session)
        self._scored_chunk = max(1, _LOGITS_BYTES // (4 * session.vocab_size))
        self._speculation = Speculation(session.info.exact_tokens if lookup else 1)
        self._masks = MaskThreads(session.vocab_size, self._admission.wake)
        self._mask_deadline = 0.0
        self._closing, self._closed = threading.Lock(), False
        self._passed, self._longest_pass, self._failures = time.monotonic(), 0.0, 0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    @property
    def _has_work(self) -> bool:
        return bool(self._rows) or self._admission.has_queues

    def problem(self, patience: float) -> str | None:
        """Returns why replies do not go on, None if they do; a pass may take `patience` seconds."""
        silence = time.monotonic() - self._passed
        if not self._thread.is_alive():
            return "its scheduler has ended"
        if self._failures >= _MOST_FAILURES:
            return "its engine fails at every request"
        if self._has_work and silence > max(patience, 4 * self._longest_pass):
            return f"it has made no progress for {silence:.0f} s"
        return None

    def submit(self, request: GenerationRequest) -> GenerationJob:
        if not len(request.ids):
            raise RequestError("the prompt is empty; expected at least one token")
        for ids in (request.ids, request.draft):
            require_ids(ids, self._session.vocab_size)
        job = GenerationJob(request)
        if self._admission.is_crowded:
            for cancelled in self._admission.take_cancelled(paused=False):
                self._end(cancelled, "cancelled")
        if not self._has_work:
            self._passed = time.monotonic()
        if displaced := self._admission.add(job):
            self._end(displaced, "error", self._admission.busy())
        return job

    def close(self) -> None:
        self._admission.close()
        self._thread.join()
        with self._closing:
            if not self._closed:
                self._closed = True
                self._masks.close()
                with contextlib.closing(self._session):
                    self.store.close()

    def _run(self) -> None:
        while self._admission.wait_for_work(running=bool(self._rows)):
            try:
                self._drop_cancelled()
                self._assignment.assign(self._begin)
                if not self._rows:
                    self._admission.wait_for_folder(_FOLDER_SECONDS)
                self._read()
                self._resume()
                self._write()
                self._failures = 0
            except Exception as error:
                self._failures += 1
                self._fail(error)
            now = time.monotonic()
            self._longest_pass = max(self._longest_pass, now - self._passed)
            self._passed = now
        for job in [*self._rows, *iter(lambda: self._admission.take({}), None)]:
            self._end(job, "cancelled")

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._rows if job.cancelled]:
            self._leave(job, "cancelled")
        for job in self._admission.take_cancelled():
            self._end(job, "cancelled")
            if job.paused is not None and job.fed > job.stored:
                self._store(job, job.paused, lasting=False)

    def _begin(self, job: GenerationJob) -> None:
        self._rows.add(job)
        if job.paused is not None:
            self._rows.set_state(job, job.paused)
            job.paused = None
            if job.replied and job.held is None:
                self._rows.start_decoding(job)
            return
        self.counters.requests += 1
        job.began = time.perf_counter()
        if job.request.mask is not None:
            job.mask = ReplyMask(job.request.mask, self._masks)
        prefix = None
        if not job.request.prompt_logits:
            prefix = self.store.longest(job.ids, job.request.namespace, job.fetch)
        job.fetch = None
        self._rows.set_state(job, None if prefix is None else prefix.state)
        if prefix is None:
            return
        job.fed = job.cached = job.stored = prefix.length
        job.foreign = prefix.foreign
        self.counters.cached_tokens += prefix.length
        if prefix.length == len(job.ids):
            self._reply(job, prefix.logits, prefix.state)

    def _read(self) -> None:
        job = self._next_to_read()
        if job is None:
            return
        end, size = job.stops()[0], self._chunk_size.tokens(alone=not self._rows.decoding)
        if job.request.prompt_logits:
            size = min(size, self._scored_chunk)
        stop = end if end - job.fed <= _LAST_CHUNK_FACTOR * size else job.fed + size
        started = time.perf_counter()
        tokens = np.array([job.ids[job.fed : stop]], np.int64)
        logits = self._take_prompt(job, tokens)
        seconds = time.perf_counter() - started
        if not job.request.prompt_logits:  # such chunks are slower than all others
            self._chunk_size.record_chunk(tokens.size, seconds)
        self.counters.prompt_tokens += tokens.size
        self.counters.read_seconds += seconds
        job.fed = stop
        self.on_reading(job)
        self._last_read[job.request.client] = time.perf_counter()
        if stop < end:
            return
        state, is_whole = self._rows.state(job), stop == len(job.ids)
        lasting = job.request.lasting or not is_whole
        self._store(job, state, logits if is_whole else None, lasting=lasting)
        if is_whole:
            self._reply(job, logits, state)

    def _take_prompt(self, job: GenerationJob, tokens: np.ndarray) -> np.ndarray:
        """Reads tokens [1, T] of a prompt; returns the logits [vocab] after the last one."""
        report, start = job.request.prompt_logits, job.fed + 1
        row = self._rows.row_range(job)
        logits: np.ndarray = self._session.take(row, tokens, tokens.size if report else 1)[0]
        if report:
            predicted = job.request.ids[start : start + tokens.size]
            report(predicted, logits[: len(predicted)])
        last: np.ndarray = logits[-1]
        return last

    def _next_to_read(self) -> GenerationJob | None:
        reading = [job for job in self._rows.not_decoding if job.held is None and not job.cancelled]
        if not reading:
            return None
        clients, before = {job.request.client for job in reading}, self._last_read
        self._last_read = last = {client: before.get(client, 0.0) for client in clients}
        return min(reading, key=lambda job: (last[job.request.client], job.began))

    def _reply(self, job: GenerationJob, logits: np.ndarray | None, state: State) -> None:
        job.replied = time.perf_counter()
        if job.request.max_new_tokens == 0 or logits is None:
            job.state = state
            self._leave(job, "length")
        else:
            self._go_on(job, logits)

    def _go_on(self, job: GenerationJob, logits: np.ndarray) -> None:
        """Chooses the next token of a row outside of the step, which joins the step."""
        if ending := self._advance(job, logits):
            self._leave(job, *ending)
        elif job.held is None:
            self._rows.start_decoding(job)

    def _resume(self) -> None:
        """Resumes held rows that have a mask now; waits for a mask if no other row can run."""
        held = [(job, job.held) for job in self._rows if job.held is not None]
        if held and len(held) == len(self._rows):
            self._admission.wait(_POLL_SECONDS, until=self._can_go_on)
        for job, logits in held:
            self._go_on(job, logits)

    def _can_go_on(self) -> bool:
        can_admit = self._admission.has_queues and not self._rows.is_full
        return can_admit or any(job.mask is not None and job.mask.is_ready for job in self._rows)

    def _write(self) -> None:
        """Runs one step of all rows that decode, perhaps with drafted tokens."""
        jobs = self._rows.decoding
        if not jobs:
            return
        rows, tokens = range(len(jobs)), np.array(self._speculation.tokens(jobs), np.int64)
        drafted = tokens.shape[1] - 1
        before = [job.fed for job in jobs]
        started = time.perf_counter()
        logits = (self._session.verify if drafted else self._session.take)(rows, tokens)
        seconds = time.perf_counter() - started
        self._mask_deadline = time.perf_counter() + _MASK_STEPS * seconds
        endings = [self._follow(*row) for row in zip(jobs, tokens, logits, strict=True)]
        fed = [job.fed - earlier for job, earlier in zip(jobs, before, strict=True)]
        if drafted:
            self._session.accept(fed)
        self._chunk_size.record_step(seconds)
        self._speculation.record_pass(len(jobs), drafted + 1, time.perf_counter() - started)
        self.counters.steps += 1
        self.counters.step_seconds += seconds
        self.counters.drafted_tokens += drafted * len(jobs)
        self.counters.accepted_tokens += sum(fed) - len(jobs)
        for job, ending in zip(jobs, endings, strict=True):
            if ending:
                self._leave(job, *ending)
            elif job.held is not None:
                self._rows.stop_decoding(job)

    def _follow(self, job: GenerationJob, tokens: np.ndarray, logits: np.ndarray) -> Ending | None:
        """Chooses a token after each of `tokens` [T], up to the first rejected draft."""
        for i, row in enumerate(logits):
            job.fed += 1
            if ending := self._advance(job, row):
                return ending
            if job.held is not None or i + 1 == len(tokens) or job.ids[-1] != tokens[i + 1]:
                break
        return None

    def _advance(self, job: GenerationJob, logits: np.ndarray) -> Ending | None:
        """Chooses the next token; any failure, also of the listener, ends only this reply."""
        try:
            return self._choose(job, logits)
        except RequestError as error:
            return "error", error
        except Exception as error:
            return "error", EngineError(f"a reply cannot go on: {error!r}")

    def _choose(self, job: GenerationJob, logits: np.ndarray) -> Ending | None:
        request, bias, job.held = job.request, None, None
        if job.mask is not None:
            bias = job.mask.bias(self._mask_deadline - time.perf_counter())
            if bias is None:
                job.held = logits
                return None
        token = job.sampler(logits, bias)
        if token in request.stop_ids:
            return "stop", None
        job.ids.append(token)
        job.written += 1
        self.counters.new_tokens += 1
        if not request.listener.token(token, logits):
            return "stop", None
        if job.written >= request.max_new_tokens:
            return "length", None
        if job.mask is not None:
            job.mask.accept(token)
        return None

    def _leave(self, job: GenerationJob, reason: Reason, error: RequestError | None = None) -> None:
        if reason != "error" and job.fed > job.stored:
            lasting = job.request.lasting and reason != "cancelled"
            self._store(job, self._rows.state(job), lasting=lasting)
        self._rows.remove(job)
        self._end(job, reason, error)

    def _store(
        self, job: GenerationJob, state: State, logits: np.ndarray | None = None, *, lasting: bool
    ) -> None:
        self.store.put(
            key_of(job.ids[: job.fed]),
            state,
            logits,
            lasting=lasting,
            foreign=job.foreign,
            namespace=job.request.namespace,
        )
        job.stored = job.fed

    def _end(self, job: GenerationJob, reason: Reason, error: RequestError | None = None) -> None:
        self._admission.end(job)
        if job.mask is not None:
            job.mask.cancel()
        now = time.perf_counter()
        replied = job.replied or now
        read_seconds = replied - (job.began or replied)
        end = End(reason, job.cached, read_seconds, now - replied, error, job.state)
        try:
            job.request.listener.end(end)
        except Exception as failure:
            warn(f"the end of a reply could not be told: {failure!r}")

    def _fail(self, error: Exception) -> None:
        """Ends all replies after an error of the engine, because its states may be wrong."""
        failure = EngineError(f"the engine: {error}")
        jobs = self._rows.clear()
        with contextlib.suppress(Exception):  # then each request reports the failure
            self._session.reset(self._rows.capacity)
        for job in jobs:
            self._end(job, "error", failure)
