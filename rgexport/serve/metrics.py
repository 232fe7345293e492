"""Prometheus's figures of a server."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rgexport.chat.model import Model

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
"""Attribute of `scheduler.Counters` → what it counts."""


class _Models(Collector):
    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        for name, about in _COUNTERS.items():
            counter = CounterMetricFamily(f"rgexport_{name}", about, labels=["model"])
            for model, served in self._models.items():
                counter.add_metric([model], getattr(served.scheduler.counters, name))
            yield counter
        gauges = {
            "rgexport_running": ("Requests being computed.", lambda m: m.scheduler.running),
            "rgexport_waiting": ("Requests that wait.", lambda m: m.scheduler.waiting),
            "rgexport_state_bytes": ("Memory for states.", lambda m: m.scheduler.store.nbytes),
        }
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(name, about, labels=["model"])
            for model, served in self._models.items():
                gauge.add_metric([model], value(served))
            yield gauge


class Metrics:
    """The figures of one server."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        """Begins to count."""
        self._registry = CollectorRegistry()
        self._registry.register(_Models(models))
        self._answers = Counter(
            "rgexport_http_answers",
            "Answers by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "rgexport_http_seconds", "Time of an answer.", ["path"], registry=self._registry
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer; `path` is a route, not what a client typed."""
        self._answers.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All figures, in Prometheus's text format."""
        return generate_latest(self._registry)
