"""Continuous batching: conversations share each reading of the weights.

One thread owns the session. Its rows are conversations: the first ones write, one token each in a
common step; the others read their prompts, in chunks between the steps. A row is taken and given
back between steps. What is read is kept in a prefix store, so that no prompt is read twice.
"""

import contextlib
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np

from rgexport.chat.jobs import Busy, End, Ending, EngineError, Job, Reason, Request, Token
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import common_prefix
from rgexport.chat.speculation import Speculation
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session

_CHUNKS = 16, 512
"""Fewest and most tokens that are read at once."""
_REST = 1.5
"""A chunk may be so many times as long, rather than to leave a short one."""
_TILE = 64
"""Chunks are multiples of this if they can be: engines are slower at fewer tokens."""
_LOGITS_BYTES = 32 << 20
"""Most bytes of logits, where those of all tokens of a chunk are wanted."""
_READING_SECONDS, _READING_STEPS = 2.5, 1.5
"""How long a chunk may take: alone, and in steps if others write."""


@dataclass
class Counters:
    """What a scheduler has done since it began."""

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
    """Runs requests over one session, which it owns."""

    def __init__(
        self,
        session: Session,
        store: PrefixStore,
        *,
        rows: int = 1,
        max_waiting: int = 1024,
        lookup: bool = True,
    ) -> None:
        """Begins its thread.

        Args:
            session: the model.
            store: where states are kept.
            rows: most conversations at once; each takes the memory of a state.
            max_waiting: most requests that wait for a row.
            lookup: whether steps may check drafts, where the engine gives the same bits then.
        """
        session.reset(rows)
        self.counters = Counters()
        self._session, self._store = session, store
        self._capacity, self._max_waiting = rows, max_waiting
        self._empty = {name: np.zeros((1, *s)) for name, s in session.state_shapes.items()}
        self._rows: list[Job] = []
        self._writing = 0
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._pace = _Pace(session)
        self._scored_chunk = max(1, _LOGITS_BYTES // (4 * session.vocab_size))
        self._speculation = Speculation(session.info.exact_tokens if lookup else 1)
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def store(self) -> PrefixStore:
        """Where states are kept."""
        return self._store

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def submit(self, request: Request) -> Job:
        """Lets a request wait for its turn.

        Raises:
            Busy: too many wait already.
            RequestError: there is nothing to read, an id is outside of the vocabulary, or the
                scheduler is closed.
        """
        vocab = self._session.vocab_size
        if not len(request.ids):
            raise RequestError("the prompt is empty; expected at least one token")
        for ids in filter(len, (request.ids, request.draft)):
            if max(ids) >= vocab or min(ids) < 0:
                raise RequestError(
                    f"there is no token id {max(ids)}: the model has {vocab} tokens; "
                    "expected ids below that, from the model's own tokenizer"
                )
        job = Job(request)
        with self._changed:
            if self._closed:
                raise RequestError("the model is closed")
            if not request.first and sum(map(len, self._waiting.values())) >= self._max_waiting:
                raise Busy(f"{self._max_waiting} requests wait already; try again later")
            self._waiting.setdefault(request.client, deque())
            if request.first:
                self._waiting[request.client].appendleft(job)
                self._waiting.move_to_end(request.client, last=False)
            else:
                self._waiting[request.client].append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Ends all replies, waits for the current step, and closes the session."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._store.close()
        self._session.close()

    def _run(self) -> None:
        while self._has_work():
            try:
                self._drop_cancelled()
                self._admit()
                self._read()
                self._write()
            except Exception as error:
                self._fail(error)
        for job in [*self._rows, *self._taken()]:
            job.request.listener.end(End("cancelled", job.cached))

    def _has_work(self) -> bool:
        """Waits for work; False when the scheduler is closed."""
        with self._changed:
            while not (self._closed or self._rows or self._waiting):
                self._changed.wait()
            return not self._closed

    def _taken(self, most: int | None = None) -> list[Job]:
        """Waiting jobs, at most so many, one of each client in turn."""
        found: list[Job] = []
        with self._changed:
            while self._waiting and (most is None or len(found) < most):
                client, jobs = self._waiting.popitem(last=False)
                found.append(jobs.popleft())
                if jobs:
                    self._waiting[client] = jobs
        return found

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._rows if job.cancelled]:
            self._leave(job, "cancelled")
        with self._changed:
            gone = [job for jobs in self._waiting.values() for job in jobs if job.cancelled]
            for job in gone:
                jobs = self._waiting[job.request.client]
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.request.client]
        for job in gone:
            job.request.listener.end(End("cancelled"))

    def _admit(self) -> None:
        """Gives free rows to those that wait, with the longest prefix that is known."""
        jobs = self._taken(self._capacity - len(self._rows))
        try:
            while jobs:
                job = jobs.pop(0)
                if self._is_being_read(job):
                    self._put_back(job)
                else:
                    self._begin(job)
        finally:
            for job in reversed(jobs):  # after an error
                self._put_back(job)

    def _begin(self, job: Job) -> None:
        """Gives a job the next row."""
        self.counters.requests += 1
        job.began = time.perf_counter()
        self._rows.append(job)
        prefix = None if job.request.prompt_logits else self._store.longest(job.ids)
        if prefix is None:
            empty = self._empty | {POSITION: np.zeros(1, np.int64)}
            self._set(len(self._rows) - 1, empty)
            return
        self._set(len(self._rows) - 1, prefix.state)
        job.fed = job.cached = prefix.length
        self.counters.cached_tokens += prefix.length
        if prefix.length == len(job.ids):
            self._reply(job, prefix.logits, prefix.state)

    def _is_being_read(self, job: Job) -> bool:
        """Whether another row will soon keep a longer prefix than what is known."""
        if job.request.prompt_logits or not (reading := self._rows[self._writing :]):
            return False
        known = self._store.length(job.ids)
        for other in reading:
            shared = common_prefix(job.ids, other.ids)
            if any(known < stop <= shared for stop in other.stops()):
                return True
        return False

    def _put_back(self, job: Job) -> None:
        with self._changed:
            self._waiting.setdefault(job.request.client, deque()).appendleft(job)

    def _read(self) -> None:
        """Reads a chunk of one prompt, or up to where its state is to be kept."""
        reading = self._rows[self._writing :]
        if not reading:
            return
        job = min(reading, key=lambda job: job.began)
        row = self._rows.index(job)
        place, chunk = job.stops()[0], self._pace.chunk(alone=not self._writing)
        if job.request.prompt_logits:
            chunk = min(chunk, self._scored_chunk)
        stop = place if place - job.fed <= _REST * chunk else job.fed + chunk
        started = time.perf_counter()
        tokens = np.array([job.ids[job.fed : stop]], np.int64)
        logits = self._take_prompt(job, row, tokens)
        seconds = time.perf_counter() - started
        if not job.request.prompt_logits:  # it takes longer, and no other prompt does
            self._pace.read(tokens.size, seconds)
        self.counters.prompt_tokens += tokens.size
        self.counters.read_seconds += seconds
        job.fed = stop
        if stop < place:
            return
        state, ended = self._get(row), stop == len(job.ids)
        kept = job.request.lasting or not ended
        self._store.put(job.ids[:stop], state, logits if ended else None, lasting=kept)
        if ended:
            self._reply(job, logits, state)

    def _take_prompt(self, job: Job, row: int, tokens: np.ndarray) -> np.ndarray:
        """Reads tokens [1, T] of a prompt; returns the logits [vocab] after the last one."""
        hear, start = job.request.prompt_logits, job.fed + 1
        logits = self._session.take(range(row, row + 1), tokens, tokens.size if hear else 1)[0]
        if hear:
            predicted = job.request.ids[start : start + tokens.size]
            hear(predicted, logits[: len(predicted)])
        return logits[-1]

    def _reply(self, job: Job, logits: np.ndarray | None, state: State) -> None:
        """Begins to write, from the logits and the state after the prompt."""
        job.replied = time.perf_counter()
        if job.request.max_new_tokens == 0 or logits is None:
            self._leave(job, "length", state=state)
            return
        self._swap(self._rows.index(job), self._writing)
        self._writing += 1
        if ending := self._choose(job, logits):
            self._leave(job, *ending)

    def _write(self) -> None:
        """One step of all that write, perhaps with tokens that may come next."""
        jobs = self._rows[: self._writing]
        if not jobs:
            return
        rows, tokens = range(len(jobs)), np.array(self._speculation.tokens(jobs), np.int64)
        drafted = tokens.shape[1] - 1
        before = [job.fed for job in jobs]
        started = time.perf_counter()
        logits = (self._session.verify if drafted else self._session.take)(rows, tokens)
        seconds = time.perf_counter() - started
        endings = [self._follow(*each) for each in zip(jobs, tokens, logits, strict=True)]
        fed = [job.fed - earlier for job, earlier in zip(jobs, before, strict=True)]
        if drafted:
            self._session.accept(fed)
        self._pace.step(seconds)
        self._speculation.passed(len(jobs), tokens.shape[1], time.perf_counter() - started)
        self.counters.steps += 1
        self.counters.step_seconds += seconds
        self.counters.drafted_tokens += drafted * len(jobs)
        self.counters.accepted_tokens += sum(fed) - len(jobs)
        for job, ending in zip(jobs, endings, strict=True):
            if ending:
                self._leave(job, *ending)

    def _follow(self, job: Job, tokens: np.ndarray, logits: np.ndarray) -> Ending | None:
        """Chooses a token after each of `tokens` [T], until one is not the next of them."""
        for i, row in enumerate(logits):
            job.fed += 1
            if ending := self._choose(job, row):
                return ending
            if i + 1 == len(tokens) or job.ids[-1] != tokens[i + 1]:
                break
        return None

    def _choose(self, job: Job, logits: np.ndarray) -> Ending | None:
        """Chooses the next token; how the reply ends, if that ends it."""
        request = job.request
        try:
            mask = request.mask
            token = job.sampler(logits, None if mask is None else mask.allowed())
            if mask:
                mask.accept(token)
        except RequestError as error:
            return "error", error
        if token in request.stop_ids:
            return "stop", None
        job.ids.append(token)
        job.written += 1
        self.counters.new_tokens += 1
        if not request.listener.token(Token(token, logits)):
            return "stop", None
        return ("length", None) if job.written >= request.max_new_tokens else None

    def _leave(
        self,
        job: Job,
        reason: Reason,
        error: RequestError | None = None,
        state: State | None = None,
    ) -> None:
        """Keeps the state of a row, gives the row back, and tells the listener."""
        row = self._rows.index(job)
        if job.written and reason != "error":
            kept = job.request.lasting
            self._store.put(job.ids[: job.fed], self._get(row), lasting=kept)
        if row < self._writing:
            self._writing -= 1
            self._move(self._writing, row)
            row = self._writing
        self._move(len(self._rows) - 1, row)
        self._rows.pop()
        now = time.perf_counter()
        replied = job.replied or now
        job.request.listener.end(
            End(reason, job.cached, replied - job.began, now - replied, error, state)
        )

    def _fail(self, error: Exception) -> None:
        """Ends all replies after an error of the engine, whose states may be wrong now."""
        told = EngineError(f"the engine: {error}")
        jobs, self._rows, self._writing = self._rows, [], 0
        with contextlib.suppress(Exception):  # then each request will hear of it
            self._session.reset(self._capacity)
        for job in jobs:
            job.request.listener.end(End("error", job.cached, error=told))

    def _get(self, row: int) -> State:
        return self._session.get_rows(range(row, row + 1))

    def _set(self, row: int, state: State) -> None:
        self._session.set_rows(range(row, row + 1), state)

    def _move(self, source: int, target: int) -> None:
        """Lets a row take the place of another one, which is not needed any more."""
        if source != target:
            self._set(target, self._get(source))
            self._rows[target] = self._rows[source]

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            first, second = self._get(one), self._get(other)
            self._set(one, second)
            self._set(other, first)
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]


class _Pace:
    """How many tokens to read at once, so that no one who writes waits long."""

    def __init__(self, session: Session) -> None:
        info = session.info
        self._unit = info.prefill_chunk if info.whole_chunks else _CHUNKS[0]
        self._token_seconds = self._step_seconds = 0.0

    def read(self, tokens: int, seconds: float) -> None:
        """Notes how long a chunk took."""
        if tokens >= _CHUNKS[0]:
            self._token_seconds = _mean(self._token_seconds, seconds / tokens)

    def step(self, seconds: float) -> None:
        """Notes how long a step took."""
        self._step_seconds = _mean(self._step_seconds, seconds)

    def chunk(self, *, alone: bool) -> int:
        """Most tokens of the next chunk."""
        seconds = _READING_SECONDS if alone else _READING_STEPS * self._step_seconds
        if not self._token_seconds:
            return self._unit * 4
        fitting = int(seconds / self._token_seconds)
        unit = self._unit * max(1, _TILE // self._unit) if fitting >= _TILE else self._unit
        return max(self._unit, min(fitting // unit * unit, _CHUNKS[1]))


def _mean(before: float, now: float) -> float:
    """A mean in which older figures count less and less."""
    return now if not before else 0.8 * before + 0.2 * now
