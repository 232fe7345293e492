"""Opening GGUF files: sound, foreign, damaged anywhere; and the self-check's result in them.

That result is of fixed width, not hashed, and valid for the file's types only.
"""

import json
import re
import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from rgexport.artifacts.gguf import integrity
from rgexport.artifacts.gguf.format import open_gguf
from rgexport.artifacts.manifest import NOT_ASKED_FOR, CheckRecord, skipped
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize.gguf_header import read_header
from tests.artifacts import export_random_gguf
from tests.models import make_config, random_weights, write_hugging_face
from tests.quantize.ggml_files import write_tensors

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)
FOUND = CheckRecord(
    **{"status": "verified", "tokens": 32, "positions": 32, "kl": 0.0123456789},
    **{"kl_standard_error": 0.001, "relative_max": 0.004, "engine": "llama.cpp 1"},
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return export_random_gguf(CONFIG, tmp_path_factory.mktemp("sound"), "f16")[0]


def overwrite(key, text):
    def change(artifact, data):
        end = artifact.header.spans[key][1]
        data[end - len(text) : end] = text

    return change


DAMAGE = {
    "truncated": (lambda a, d: d.__delitem__(slice(-33, None)), "is truncated"),
    "data": (lambda a, d: d.__setitem__(-40, d[-40] ^ 1), "its tensors were altered"),
    "name": (overwrite("general.name", b"m"), "its metadata were altered"),
    "data hash": (overwrite(integrity.DATA, b"0"), "its tensors were altered|other types"),
    "metadata hash": (overwrite(integrity.METADATA, b"x"), "its metadata were altered"),
    "types hash": (overwrite(integrity.TYPES, b"x"), "other types of tensors"),
    "file type": (overwrite(integrity.FILE_TYPE, b"\xff"), "the file type .*expected"),
    "architecture": (overwrite("general.architecture", b"x"), "'?recurrentgemmx'?; expected"),
}
"""Damage that the header's reader does not see, and what is said of it."""


def refusal(path):
    with pytest.raises(RequestError) as caught:
        open_artifact(path)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and str(path.name) in line and len(line) < 600
    return line


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(sound, tmp_path, case):
    change, complaint = DAMAGE[case]
    data = bytearray(sound.path.read_bytes())
    change(sound, data)
    path = tmp_path / f"{case}.bin"
    path.write_bytes(data)
    assert re.search(complaint, refusal(path))


@pytest.mark.parametrize(
    ("architecture", "parts", "complaint"),
    [
        ("llama", None, "of the architecture llama; expected recurrentgemma"),
        ("recurrentgemma", None, "was not made by rgexport .*`rgexport gguf`"),
        ("recurrentgemma", 2, "one of 2 parts .*llama-gguf-split --merge"),
    ],
)
def test_files_of_other_tools(architecture, parts, complaint, tmp_path):
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_file_type(1)
    if parts:
        writer.add_key_value("split.count", parts, GGUFValueType.UINT16)
    write_tensors(writer, {"token_embd.weight": np.ones((4, 32), np.float16)})
    assert re.search(complaint, refusal(path))


@pytest.fixture
def checked(tmp_path):
    """A file whose check is `FOUND`."""
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
    target = tmp_path / "checked.gguf"

    def check(path):
        assert open_gguf(path).manifest.check == NOT_ASKED_FOR and not target.exists()
        return FOUND

    return export_gguf(open_checkpoint(model), GgufOptions(type="f16"), target, check=check)


def test_nothing_else_in_the_file_depends_on_the_check(checked, tmp_path):
    plain = tmp_path / "plain.gguf"
    export_gguf(open_checkpoint(tmp_path / "model"), GgufOptions(type="f16"), plain)
    assert open_gguf(plain).manifest.check == NOT_ASKED_FOR
    integrity.write_check(plain, FOUND)
    assert plain.read_bytes() == checked.read_bytes()
    assert open_gguf(plain, verify=True).manifest.check == FOUND
    field = GGUFReader(plain).fields[integrity.CHECK]
    assert json.loads(field.contents())["status"] == "verified"


@pytest.mark.parametrize("reason", ["", "é", "x" * 5000, "😀" * 300, '"' * 300, "\udc80" * 5000])
def test_any_reason_fits(reason, checked):
    record = skipped(reason)
    text = integrity.check_text(record)
    assert len(text) == integrity.CHECK_WIDTH and text.isascii()
    integrity.write_check(checked, record)
    read = open_gguf(checked).manifest.check
    shown = read.reason.removesuffix("...")
    assert record.reason.startswith(shown) and len(shown) >= min(len(reason), 40)
    assert read.sentence.isprintable()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"status": "fine"}', '{"status": "skipped", "kl": NaN}']
)
def test_an_unreadable_check_is_refused(text, checked):
    _, stop = read_header(checked).spans[integrity.CHECK]
    with checked.open("r+b") as file:
        file.seek(stop - integrity.CHECK_WIDTH)
        file.write(text.ljust(integrity.CHECK_WIDTH).encode())
    with pytest.raises(RequestError, match=r"is damaged: .*rgexport\.check"):
        open_gguf(checked)


def test_a_check_counts_only_for_the_types_that_it_was_made_for(checked, tmp_path, capsys):
    """As llama-quantize leaves a file: other data in other types, the metadata as they were."""
    bf16, name, data = 30, b"token_embd.weight", bytearray(checked.read_bytes())
    dimensions = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    struct.pack_into("<I", data, dimensions + 4 + 8 * 2, bf16)
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    with pytest.raises(RequestError, match="it states other types of tensors than the data have"):
        open_gguf(other)
    data[-40] ^= 1
    other.write_bytes(data)
    artifact = open_gguf(other)
    assert artifact.manifest.check == skipped("another tool stored its tensors in other types")
    assert artifact.manifest.plan["embed_tokens.weight"].label == "bf16"
    assert run(["inspect", str(other), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "Not checked: another tool stored its tensors in other types." in shown
    assert "there is no hash to check them with" in shown


def test_a_manifest_of_another_version_is_refused(sound, monkeypatch):
    monkeypatch.setattr("rgexport.artifacts.gguf.integrity.FORMAT_VERSION", 2)
    assert "format version is 1; this rgexport reads 2" in refusal(sound.path)
