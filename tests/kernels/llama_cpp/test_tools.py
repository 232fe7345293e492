"""llama.cpp's own tools, built from the patched tree, on the demo model in f32."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import rgexport.chat
from rgexport.cli import run
from tests.llama_tools import run_tool

EXACT = "-fa", "off", "-ctk", "f32", "-ctv", "f32"  # attention and its cache in float32
SIZE = "--spec-ngram-simple-size"
DRAFTS = "--spec-type", "ngram-simple", f"{SIZE}-n", "4", f"{SIZE}-m", "8"
"""Eight tokens are drafted by what followed the last four before."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    target = tmp_path_factory.mktemp("tools") / "demo.gguf"
    assert run(["gguf", "--size", "demo", "--type", "f32", "--no-check", "-o", str(target)]) == 0
    return target


def test_imatrix_serves_our_exporter(llama_tools, demo, tmp_path):
    text, importance, target = (tmp_path / name for name in ("text", "imatrix.gguf", "q4_k_m.gguf"))
    shutil.copy(Path(rgexport.chat.__file__).with_name("sample.txt"), text)
    asked = "-m", demo, "-f", text, "-c", 512, "-t", 1, "-o", importance
    run_tool(llama_tools / "llama-imatrix", *asked)
    options = "--type", "q4_k_m", "--imatrix", str(importance), "-o", str(target)
    assert run(["gguf", "--size", "demo", "--no-check", *options]) == 0
    run_tool(llama_tools / "llama-bench", "-m", target, "-p", 8, "-n", 8, "-r", 1, "-t", 1)


@contextmanager
def serving(tools, model, *options):
    """Runs a llama-server with two slots, and gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = "--host", "127.0.0.1", "--port", str(port), "-np", "2", "-c", "2048", "-t", "1"
    command = [str(tools / "llama-server"), "-m", str(model), *place, *EXACT, *options]
    log, address = model.with_name("server.log"), f"http://127.0.0.1:{port}"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as process,
    ):
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-4000:]
                with suppress(OSError):  # not there yet, or still loading
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(log.read_text()[-4000:])
            yield address
        finally:
            process.terminate()


def ask(address, path, **request):
    body = json.dumps(request | {"temperature": 0}).encode()
    asked = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return json.load(answer)


def test_server_keeps_conversations_apart_and_continues_as_we_do(llama_tools, demo, capsys):
    said = " ".join(["The cat sat on the mat. The dog sat on the mat."] * 2)[:-5]
    prompts, expected = ["Once upon a time", "To install it, run", said], []
    for prompt in prompts:
        assert run(["generate", str(demo), "-p", prompt, "-n", "99", "--threads", "1"]) == 0
        expected.append(capsys.readouterr().out.removesuffix("\n"))
    pool = ThreadPoolExecutor(len(prompts))
    with pool, serving(llama_tools, demo, *DRAFTS) as address:
        asked = partial(ask, address, "/completion", n_predict=99)
        answers = list(pool.map(lambda prompt: asked(prompt=prompt), prompts * 2))
    assert [answer["content"] for answer in answers] == expected * 2
    assert answers[-1]["timings"]["draft_n_accepted"] > 0


def chat(address, *messages, cached=True):
    """Returns the reply, and how many tokens were used for it."""
    roles = ["user", "assistant"] * len(messages)
    turns = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    asked = {"messages": turns, "max_tokens": 24, "id_slot": 0, "cache_prompt": cached}
    answer = ask(address, "/v1/chat/completions", **asked)
    return answer["choices"][0]["message"]["content"], answer["usage"]


@pytest.mark.parametrize("options", [(), DRAFTS], ids=["plain", "drafts"])
def test_server_reads_only_the_new_tokens_of_a_turn(llama_tools, demo, options):
    """After a text that is longer than the attention window (256), and where a turn is repeated."""
    story = "Once there was a king who had three daughters. " * 40
    with serving(llama_tools, demo, *options) as address:
        reply, usage = chat(address, story)
        assert usage["prompt_tokens"] > 300
        replies = {}
        for text, most in (("And you?", 32), ("And you? " * 8, 64), ("Who am I?", 64)):
            replies[text], usage = chat(address, story, reply, text)
            read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            assert 0 < read <= most
        for text, answer in replies.items():
            assert answer == chat(address, story, reply, text, cached=False)[0]
