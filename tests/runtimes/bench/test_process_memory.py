"""The system tells a peak in units of its own."""

import resource
import sys

import pytest

from rgexport.runtimes.bench.process_memory import peak_bytes


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(system, unit, monkeypatch):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(sys, "platform", system)
    assert peak_bytes(usage) == unit * usage.ru_maxrss > 0
