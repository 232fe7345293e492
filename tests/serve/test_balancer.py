"""Two servers behind HAProxy, as docs/serving.md shows it."""

import re
import shutil
import socket
import subprocess

import httpx
import pytest

from tests.command_line import ROOT
from tests.serve.conftest import Client, cached, said, until
from tests.serve.test_process import Process

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not shutil.which("haproxy"), reason="there is no haproxy"),
]


def configuration(port: int, servers: list[Process]) -> str:
    """The one of the docs, with other addresses and quick checks."""
    text = (ROOT / "docs/serving.md").read_text()
    (lines,) = re.findall(r"```haproxy\n(.*?)```", text, re.DOTALL)
    lines = lines.replace("bind :8000", f"bind 127.0.0.1:{port}")
    for name, address, server in zip("ab", ("10.0.0.1", "10.0.0.2"), servers, strict=True):
        real = server.url.removeprefix("http://")
        lines = lines.replace(f"server {name} {address}:8080", f"server {name} {real}")
    times = "    timeout connect 2s\n    timeout client 60s\n    timeout server 60s\n"
    return f"global\n    maxconn 100\ndefaults\n    mode http\n{times}\n{lines}"


class Balancer(Client):
    def __init__(self, servers: list[Process], folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        (folder / "haproxy.cfg").write_text(configuration(port, servers))
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(["haproxy", "-f", str(folder / "haproxy.cfg")])

    def is_healthy(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture
def balanced(demo_artifact, tmp_path):
    servers = [Process(demo_artifact, "--quiet", "--threads", "1") for _ in range(2)]
    balancer = Balancer(servers, tmp_path)
    try:
        until(balancer.is_healthy)
        yield balancer, servers
    finally:
        for each in (balancer, *servers):
            each.process.kill()
            each.process.wait()


def test_turns_find_their_state_and_a_lost_server_costs_no_answer(balanced):
    balancer, servers = balanced
    talks = [[f"Hello, this is number {i}."] for i in range(8)]
    for texts in talks:
        texts += [said(balancer.chat(*texts)), "And now?"]
    for texts in talks:
        answer = balancer.chat(*texts)
        assert cached(answer) > 10, "the server that knows the conversation"
        texts += [said(answer), "Why?"]
    assert all(server.get("/slots").json() for server in servers), "both have had some"
    servers[0].process.kill()
    servers[0].process.wait()
    answers = [balancer.chat(*texts) for texts in talks]
    assert all(answer["usage"]["completion_tokens"] for answer in answers)
    assert any(cached(answer) == 0 for answer in answers), "some were read again"
    assert any(cached(answer) > 10 for answer in answers), "some were known"
