"""How many threads there are, where a container or a mask allows fewer than the machine has."""

import os
from pathlib import Path

import pytest

from rgexport import parallelism

CASES = {
    "no_groups": ({}, None, 8),
    "no_limit": ({"cpu.max": "max 100000\n"}, "0::/\n", 8),
    "half_a_processor": ({"cpu.max": "50000 100000\n"}, "0::/\n", 1),
    "one_and_a_fifth": ({"cpu.max": "120000 100000\n"}, "0::/\n", 1),
    "one_and_a_half": ({"cpu.max": "150000 100000\n"}, "0::/\n", 2),
    "more_than_there_are": ({"cpu.max": "1600000 100000\n"}, "0::/\n", 8),
    "of_a_parent": ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 1\n"}, "0::/a/b\n", 3),
    "of_a_host_that_is_not_seen": ({"cpu.max": "200000 100000\n"}, "0::/docker/1f\n", 2),
    "damaged": ({"cpu.max": "much\n"}, "0::/\n", 8),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas_count(tmp_path: Path, monkeypatch, case):
    files, mine, expected = CASES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if mine is not None:
        (tmp_path / "mine").write_text(mine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(parallelism, "_GROUPS", tmp_path)
    monkeypatch.setattr(parallelism, "_MINE", tmp_path / "mine")
    assert parallelism.usable_processors() == expected
    assert parallelism.usable_threads(None) == expected
    assert parallelism.usable_threads(1) == 1
    assert parallelism.usable_threads(9) == expected


def test_a_mask_counts(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert parallelism.usable_threads(4) == 1
