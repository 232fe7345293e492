"""Replies that are cut, or not spelled as the tokenizer would, in transformers.js.

The next turn goes on from them: it reads each token once.
"""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rgexport
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.markup import END_OF_TURN
from rgexport.griffin.state import POSITION
from tests.web.browser import HERE
from tests.web.npm import install_our_package, node_with_packages

DEMO = HERE.parents[1] / "demo" / "model"

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "artifact"
    return export_onnx(open_checkpoint(str(DEMO)), OnnxOptions(precision="int4"), folder)


REPLIES: dict[str, list[bytes | str]] = {
    "in other pieces": [b"H", b"e", b"l", b"l", b"o", b"."],
    "cut in a word": [b"Hello", b",", b" wo"],
    "with lines that the template trims": [b"Hello", b".", b"\n", b"\n", b"\n"],
    "with a space that the template trims": [b" I", b"t", b"."],
    "cut in a character": [b"Hello", b".", b"\xf0"],
    "in other pieces, to the end of the turn": [b"H", b"i", END_OF_TURN],
    "in other pieces, to the end of the text": [b"H", b"i", "<eos>"],
    "of one word": [b"Hello", END_OF_TURN],
}
"""Replies, piece by piece; names are those of special tokens."""


def tokens_of(pieces: list[bytes | str], tokenizer: Tokenizer) -> list[int]:
    ids = {tokenizer.surface(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [tokenizer.special[p] if isinstance(p, str) else ids[p] for p in pieces]


def conversation(artifact: Path, turns: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    node = node_with_packages()
    install_our_package(folder)
    job = folder / "job.json"
    job.write_text(json.dumps(turns))
    command = [node, "forced_replies.mjs", str(artifact), str(job)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_each_token_is_read_once(artifact: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(open_artifact(artifact))
    replies = {name: tokens_of(pieces, tokenizer) for name, pieces in REPLIES.items()}
    pieces = replies["in other pieces"]
    assert tokenizer.encode_text(tokenizer.decode(pieces)) != pieces
    asked = [{"content": f"A reply {name}, please.", "ids": ids} for name, ids in replies.items()]
    turns = conversation(artifact, asked, tmp_path)
    seen, file = 0, tmp_path / "chat.state"
    with rgexport.load(artifact) as model, rgexport.load(artifact) as fresh:
        for turn, (name, ids) in zip(turns, replies.items(), strict=True):
            file.write_bytes(base64.b64decode(turn["state"]))
            saved = model.load_state(file)
            assert turn["read"] == saved.position - seen, name
            seen = saved.position
            assert saved.tokens is not None
            assert saved.tokens[-len(ids) :].tolist() == ids, name
            assert saved.count == saved.position + 1  # a reply's last token is not read yet
            expected = fresh.state(saved.tokens[: saved.position].tolist())
            for state in expected.keys() - {POSITION}:
                np.testing.assert_allclose(saved.state[state], expected[state], atol=0.05)
