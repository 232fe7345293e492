"""States by name: their limits, and disks that fail."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rgexport.serve import named_states
from rgexport.serve.app import Settings
from tests.faulty_disk import FAULTS, FaultyDisk
from tests.serve.conftest import Served, chat, error_of, post, until


def shared(folder: Path, **limits: int) -> Settings:
    """Settings of a server whose clients have one folder."""
    return Settings(saved=folder, share_prefixes=True, log=False, **limits)


def act(server: Served, action: str, name: str) -> httpx.Response:
    return post(server, f"/slots/0?action={action}", {"filename": name})


def test_saved_states_have_a_most_of_both(serve, tmp_path):
    half = tmp_path / ".a.state.partial-01234567"
    half.write_bytes(b"a killed server left it")
    os.utime(half, (0, 0))
    with serve(shared(tmp_path, most_saved=2)) as server:
        chat(server, "hello")
        assert [act(server, "save", name).status_code for name in "aba"] == [200] * 3
        refused = error_of(act(server, "save", "c"))
        assert "at most 2 of each client (--max-saved-states)" in refused
        assert act(server, "erase", "a").status_code == 200
        assert act(server, "save", "c").status_code == 200
    size = (tmp_path / "b.state").stat().st_size
    with serve(shared(tmp_path, saved_bytes=2 * size + 99)) as server:
        chat(server, "hello")
        assert act(server, "save", "b").status_code == 200, "it replaces its own file"
        assert "(--saved-states-size)" in error_of(act(server, "save", "d"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.state", "c.state"]


def test_bytes_of_all_clients_count_together(serve, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.state").write_bytes(bytes(5000))
    with serve(Settings(saved=tmp_path, most_saved=1, saved_bytes=5000, log=False)) as server:
        chat(server, "hello")
        assert "(--saved-states-size)" in error_of(act(server, "save", "a"))
        (tmp_path / "other" / "x.state").write_bytes(b"")
        assert act(server, "save", "a").status_code == 200
        assert "of each client" in error_of(act(server, "save", "b"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_is_acknowledged_when_it_is_on_the_disk(fault, serve, tmp_path, monkeypatch):
    disk = FaultyDisk(tmp_path / "saved", monkeypatch)
    with serve(shared(disk.folder)) as server:
        chat(server, "hello")
        assert act(server, "save", "before").status_code == 200
        disk.begin(fault)
        answer = act(server, "save", "during")
        restored = act(server, "restore", "before")
        disk.end()
        if fault == "removed":
            assert answer.status_code == 200 and restored.status_code == 404
        else:
            assert str(tmp_path) not in error_of(answer, 503)
            assert act(server, "restore", "during").status_code == 404
            assert act(server, "restore", "before").status_code == 200
        assert restored.status_code in (200, 404, 503)
        assert act(server, "save", "after").status_code == 200
    assert not [*disk.folder.glob(".*")]


def test_a_hanging_disk_holds_up_only_who_needs_it(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(named_states, "DISK_SECONDS", 0.3)
    disk = FaultyDisk(tmp_path / "saved", monkeypatch)
    with serve(shared(disk.folder)) as server, ThreadPoolExecutor(12) as pool:
        chat(server, "hello")
        disk.begin("hanging")
        saves = [pool.submit(act, server, "save", f"a{i}") for i in range(12)]
        chat(server, "hello")
        answers = [save.result() for save in saves]
        assert {answer.status_code for answer in answers} <= {429, 503}
        assert "does not answer" in "".join(answer.text for answer in answers)
        monkeypatch.setattr(named_states, "DISK_SECONDS", 60)
        disk.end()
        until(lambda: act(server, "save", "a").status_code != 429)
        assert act(server, "restore", "a").status_code == 200
