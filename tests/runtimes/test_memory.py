import psutil
import pytest

from rgexport.runtimes import machine


def test_available_memory(tmp_path, monkeypatch):
    available = machine.available_bytes()
    if available is not None:  # only Linux tells
        assert 0 < available <= psutil.virtual_memory().total
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "none")
    assert machine.available_bytes() is None


@pytest.mark.parametrize(("limit", "available"), [("max", 4096), ("3000", 2500), ("100", 0)])
def test_a_container_s_limit_counts(tmp_path, monkeypatch, limit, available):
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:  4 kB\nHugePages: x\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_bytes() == available
