"""/health says what no longer answers, and waits for nothing itself."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from rgexport.chat.from_artifact import open_model
from rgexport.errors import RequestError
from rgexport.serve.app import Settings
from rgexport.serve.health import Health
from tests.serve.conftest import Serve, Served

COMPLETE = {"prompt": "hello", "max_tokens": 2}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def complete(server: Served) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=COMPLETE, timeout=60)


def health(server: Served) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=60)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Callable[[Served], threading.Event]:
    """Lets the engine hang until the event is set."""

    def hang(server: Served) -> threading.Event:
        go, take = threading.Event(), server.session._take
        monkeypatch.setattr(server.session, "_take", lambda *a: (go.wait(60), take(*a))[1])
        return go

    return hang


def send(server: Served, body: dict[str, object], path: str) -> socket.socket:
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    opened.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return opened


def test_a_scheduler_that_hangs_is_unhealthy_until_it_goes_on(
    serve: Serve, hanging: Callable[[Served], threading.Event]
) -> None:
    with serve() as server:
        assert complete(server).status_code == 200 and health(server).status_code == 200
        silence = Health({"toy": server.model}, stall_seconds=0)
        server.model.scheduler._longest_pass = 0.0
        time.sleep(0.01)
        assert silence.problems() == {}, "nobody waits"
        go = hanging(server)
        with send(server, COMPLETE, "/v1/completions"):
            until(lambda: "no progress" in silence.problems().get("toy", ""))
            assert health(server).status_code == 200, "a minute has not passed"
            server.model.scheduler._passed -= 3600
            answer = health(server)
            assert answer.status_code == 503 and answer.json()["status"] == "error"
            assert answer.json()["reason"].startswith("toy: it has made no progress for 36")
            go.set()
            until(lambda: health(server).status_code == 200)


def test_a_slow_engine_may_take_as_long_as_before(
    serve: Serve, hanging: Callable[[Served], threading.Event]
) -> None:
    with serve() as server:
        go = hanging(server)
        with send(server, COMPLETE, "/v1/completions"):
            until(lambda: server.model.scheduler.running > 0)
            server.model.scheduler._longest_pass = 1000.0
            server.model.scheduler._passed -= 3600
            assert health(server).status_code == 200
            server.model.scheduler._longest_pass = 0.0
            assert health(server).status_code == 503
            go.set()


def test_a_scheduler_that_ended_is_unhealthy(serve: Serve) -> None:
    with serve() as server:
        server.model.scheduler.close()
        answer = health(server)
        assert answer.status_code == 503 and "scheduler has ended" in answer.json()["reason"]


def test_an_engine_that_always_fails_is_unhealthy_until_it_does_not(serve: Serve) -> None:
    with serve() as server:
        for _ in range(3):
            assert health(server).status_code == 200
            server.session.failure, server.session.failing_step = RuntimeError("no memory"), 1
            assert complete(server).status_code == 500
        answer = health(server)
        assert answer.status_code == 503 and "engine fails" in answer.json()["reason"]
        assert "no memory" not in answer.text
        server.session.failure = None
        assert complete(server).status_code == 200 and health(server).status_code == 200


def test_forty_saves_that_wait_hold_up_no_one_else(
    serve: Serve, hanging: Callable[[Served], threading.Event], tmp_path: Path
) -> None:
    with serve(Settings(log=False, saved=tmp_path)) as server:
        assert complete(server).status_code == 200
        server.model.scheduler.store.clear()
        go = hanging(server)
        save = "/slots/0?action=save"
        waiting = [send(server, {"filename": f"s{i}"}, save) for i in range(40)]
        until(lambda: server.model.scheduler.running > 0)
        assert health(server).status_code == 200
        tokens = httpx.post(f"{server.url}/tokenize", json={"content": "hello"}, timeout=60)
        assert tokens.status_code == 200
        assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 200
        go.set()
        statuses = []
        for each in waiting:
            statuses.append(each.recv(100).split()[1])
            each.close()
        assert set(statuses) <= {b"200", b"429"} and b"200" in statuses


def test_a_replaced_artifact_is_unhealthy(
    demo_artifact: Path, tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its session would refuse every conversation from then on."""
    artifact = tmp_path / "demo"
    shutil.copytree(demo_artifact, artifact)
    model = open_model(artifact, chat=False)
    try:
        check = Health({"demo": model})
        check.look()
        assert check.problems() == {}
        weights = artifact / "model.onnx.data"
        shutil.copy(weights, tmp_path / "new")
        (tmp_path / "new").replace(weights)
        with pytest.raises(RequestError, match="changed while it was open"):
            model.require_unchanged()
        check.look()
        check.look()
        (problem,) = check.problems().values()
        assert "restart the server" in problem and str(tmp_path) not in problem
        assert capsys.readouterr().err.count(str(weights)) == 1
    finally:
        model.close()


def test_the_files_are_watched(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RequestError("it changed")

    monkeypatch.setattr("rgexport.serve.health._LOOK_SECONDS", 0.01)
    with serve() as server:
        check = Health({"toy": server.model})
        check.start()
        monkeypatch.setattr(server.model, "require_unchanged", fail)
        until(lambda: bool(check.problems()))
        monkeypatch.setattr(server.model, "require_unchanged", lambda: None)
        until(lambda: not check.problems())
        check.close()
