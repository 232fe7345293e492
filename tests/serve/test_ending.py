"""What clients get whose replies are not complete when the server's time is over."""

import logging
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rgexport.chat.model import Model
from rgexport.serve.app import Settings, create_app
from rgexport.serve.run import Listening, _config, _Server
from tests.chat.conftest import IDENTITY
from tests.serve.conftest import CHAT, error_of, messages_of, running, slow_down, until
from tests.toy_session import ToySession


@pytest.mark.parametrize("grace_seconds", [0, 2])
def test_an_answer_past_its_time_is_an_error(grace_seconds, gemma, template, caplog):
    session = ToySession(gemma.vocab_size)
    asked = {"messages": messages_of("hello"), "temperature": 0}
    slow_down(session, 0.05)
    model = Model(session, gemma, template, IDENTITY, rows=4)
    app = create_app({model.name: model}, Settings(log=False))
    server = _Server(_config(app, Listening(port=0, grace_seconds=grace_seconds)))
    server.config.port = 0
    with (
        caplog.at_level(logging.ERROR),
        ThreadPoolExecutor(1) as pool,
        running(server) as url,
        httpx.stream("POST", url + CHAT, json=asked | {"stream": True}, timeout=60) as stream,
    ):
        whole = pool.submit(httpx.post, url + CHAT, json=asked, timeout=60)
        lines = stream.iter_lines()
        next(lines)
        until(lambda: model.scheduler.running == 2)
        server.should_exit = True
        events = [line for line in lines if line.startswith("data: ")]
    model.close()
    assert '"the server ends' in events[-1] and "server_error" in events[-1]
    error_of(whole.result(), 503)
    assert whole.result().json()["error"]["type"] == "server_error"
    assert not caplog.records, "no traceback"
