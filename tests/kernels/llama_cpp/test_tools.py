"""llama.cpp's own tools, built from the patched tree, on the demo model in f32."""

import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

import rgexport.validate
from rgexport.cli import run
from rgexport.griffin.checkpoint import demo_folder, open_checkpoint
from tests.deepmind import deepmind_logits, deepmind_model
from tests.llama_tools import run_tool

SAMPLE = Path(rgexport.validate.__file__).with_name("sample.txt").read_text("utf-8")
TEXT = SAMPLE.partition("<start_of_turn>")[0].rstrip("\n")
"""Without turn tokens, which the tools rightly read as text, and SentencePiece does not."""
CHUNK = 512
EXACT = "-fa", "off", "-ctk", "f32", "-ctv", "f32"
"""Attention and its cache in float32."""
_NGRAM = "--spec-ngram-simple-size"
DRAFTS = "--spec-type", "ngram-simple", f"{_NGRAM}-n", "4", f"{_NGRAM}-m", "8"
"""Eight tokens are drafted by what followed the last four before."""
PROMPTS = "Once upon a time", "It is a truth universally acknowledged, that", "To install it, run"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tools") / "demo.gguf"
    assert run(["gguf", "--size", "demo", "--type", "f32", "--no-check", "-o", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def text(demo: Path) -> Path:
    file = demo.with_name("text")
    file.write_text(TEXT, "utf-8")
    return file


@pytest.fixture(scope="module")
def deepmind_perplexity() -> list[float]:
    """As llama-perplexity has it: chunks that begin with <bos>, whose second halves count.

    Of the first chunk, the first two, and so on.
    """
    checkpoint = open_checkpoint(size="demo")
    weights = {
        name: torch.from_numpy(tensor.whole().astype(np.float32))
        for name, tensor in checkpoint.weights.items()
    }
    model = deepmind_model(checkpoint.config, weights)
    pieces = SentencePieceProcessor(model_file=str(demo_folder() / "tokenizer.model"))
    ids = [pieces.bos_id(), *pieces.encode(TEXT)]
    chunks = np.array(ids[: len(ids) // CHUNK * CHUNK]).reshape(-1, CHUNK)
    chunks[:, 0] = pieces.bos_id()
    logits = torch.from_numpy(deepmind_logits(model, chunks))[:, CHUNK // 2 : -1]
    expected = torch.from_numpy(chunks[:, CHUNK // 2 + 1 :])
    losses = torch.nn.functional.cross_entropy(logits.mT, expected, reduction="none").mean(1)
    return (losses.cumsum(0) / torch.arange(1, len(losses) + 1)).exp().tolist()


@pytest.mark.parametrize(("options", "tolerance"), [(EXACT, 1e-4), ((), 3e-3)], ids=["f32", "f16"])
def test_perplexity_is_deepminds(llama_tools, demo, text, deepmind_perplexity, options, tolerance):
    """Without options, llama.cpp attends in float16."""
    asked = "--no-escape", "-m", demo, "-f", text, "-c", CHUNK, "-b", CHUNK, "-ub", 64, "-t", 1
    printed = run_tool(llama_tools / "llama-perplexity", *asked, *options)
    found = {int(n): float(value) for n, value in re.findall(r"\[(\d+)\]([\d.]+),", printed)}
    # The program may exit before its log has written the last of them.
    assert len(found) >= len(deepmind_perplexity) - 1 > 1, printed
    for count, value in found.items():
        assert value == pytest.approx(deepmind_perplexity[count - 1], rel=tolerance)


def test_imatrix_serves_our_exporter(llama_tools, demo, text, tmp_path):
    importance, target = tmp_path / "imatrix.gguf", tmp_path / "demo-q4_k_m.gguf"
    asked = "-m", demo, "-f", text, "-o", importance, "-c", CHUNK, "-t", 1
    run_tool(llama_tools / "llama-imatrix", *asked)
    asked = "--type", "q4_k_m", "--imatrix", importance, "-o", target
    assert run(["gguf", "--size", "demo", "--no-check", *map(str, asked)]) == 0
    run_tool(llama_tools / "llama-bench", "-m", target, "-p", 8, "-n", 8, "-r", 1, "-t", 1)


@contextmanager
def serving(tools: Path, model: Path, *options: str) -> Iterator[str]:
    """Runs a llama-server with two slots, and gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = "--host", "127.0.0.1", "--port", str(port)
    always = "-np", "2", "-c", "2048", "-t", "1", *EXACT
    command = [str(tools / "llama-server"), "-m", str(model), *place, *always, *options]
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


@pytest.fixture(scope="module")
def server(llama_tools: Path, demo: Path) -> Iterator[str]:
    """The address of a server that drafts from what it has seen."""
    with serving(llama_tools, demo, *DRAFTS) as address:
        yield address


def ask(address: str, path: str, **request: Any) -> Any:
    body = json.dumps(request).encode()
    asked = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return json.load(answer)


def completion(address: str, prompt: str) -> str:
    return ask(address, "/completion", prompt=prompt, n_predict=24, temperature=0)["content"]


def test_server_continues_as_we_do(server, demo, capsys):
    for prompt in PROMPTS:
        assert run(["generate", str(demo), "-p", prompt, "-n", "24", "--threads", "1"]) == 0
        ours = capsys.readouterr().out.removesuffix("\n")
        assert completion(server, prompt) == ours


def test_server_keeps_conversations_apart(server):
    alone = [completion(server, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = pool.map(completion, [server] * 6, PROMPTS * 2)
        assert list(together) == alone * 2


def test_server_drafts_from_its_prompt(server, demo, capsys):
    prompt = " ".join(["The cat sat on the mat. The dog sat on the mat."] * 2)[:-5]
    assert run(["generate", str(demo), "-p", prompt, "-n", "200", "--threads", "1"]) == 0
    answer = ask(server, "/completion", prompt=prompt, n_predict=200, temperature=0)
    assert answer["content"] == capsys.readouterr().out.removesuffix("\n")
    assert answer["timings"]["draft_n_accepted"] > 0


def chat(address: str, messages: list[dict[str, str]], *, cached: bool = True) -> tuple[str, Any]:
    """Returns the reply, and how many tokens were used for it."""
    asked = {"messages": messages, "max_tokens": 24, "temperature": 0, "id_slot": 0}
    answer = ask(address, "/v1/chat/completions", **asked, cache_prompt=cached)
    return answer["choices"][0]["message"]["content"], answer["usage"]


@pytest.mark.parametrize("options", [(), DRAFTS], ids=["plain", "drafts"])
def test_server_reads_only_the_new_tokens_of_a_turn(llama_tools, demo, options):
    """After a text that is longer than the attention window (256), and where a turn is repeated."""
    story = {"role": "user", "content": "Once there was a king who had three daughters. " * 40}
    with serving(llama_tools, demo, *options) as address:
        reply, usage = chat(address, [story])
        assert usage["prompt_tokens"] > 300
        said, replies = [story, {"role": "assistant", "content": reply}], {}
        for content, most in (("And you?", 32), ("And you? " * 8, 64), ("Who am I?", 64)):
            replies[content], usage = chat(address, [*said, {"role": "user", "content": content}])
            read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            assert 0 < read <= most
        for content, answer in replies.items():
            turn = {"role": "user", "content": content}
            assert answer == chat(address, [*said, turn], cached=False)[0]
