import resource
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from rgexport.runtimes import memory


def test_it_is_what_the_system_says() -> None:
    found = memory.available_bytes()
    if found is not None:  # only Linux tells
        assert 0 < found <= psutil.virtual_memory().total


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.available_bytes() is None


@pytest.mark.parametrize(("limit", "found"), [("max", 4096), ("3000", 2500), ("100", 0)])
def test_a_container_s_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, found: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:  4 kB\nHugePages: x\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == found


def test_giving_back_leaves_what_is_in_use() -> None:
    kept = np.arange(1 << 20)
    freed = [np.ones(1 << 10) for _ in range(1 << 12)]
    before = psutil.Process().memory_info().rss
    del freed
    memory.give_back()
    assert psutil.Process().memory_info().rss <= before
    assert kept.sum() == (1 << 20) * ((1 << 20) - 1) // 2


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(system: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(sys, "platform", system)
    assert memory.peak_bytes(usage) == unit * usage.ru_maxrss > 0
