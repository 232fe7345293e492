"""What clients get whose replies are not complete when the server's time is over."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from rgexport.chat.model import Model
from rgexport.chat.template import ChatTemplate
from rgexport.chat.tokenizer import Tokenizer
from rgexport.serve.app import Settings, create_app
from rgexport.serve.run import Listening, _config, _Server
from tests.chat.conftest import IDENTITY
from tests.toy_session import ToySession

ASKED = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@pytest.fixture
def model(gemma: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose replies take minutes."""
    session = ToySession(gemma.vocab_size)
    take = session._take
    monkeypatch.setattr(session, "_take", lambda *args: (time.sleep(0.05), take(*args))[1])
    return Model(session, gemma, template, IDENTITY, rows=4)


@contextmanager
def ending(model: Model, grace_seconds: int) -> Iterator[tuple[str, _Server]]:
    app = create_app({model.name: model}, Settings(log=False))
    server = _Server(_config(app, Listening(port=0, grace_seconds=grace_seconds)))
    server.config.port = 0
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1/chat/completions", server
    thread.join(60)
    assert not thread.is_alive()
    model.close()


@pytest.mark.parametrize("grace_seconds", [0, 2])
def test_an_answer_past_its_time_is_an_error(
    model: Model, grace_seconds: int, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[httpx.Response] = []
    with ending(model, grace_seconds) as (url, server), caplog.at_level(logging.ERROR):

        def ask() -> None:
            answers.append(httpx.post(url, json=ASKED, timeout=60))

        waiting = threading.Thread(target=ask)
        waiting.start()
        with httpx.stream("POST", url, json=ASKED | {"stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            while model.scheduler.running < 2:
                time.sleep(0.01)
            server.should_exit = True
            events = [line for line in lines if line.startswith("data: ")]
        waiting.join()
    assert '"the server ends' in events[-1] and "server_error" in events[-1]
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["type"] == "server_error"
    assert not caplog.records, "no traceback"
