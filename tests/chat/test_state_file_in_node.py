"""State files that JavaScript reads and writes: they are those of rgexport/chat/state_file.py."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import rgexport.npm
from rgexport.chat.state_file import read_state, write_state
from tests.chat.conftest import IDENTITY
from tests.chat.test_state_file import SHAPES, saved_state

pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")

MODULE = Path(rgexport.npm.__file__).with_name("state_file.mjs")
READ_AND_WRITE = f"""
import {{ readFile, writeFile }} from "node:fs/promises";
import {{ readState, writeState }} from {json.dumps(MODULE.as_uri())};
const [source, target, text] = process.argv.slice(1);
const model = JSON.parse(text);
const {{ ids, position, messages, arrays }} = await readState(model, await readFile(source));
const options = {{ messages, pending: ids.slice(position) }};
await writeFile(target, await writeState(model, ids.slice(0, position), arrays, options));
"""


def read_and_write(source: Path, target: Path, model: dict) -> subprocess.CompletedProcess[str]:
    command = ["node", "--input-type=module", "-e", READ_AND_WRITE, str(source), str(target)]
    return subprocess.run([*command, json.dumps(model)], capture_output=True, text=True)


@pytest.fixture
def model() -> dict:
    """Returns the record in an artifact's config.json, with keys and values in rings."""
    states = []
    for name, shape in SHAPES.items():
        layout = "ring" if name.endswith(("key", "value")) else "row"
        states.append({"name": name, "layout": layout, "dtype": "float32", "shape": shape})
    return {"identity": asdict(IDENTITY), "version": "1", "states": states}


@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_python_wrote_is_read_and_written(dtype, pending, model, tmp_path):
    """After more tokens than the window has, so that a ring begins in its middle."""
    saved = saved_state(dtype, pending, count=70)
    write_state(tmp_path / "a.state", saved)
    done = read_and_write(tmp_path / "a.state", tmp_path / "b.state", model)
    assert done.returncode == 0, done.stderr
    loaded = read_state(tmp_path / "b.state", SHAPES)
    assert (loaded.identity, loaded.messages) == (saved.identity, saved.messages)
    assert loaded.position == 70 - pending and loaded.key == saved.key
    np.testing.assert_array_equal(loaded.tokens, saved.tokens)
    for name, array in saved.state.items():
        np.testing.assert_array_equal(loaded.state[name], array.astype(loaded.state[name].dtype))


def test_another_model_and_damage_are_refused(model, tmp_path):
    source = tmp_path / "a.state"
    write_state(source, replace(saved_state(), identity=replace(IDENTITY, window=7)))
    assert "a window of 7 tokens" in read_and_write(source, source, model).stderr
    write_state(source, saved_state())
    data = source.read_bytes()
    source.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "the state file is damaged" in read_and_write(source, source, model).stderr
