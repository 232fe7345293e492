"""Health of the models, and Prometheus's metrics of a server."""

import threading
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rgexport.chat.model import Model
from rgexport.errors import RequestError
from rgexport.progress import warn

STALL_SECONDS = 60.0
_LOOK_SECONDS = 2.0
_REPLACED = "the files of the artifact changed; restart the server to open the new ones"
_COUNTERS = {
    "requests": "Requests that were begun.",
    "prompt_tokens": "Prompt tokens that were read.",
    "cached_tokens": "Prompt tokens that were known.",
    "new_tokens": "Tokens that were written.",
    "drafted_tokens": "Tokens that steps tried as drafts, those that fill up rows included.",
    "accepted_tokens": "Tried tokens that were right.",
    "steps": "Decoding steps.",
    "read_seconds": "Time spent in reading prompts.",
    "step_seconds": "Time spent in steps.",
}
"""Attribute of `counters.Counters` → description."""
_GAUGES: dict[str, tuple[str, Callable[[Model], float]]] = {
    "running": ("Requests being computed.", lambda model: model.scheduler.running),
    "waiting": ("Requests that wait.", lambda model: model.scheduler.waiting),
    "state_bytes": ("Memory for states.", lambda model: model.scheduler.store.nbytes),
}


class Health:
    """The check of the models, from memory, and of their files, by a thread after `start`."""

    def __init__(self, models: Mapping[str, Model], stall_seconds: float = STALL_SECONDS) -> None:
        self._models, self._patience = models, stall_seconds
        self._changed: set[str] = set()
        self._closed = threading.Event()

    def problems(self) -> dict[str, str]:
        problems = {name: m.scheduler.problem(self._patience) for name, m in self._models.items()}
        problems |= dict.fromkeys(self._changed, _REPLACED)
        return {name: problem for name, problem in problems.items() if problem}

    def start(self) -> None:
        threading.Thread(target=self._watch, name="health", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def look(self) -> None:
        for name, model in self._models.items():
            try:
                model.require_unchanged()
            except RequestError as error:
                if name not in self._changed:
                    warn(f"{error}; until then /health says so, and requests fail")
                self._changed.add(name)
            else:
                self._changed.discard(name)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.look()


class Metrics(Collector):
    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models, self._registry = models, CollectorRegistry()
        self._registry.register(self)
        paths, about = ["path", "status"], "Answers by path and status."
        self._answers = Counter("rgexport_http_answers", about, paths, registry=self._registry)
        about = "Time of an answer."
        self._seconds = Histogram("rgexport_http_seconds", about, ["path"], registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        for name, about in _COUNTERS.items():
            counter = CounterMetricFamily(f"rgexport_{name}", about, labels=["model"])
            for model_name, model in self._models.items():
                counter.add_metric([model_name], getattr(model.scheduler.counters, name))
            yield counter
        for name, (about, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"rgexport_{name}", about, labels=["model"])
            for model_name, model in self._models.items():
                gauge.add_metric([model_name], value(model))
            yield gauge

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._answers.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
