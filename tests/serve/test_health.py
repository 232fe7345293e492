"""/health says what no longer answers, and waits for nothing itself."""

import shutil
import time

import pytest

from rgexport.chat.from_artifact import open_model
from rgexport.errors import RequestError
from rgexport.serve.app import Settings
from rgexport.serve.health import Health
from tests.serve.conftest import COMPLETE, get, held, post, send, until

ASKED = {"prompt": "hello", "max_tokens": 2}


def complete(server, status=200):
    assert post(server, COMPLETE, ASKED).status_code == status


def reason(server):
    """Returns why a server is unhealthy, or nothing."""
    answer = get(server, "/health")
    assert answer.status_code == (200 if answer.json()["status"] == "ok" else 503)
    return answer.json().get("reason", "")


def test_a_scheduler_that_hangs_is_unhealthy_until_it_goes_on(serve):
    with serve() as server:
        complete(server)
        assert not reason(server)
        silence, scheduler = Health({"toy": server.model}, stall_seconds=0), server.model.scheduler
        scheduler._longest_pass = 0.0
        time.sleep(0.01)
        assert silence.problems() == {}, "nobody waits"
        with held(server), send(server, COMPLETE, ASKED):
            until(lambda: "no progress" in silence.problems().get("toy", ""))
            assert not reason(server), "a minute has not passed"
            scheduler._passed -= 3600
            assert reason(server).startswith("toy: it has made no progress for 36")
            scheduler._longest_pass = 1000.0
            assert not reason(server), "a slow engine may take as long as before"
            scheduler._longest_pass = 0.0
            assert reason(server)
        until(lambda: not reason(server))
        scheduler.close()
        assert "scheduler has ended" in reason(server)


def test_an_engine_that_always_fails_is_unhealthy_until_it_does_not(serve):
    with serve() as server:
        for _ in range(3):
            assert not reason(server)
            server.session.failure, server.session.failing_step = RuntimeError("no memory"), 1
            complete(server, 500)
        assert "engine fails" in reason(server) and "no memory" not in reason(server)
        server.session.failure = None
        complete(server)
        assert not reason(server)


def test_forty_saves_that_wait_hold_up_no_one_else(serve, tmp_path):
    with serve(Settings(log=False, saved=tmp_path)) as server:
        complete(server)
        server.model.scheduler.store.clear()
        with held(server):
            save = "/slots/0?action=save"
            waiting = [send(server, save, {"filename": f"s{i}"}) for i in range(40)]
            until(lambda: server.model.scheduler.running > 0)
            assert not reason(server) and get(server, "/metrics").status_code == 200
            assert post(server, "/tokenize", {"content": "hello"}).status_code == 200
        statuses = set()
        for each in waiting:
            with each:
                statuses.add(each.recv(100).split()[1])
        assert b"200" in statuses <= {b"200", b"429"}


def test_a_replaced_artifact_is_unhealthy(demo_artifact, tmp_path, capsys):
    """Its session would refuse every conversation from then on."""
    artifact = shutil.copytree(demo_artifact, tmp_path / "demo")
    weights = artifact / "model.onnx.data"
    with open_model(artifact, chat=False) as model:
        check = Health({"demo": model})
        check.look()
        assert check.problems() == {}
        shutil.copy(weights, tmp_path / "new").replace(weights)
        with pytest.raises(RequestError, match="changed while it was open"):
            model.require_unchanged()
        check.look()
        check.look()
        (problem,) = check.problems().values()
        assert "restart the server" in problem and str(tmp_path) not in problem
        assert capsys.readouterr().err.count(str(weights)) == 1


def test_the_files_are_watched(server, monkeypatch):
    def fail() -> None:
        raise RequestError("it changed")

    monkeypatch.setattr("rgexport.serve.health._LOOK_SECONDS", 0.01)
    check = Health({"toy": server.model})
    check.start()
    monkeypatch.setattr(server.model, "require_unchanged", fail)
    until(check.problems)
    monkeypatch.setattr(server.model, "require_unchanged", lambda: None)
    until(lambda: not check.problems())
    check.close()
