"""Many clients at once, engines that hang or fail, and replies that are cut off."""

import json
import logging
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from rgexport.chat.from_artifact import open_model
from rgexport.chat.model import Model
from rgexport.errors import RequestError
from rgexport.serve.app import _config, _Server, create_app
from rgexport.serve.exchange import Limits
from rgexport.serve.monitoring import Health
from rgexport.serve.server import ServerSettings
from tests.chat.conftest import IDENTITY
from tests.serve.conftest import CHAT, COMPLETE, delay, error_of, held, messages_of, running, until
from tests.toy_session import ToySession


def body(text, **fields):
    return {"messages": messages_of(text), "temperature": 0} | fields


def hear(server, text, wait):
    """Returns the streamed reply to a text."""
    reply, asked = "", body(text, max_tokens=40, stream=True)
    with httpx.stream("POST", server.url + CHAT, json=asked, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                reply += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                time.sleep(wait)
    return reply


def vanish(server, number):
    """Sends garbage and asks for very many tokens, reads nothing, and leaves."""
    begin = (b"", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999\r\n\r\n")
    noise = begin[number % 2] + random.Random(number).randbytes(2000)
    asked = body(f"gone {number}", max_tokens=10**7, stream=number > 3)
    with server.connect(noise), server.send(CHAT, asked):
        time.sleep(0.2)


def wait_until_idle(model):
    for _ in range(3):  # a reply that has ended begins the reading of its turn's end
        until(lambda: not model.scheduler.running and not model.scheduler.waiting)
        time.sleep(0.02)
        model._settling.submit(int).result(60)


def test_32_conversations_beside_bad_clients(serve):
    """Each hears what it would hear alone; who leaves frees the row within steps."""
    texts = [f"hello {i} " * (1 + i % 9) for i in range(32)]
    settings = ServerSettings(log=False, limits=Limits(new_tokens=10**7))
    with serve(settings, rows=8) as server, ThreadPoolExecutor(40) as pool:
        model = server.model
        alone = [model.chat(messages_of(text), max_new_tokens=40).text for text in texts]
        model.scheduler.store.clear()
        leaving = [pool.submit(vanish, server, number) for number in range(8)]
        waits = [0.02] * 4 + [0] * 28
        assert [*pool.map(hear, [server] * 32, texts, waits)] == alone
        for each in leaving:
            each.result()
        wait_until_idle(model)
        assert model.scheduler.counters.new_tokens < 10**6 and not model.scheduler._admission._live


def test_a_full_queue_is_429(serve):
    with serve(rows=1, max_waiting=1) as server, ExitStack() as clients:
        scheduler = server.model.scheduler
        for count in (1, 2):
            asked = body("hello", max_tokens=4000, stream=True)
            clients.enter_context(server.send(CHAT, asked))
            until(lambda n=count: scheduler.running + scheduler.waiting >= n)
        assert "asks for 3 replies" in error_of(server.post(CHAT, body("no", n=3)))
        for more in ({}, {"stream": True}, {"n": 2}):
            answer = server.post(CHAT, body("no", max_tokens=1, **more))
            assert "requests wait already" in error_of(answer, 429)
            assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_has_its_time(is_stream, serve):
    limits = Limits(seconds=0.3, ping_seconds=0.05)
    with serve(ServerSettings(log=False, limits=limits)) as server:
        delay(server.session, 0.15)
        answer = server.post(CHAT, body("hello", max_tokens=1000, stream=is_stream))
        assert answer.status_code == (200 if is_stream else 504)
        assert "the answer takes longer than 0.3 s" in answer.text
        if is_stream:
            assert answer.text.split("\n\n")[0] == ": reading", "a sign that it has not ended"
        wait_until_idle(server.model)
        assert server.model.scheduler.counters.new_tokens < 50


@pytest.mark.parametrize("grace_seconds", [0, 2])
def test_an_answer_past_the_servers_end_is_an_error(grace_seconds, gemma, template, caplog):
    session = ToySession(gemma.vocab_size)
    delay(session, 0.05)
    model = Model(session, gemma, template, IDENTITY, rows=4)
    settings = ServerSettings(log=False, port=0, grace_seconds=grace_seconds)
    server = _Server(_config(create_app({model.name: model}, settings), settings))
    with running(server) as url, ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(httpx.post, url + CHAT, json=body("hello", stream=is_stream), timeout=60)
            for is_stream in (False, True)
        ]
        until(lambda: model.scheduler.running == 2 and model.scheduler.counters.new_tokens > 2)
        server.should_exit = True
        whole, stream = (each.result() for each in asked)
    model.close()
    error_of(whole, 503)
    assert whole.json()["error"]["type"] == "server_error"
    last = stream.text.rstrip().split("\n\n")[-1]
    assert '"the server ends' in last and "server_error" in last
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


ASKED = {"prompt": "hello", "max_tokens": 2, "temperature": 0}
"""Greedy, because a sampled first token may end the reply before the step that fails."""


def reason(server):
    """Returns why a server is unhealthy, or nothing."""
    answer = server.get("/health")
    assert answer.status_code == (200 if answer.json()["status"] == "ok" else 503)
    return answer.json().get("reason", "")


def test_a_scheduler_that_hangs_is_unhealthy_until_it_goes_on(serve):
    with serve() as server:
        assert server.post(COMPLETE, ASKED).status_code == 200 and not reason(server)
        silence, scheduler = Health({"toy": server.model}, stall_seconds=0), server.model.scheduler
        scheduler._longest_pass = 0.0
        time.sleep(0.01)
        assert silence.problems() == {}, "nobody waits"
        with held(server), server.send(COMPLETE, ASKED):
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
            answer = server.post(COMPLETE, ASKED)
            assert error_of(answer, 500) == "the engine failed; the server's log says why"
            error = answer.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
        assert "engine fails" in reason(server) and "no memory" not in reason(server)
        server.session.failure = None
        assert server.post(COMPLETE, ASKED).status_code == 200
        assert not reason(server)


def test_a_replaced_artifact_is_unhealthy(demo_artifact, tmp_path, capsys, monkeypatch):
    """Its session would refuse every conversation from then on."""
    monkeypatch.setattr("rgexport.serve.monitoring._LOOK_SECONDS", 0.01)
    artifact = shutil.copytree(demo_artifact, tmp_path / "demo")
    weights = artifact / "model.onnx.data"
    with open_model(artifact, chat=False) as model:
        check = Health({"demo": model})
        check.look()
        assert check.problems() == {}
        check.start()
        shutil.copy(weights, tmp_path / "new").replace(weights)
        until(check.problems)
        check.close()
        (problem,) = check.problems().values()
        assert "restart the server" in problem and str(tmp_path) not in problem
        assert capsys.readouterr().err.count(str(weights)) == 1
        with pytest.raises(RequestError, match="changed while it was open"):
            model.require_unchanged()
