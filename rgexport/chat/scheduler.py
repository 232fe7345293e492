"""Continuous batching: all conversations share each pass over the weights.

One thread owns the session. Its rows are conversations: the first ones decode one token each in a
common step; the others read their prompts, in chunks between the steps. Rows are taken and freed
between steps. The states of prompts go into a prefix store, so that no prompt is read twice.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np

from rgexport.chat.admission import Admission
from rgexport.chat.counters import Counters
from rgexport.chat.jobs import (
    End,
    EngineError,
    GenerationJob,
    GenerationRequest,
    Reason,
    require_ids,
)
from rgexport.chat.masks import MaskThreads, ReplyMask
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.row_assignment import RowAssignment
from rgexport.chat.rows import Rows
from rgexport.chat.speculation import ChunkSize, Speculation
from rgexport.chat.state_file import key_of
from rgexport.chat.token_choice import TokenSelector
from rgexport.errors import RequestError
from rgexport.griffin.state import State
from rgexport.progress import warn
from rgexport.runtimes.session import Session

_LAST_CHUNK_FACTOR = 1.5
"""A last chunk may be so many times as long, instead of leaving a short one."""

_MAX_FAILURES = 3
"""Consecutive passes that may fail before the engine counts as broken."""

_LOGITS_BYTES = 32 << 20
"""Maximum size of the logits of a chunk if all its tokens need logits."""

_FOLDER_SECONDS = 0.02
"""Longest wait of an idle scheduler for the folder of states."""

_MASK_STEPS = 0.25
"""Longest wait for masks after a step, in times of that step."""

_POLL_SECONDS = 0.05
"""Interval of the check for cancelled replies while all rows wait for their masks."""


def _ignore_chunk(job: GenerationJob) -> None:
    """Stands for `Scheduler.on_reading` where nobody listens."""


class Scheduler:
    """The thread that owns a session and runs all requests on it.

    Any thread may call the public methods, and read the properties and `counters`. All methods with
    an underscore run in the scheduler's own thread; `submit` alone also ends jobs that never had a
    row.
    """

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
        self.store = store
        self.counters = Counters()
        self.most_requests = rows + max_waiting
        self.on_reading: Callable[[GenerationJob], None] = _ignore_chunk
        """Called in the scheduler's thread when a chunk of a prompt was read."""

        self._session = session
        self._rows = Rows(session, rows)
        self._admission = Admission(rows, max_waiting)
        self._assignment = RowAssignment(self._admission, self._rows, store)
        self._last_read: dict[str, float] = {}
        """Client whose prompts are being read → end of its last chunk."""

        self._chunk_size = ChunkSize(session)
        logits_bytes = 4 * session.vocab_size
        self._scored_chunk = max(1, _LOGITS_BYTES // logits_bytes)
        """The most tokens of a chunk if all of them need logits."""
        self._speculation = Speculation(session.info.exact_tokens if lookup else 1)
        self._masks = MaskThreads(session.vocab_size, self._admission.wake)
        self._choice = TokenSelector(self.counters)

        self._passed = time.monotonic()
        """Time at which the last pass ended."""
        self._longest_pass = 0.0
        self._failures = 0
        """Number of consecutive passes that failed."""

        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of jobs that have a row."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a row."""
        return self._admission.waiting

    @property
    def _has_work(self) -> bool:
        return bool(self._rows) or self._admission.has_queues

    def problem(self, patience: float) -> str | None:
        """Returns why replies do not go on, None if they do; a pass may take `patience` seconds."""
        silence = time.monotonic() - self._passed
        if not self._thread.is_alive():
            return "its scheduler has ended"
        if self._failures >= _MAX_FAILURES:
            return "its engine fails at every request"
        if self._has_work and silence > max(patience, 4 * self._longest_pass):
            return f"it has made no progress for {silence:.0f} s"
        return None

    def submit(self, request: GenerationRequest) -> GenerationJob:
        """Queues a request; its listener gets the reply.

        Raises:
            Busy: too many requests wait.
            RequestError: the prompt is empty, an id is unknown, or the scheduler is closed.
        """
        if not len(request.ids):
            raise RequestError("the prompt is empty; expected at least one token")
        require_ids(request.ids, self._session.vocab_size)
        require_ids(request.draft, self._session.vocab_size)

        job = GenerationJob(request)
        if self._admission.is_crowded:
            for cancelled in self._admission.take_cancelled(paused=False):
                self._end(cancelled, "cancelled")
        if not self._has_work:
            self._passed = time.monotonic()  # the time without work is no silence
        displaced = self._admission.add(job)
        if displaced:
            self._end(displaced, "error", self._admission.busy())
        return job

    def close(self) -> None:
        """Cancels all requests, ends the threads, and closes the store and the session."""
        self._admission.close()
        self._thread.join()
        with self._closing:
            if not self._closed:
                self._closed = True
                self._masks.close()
                with contextlib.closing(self._session):
                    self.store.close()

    def _run(self) -> None:
        """Repeats passes until `close`, then cancels all jobs."""
        while self._admission.wait_for_work(running=bool(self._rows)):
            try:
                self._pass()
                self._failures = 0
            except Exception as error:
                self._failures += 1
                self._fail(error)
            now = time.monotonic()
            self._longest_pass = max(self._longest_pass, now - self._passed)
            self._passed = now
        self._cancel_all()

    def _pass(self) -> None:
        """Fills free rows, reads one chunk of a prompt, and runs one step."""
        self._drop_cancelled()
        self._assignment.assign(self._begin)
        if not self._rows:
            self._admission.wait_for_folder(_FOLDER_SECONDS)
        self._read()
        self._resume()
        self._write()

    def _cancel_all(self) -> None:
        jobs = list(self._rows)
        while (job := self._admission.take({})) is not None:
            jobs.append(job)
        for job in jobs:
            self._end(job, "cancelled")

    def _drop_cancelled(self) -> None:
        """Ends the cancelled jobs; the states of those that have begun are stored."""
        for job in [job for job in self._rows if job.cancelled]:
            self._leave(job, "cancelled")
        for job in self._admission.take_cancelled():
            self._end(job, "cancelled")
            if job.paused is not None and job.fed > job.stored:
                self._store(job, job.paused, lasting=False)

    def _begin(self, job: GenerationJob) -> None:
        """Gives a row to a job, which begins or goes on after a pause."""
        self._rows.add(job)
        if job.paused is None:
            self._admit(job)
            return
        self._rows.set_state(job, job.paused)
        job.paused = None
        if job.replied and job.held is None:
            self._rows.start_decoding(job)

    def _admit(self, job: GenerationJob) -> None:
        """Begins a job in its row, with the state of the longest known prefix of its prompt."""
        self.counters.requests += 1
        job.began = time.perf_counter()
        if job.request.mask is not None:
            job.mask = ReplyMask(job.request.mask, self._masks)

        prefix = None
        if not job.request.prompt_logits:
            prefix = self.store.longest(job.ids, job.request.namespace, job.fetch)
        job.fetch = None
        if prefix is None:
            self._rows.set_state(job, None)
            return

        self._rows.set_state(job, prefix.state)
        job.fed = prefix.length
        job.cached = prefix.length
        job.stored = prefix.length
        job.foreign = prefix.foreign
        self.counters.cached_tokens += prefix.length
        if prefix.length == len(job.ids):
            self._reply(job, prefix.logits, prefix.state)

    def _read(self) -> None:
        """Reads a chunk of one prompt; stores its state where the prompt or a kept prefix ends."""
        job = self._next_to_read()
        if job is None:
            return
        next_stop = job.stops()[0]
        chunk_end = self._chunk_end(job, next_stop)
        logits = self._read_chunk(job, chunk_end)
        job.fed = chunk_end
        self.on_reading(job)
        self._last_read[job.request.client] = time.perf_counter()
        if chunk_end < next_stop:
            return

        state = self._rows.state(job)
        if chunk_end < len(job.ids):
            self._store(job, state, lasting=True)
        else:
            self._store(job, state, logits, lasting=job.request.lasting)
            self._reply(job, logits, state)

    def _chunk_end(self, job: GenerationJob, next_stop: int) -> int:
        """Returns the length of the prompt after the next chunk, at most `next_stop`."""
        size = self._chunk_size.tokens(alone=not self._rows.decoding)
        if job.request.prompt_logits:
            size = min(size, self._scored_chunk)
        if next_stop - job.fed <= _LAST_CHUNK_FACTOR * size:
            return next_stop
        return job.fed + size

    def _read_chunk(self, job: GenerationJob, chunk_end: int) -> np.ndarray:
        """Reads a prompt up to `chunk_end`, and counts that; returns the last logits [vocab]."""
        started = time.perf_counter()
        tokens = np.array([job.ids[job.fed : chunk_end]], np.int64)
        logits = self._take_prompt(job, tokens)
        seconds = time.perf_counter() - started
        if not job.request.prompt_logits:  # such chunks are slower than all others
            self._chunk_size.record_chunk(tokens.size, seconds)
        self.counters.prompt_tokens += tokens.size
        self.counters.read_seconds += seconds
        return logits

    def _take_prompt(self, job: GenerationJob, tokens: np.ndarray) -> np.ndarray:
        """Reads tokens [1, T] of a prompt; returns the logits [vocab] after the last one."""
        report = job.request.prompt_logits
        row = self._rows.row_range(job)
        num_logits = tokens.size if report else 1
        logits: np.ndarray = self._session.take(row, tokens, num_logits)[0]
        if report:
            first_predicted = job.fed + 1
            predicted = job.request.ids[first_predicted : first_predicted + tokens.size]
            report(predicted, logits[: len(predicted)])
        last: np.ndarray = logits[-1]
        return last

    def _next_to_read(self) -> GenerationJob | None:
        """Returns the earliest job of the client that has not read for longest."""
        reading = [job for job in self._rows.not_decoding if job.held is None and not job.cancelled]
        if not reading:
            return None
        clients = {job.request.client for job in reading}
        last_read = {client: self._last_read.get(client, 0.0) for client in clients}
        self._last_read = last_read
        return min(reading, key=lambda job: (last_read[job.request.client], job.began))

    def _reply(self, job: GenerationJob, logits: np.ndarray | None, state: State) -> None:
        """Begins the reply after the whole prompt, or ends a job that only reads."""
        job.replied = time.perf_counter()
        if job.request.max_new_tokens == 0 or logits is None:
            job.state = state
            self._leave(job, "length")
        else:
            self._go_on(job, logits)

    def _go_on(self, job: GenerationJob, logits: np.ndarray) -> None:
        """Chooses the next token of a row outside of the step, which joins the step."""
        ending = self._choice.advance(job, logits)
        if ending:
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
        if self._admission.has_queues and not self._rows.is_full:
            return True
        return any(job.mask is not None and job.mask.is_ready for job in self._rows)

    def _write(self) -> None:
        """Runs one step of all rows that decode, perhaps with drafted tokens."""
        jobs = self._rows.decoding
        if not jobs:
            return
        rows = range(len(jobs))
        tokens = np.array(self._speculation.tokens(jobs), np.int64)
        drafted = tokens.shape[1] - 1
        fed_before = [job.fed for job in jobs]

        started = time.perf_counter()
        if drafted:
            logits = self._session.verify(rows, tokens)
        else:
            logits = self._session.take(rows, tokens)
        seconds = time.perf_counter() - started

        self._choice.mask_deadline = time.perf_counter() + _MASK_STEPS * seconds
        endings = [self._choice.follow(*row) for row in zip(jobs, tokens, logits, strict=True)]
        fed = [job.fed - before for job, before in zip(jobs, fed_before, strict=True)]
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

    def _leave(self, job: GenerationJob, reason: Reason, error: RequestError | None = None) -> None:
        """Stores the state of a job, frees its row, and ends it."""
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
        """Ends a job without a row, and calls its listener."""
        self._admission.end(job)
        if job.mask is not None:
            job.mask.cancel()

        now = time.perf_counter()
        replied = job.replied or now
        began = job.began or replied
        end = End(
            reason,
            cached_tokens=job.cached,
            read_seconds=replied - began,
            write_seconds=now - replied,
            error=error,
            state=job.state,
        )
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
