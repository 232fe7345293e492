"""Whether the models still answer."""

import threading
from collections.abc import Mapping

from rgexport.chat.model import Model
from rgexport.errors import RequestError
from rgexport.progress import warn

STALL_SECONDS = 60.0
"""Longest time of a step, unless earlier ones took long."""
_LOOK_SECONDS = 2.0
"""Time between two looks at the files."""
_REPLACED = "the files of the artifact changed; restart the server to open the new ones"


class Health:
    """The check of the models. It asks no thread and no disk, so it answers while they hang.

    A thread of its own looks at the artifacts' files, once it was started.
    """

    def __init__(
        self, models: Mapping[str, Model], *, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._models, self._patience = models, stall_seconds
        self._changed: set[str] = set()
        self._closed = threading.Event()

    def problems(self) -> dict[str, str]:
        """Returns why models do not answer, by name; empty if all do."""
        problems: dict[str, str] = {}
        for name, model in self._models.items():
            replaced = _REPLACED if name in self._changed else None
            if problem := replaced or model.scheduler.problem(self._patience):
                problems[name] = problem
        return problems

    def start(self) -> None:
        """Starts to look at the files."""
        threading.Thread(target=self._watch, name="health", daemon=True).start()

    def close(self) -> None:
        """Ends that."""
        self._closed.set()

    def look(self) -> None:
        """Notes which artifacts' files are not those that were opened."""
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
