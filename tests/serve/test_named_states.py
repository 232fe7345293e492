"""States by name: their limits, and disks that fail."""

import os
import threading
import time
from pathlib import Path

import httpx
import pytest

from rgexport.serve import named_states
from rgexport.serve.app import Settings
from tests.faulty_disk import FAULTS, FaultyDisk
from tests.serve.conftest import Serve, Served

CHAT = "/v1/chat/completions"


def shared(folder: Path, **limits: int) -> Settings:
    """Settings of a server whose clients have one folder."""
    return Settings(saved=folder, share_prefixes=True, log=False, **limits)


def chat(server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    assert httpx.post(server.url + CHAT, json=body, timeout=30).status_code == 200


def act(server: Served, action: str, name: str) -> httpx.Response:
    body = {"filename": name}
    return httpx.post(f"{server.url}/slots/0?action={action}", json=body, timeout=30)


def test_saved_states_have_a_most_of_both(serve: Serve, tmp_path: Path) -> None:
    with serve(shared(tmp_path, most_saved=2)) as server:
        chat(server)
        assert [act(server, "save", name).status_code for name in "aba"] == [200] * 3
        refused = act(server, "save", "c")
        assert refused.status_code == 400
        assert "at most 2 of each client (--max-saved-states)" in refused.json()["error"]["message"]
        assert act(server, "erase", "a").status_code == 200
        assert act(server, "save", "c").status_code == 200
    size = (tmp_path / "b.state").stat().st_size
    with serve(shared(tmp_path, saved_bytes=2 * size + 99)) as server:
        chat(server)
        assert act(server, "save", "b").status_code == 200, "it replaces its own file"
        refused = act(server, "save", "d")
        assert refused.status_code == 400 and "(--saved-states-size)" in refused.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.state", "c.state"]


def test_bytes_of_all_clients_count_together(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.state").write_bytes(bytes(5000))
    with serve(Settings(saved=tmp_path, most_saved=1, saved_bytes=5000, log=False)) as server:
        chat(server)
        refused = act(server, "save", "a")
        assert refused.status_code == 400 and "(--saved-states-size)" in refused.text
        (tmp_path / "other" / "x.state").write_bytes(b"")
        assert act(server, "save", "a").status_code == 200
        assert "of each client" in act(server, "save", "b").text


def test_what_a_killed_server_left_is_removed(serve: Serve, tmp_path: Path) -> None:
    half = tmp_path / ".a.state.partial-01234567"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    with serve(shared(tmp_path)) as server:
        chat(server)
        assert act(server, "save", "a").status_code == 200
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_is_acknowledged_when_it_is_on_the_disk(
    fault: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk(tmp_path / "saved", monkeypatch)
    with serve(shared(disk.folder)) as server:
        chat(server)
        assert act(server, "save", "before").status_code == 200
        disk.begin(fault)
        answer = act(server, "save", "during")
        restored = act(server, "restore", "before")
        disk.end()
        if fault == "removed":
            assert answer.status_code == 200 and restored.status_code == 404
        else:
            assert answer.status_code == 503 and str(tmp_path) not in answer.text
            assert act(server, "restore", "during").status_code == 404
            assert act(server, "restore", "before").status_code == 200
        assert restored.status_code in (200, 404, 503)
        assert act(server, "save", "after").status_code == 200
    assert not [*disk.folder.glob(".*")]


def test_a_hanging_disk_holds_up_only_who_needs_it(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_states, "DISK_SECONDS", 0.3)
    disk = FaultyDisk(tmp_path / "saved", monkeypatch)
    with serve(shared(disk.folder)) as server:
        chat(server)
        disk.begin("hanging")
        answers: list[httpx.Response] = []
        saves = [
            threading.Thread(target=lambda i=i: answers.append(act(server, "save", f"a{i}")))
            for i in range(12)
        ]
        for thread in saves:
            thread.start()
        chat(server)
        for thread in saves:
            thread.join(30)
        assert {answer.status_code for answer in answers} <= {429, 503} and len(answers) == 12
        assert "does not answer" in "".join(answer.text for answer in answers)
        disk.end()
        while act(server, "save", "a").status_code == 429:
            time.sleep(0.05)
        assert act(server, "restore", "a").status_code == 200
