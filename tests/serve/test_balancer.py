"""Two servers behind HAProxy, as docs/serving.md shows it."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.command_line import ROOT
from tests.serve.test_process import CHAT, Process, cached, said

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not shutil.which("haproxy"), reason="there is no haproxy"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port: int = opened.getsockname()[1]
        return port


def configuration(port: int, servers: list[Process]) -> str:
    """The one of the docs, with other addresses and quick checks."""
    text = (ROOT / "docs/serving.md").read_text()
    (found,) = re.findall(r"```haproxy\n(.*?)```", text, re.DOTALL)
    found = found.replace("bind :8000", f"bind 127.0.0.1:{port}")
    for name, address, server in zip("ab", ("10.0.0.1", "10.0.0.2"), servers, strict=True):
        place = server.url.removeprefix("http://")
        found = found.replace(f"server {name} {address}:8080", f"server {name} {place}")
    times = "    timeout connect 2s\n    timeout client 60s\n    timeout server 60s\n"
    return f"global\n    maxconn 100\ndefaults\n    mode http\n{times}\n{found}"


@pytest.fixture
def balanced(demo_artifact: Path, tmp_path: Path) -> Iterator[tuple[str, list[Process]]]:
    servers = [Process(demo_artifact, "--quiet", "--threads", "1") for _ in range(2)]
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(configuration(port, servers))
    balancer = subprocess.Popen(["haproxy", "-f", str(tmp_path / "haproxy.cfg")])
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 20
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end
        time.sleep(0.1)
    try:
        yield url, servers
    finally:
        balancer.kill()
        balancer.wait()
        for server in servers:
            server.process.kill()
            server.process.wait()


def talk(url: str, *texts: str) -> dict:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    answer = httpx.post(url + CHAT, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict = answer.json()
    return found


def test_turns_find_their_state_and_a_lost_server_costs_no_answer(
    balanced: tuple[str, list[Process]],
) -> None:
    url, servers = balanced
    talks = [[f"Hello, this is number {i}."] for i in range(8)]
    for texts in talks:
        texts += [said(talk(url, *texts)), "And now?"]
    for texts in talks:
        answer = talk(url, *texts)
        assert cached(answer) > 10, "the server that knows the conversation"
        texts += [said(answer), "Why?"]
    used = [httpx.get(f"{server.url}/slots").json() for server in servers]
    assert all(used), "both have had some"
    servers[0].process.kill()
    servers[0].process.wait()
    answers = [talk(url, *texts) for texts in talks]
    assert all(answer["usage"]["completion_tokens"] for answer in answers)
    assert any(cached(answer) == 0 for answer in answers), "some were read again"
    assert any(cached(answer) > 10 for answer in answers), "some were known"
