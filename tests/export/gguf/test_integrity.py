"""The self-check's result in a GGUF file: of fixed width, not hashed, valid for its types only."""

import json
import struct
from pathlib import Path

import pytest
from gguf import GGUFReader

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export import verified
from rgexport.export.checked import NOT_ASKED_FOR, CheckRecord, skipped
from rgexport.export.gguf import integrity
from rgexport.export.gguf.artifact import open_gguf
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize.gguf_header import read_header
from tests.artifacts import require_ggml
from tests.llama_tools import run_tool
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)
FOUND = CheckRecord(
    **{"status": "verified", "tokens": 32, "positions": 32, "kl": 0.0123456789},
    **{"kl_standard_error": 0.001, "relative_max": 0.004, "engine": "llama.cpp 1"},
)


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    """A file whose check is `FOUND`."""
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
    options, target = GgufOptions(type="f16"), tmp_path / "checked.gguf"
    return export_gguf(open_checkpoint(model), options, target, check=lambda path: FOUND)


def test_nothing_else_in_the_file_depends_on_the_check(checked, tmp_path):
    plain = tmp_path / "plain.gguf"
    export_gguf(open_checkpoint(tmp_path / "model"), GgufOptions(type="f16"), plain)
    assert open_gguf(plain).manifest.check == NOT_ASKED_FOR
    integrity.write_check(plain, FOUND)
    assert plain.read_bytes() == checked.read_bytes()
    assert open_gguf(plain, verify=True).manifest.check == FOUND
    field = GGUFReader(plain).fields[integrity.CHECK]
    assert json.loads(field.contents())["status"] == "verified"


def test_the_check_opens_the_file_before_it_is_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("RGEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "hash_file", None)
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
    seen = []

    def check(path: Path) -> CheckRecord:
        seen.append((path.name, open_gguf(path).manifest.check, target.exists()))
        return FOUND

    target = tmp_path / "x.gguf"
    export_gguf(open_checkpoint(model), GgufOptions(type="f16"), target, check=check)
    ((name, before, there),) = seen
    assert name.startswith(".x.gguf.partial-") and before == NOT_ASKED_FOR and not there
    assert open_gguf(target).manifest.check == FOUND


@pytest.mark.parametrize("letter", ["x", "é", "😀", '"', "\udc80"])
@pytest.mark.parametrize("length", [0, 1, 300, 5000])
def test_any_reason_fits(letter, length, checked):
    record = skipped(letter * length)
    text = integrity.check_text(record)
    assert len(text) == integrity.CHECK_WIDTH and text.isascii()
    integrity.write_check(checked, record)
    found = open_gguf(checked).manifest.check
    shown = found.reason.removesuffix("...")
    assert record.reason.startswith(shown) and len(shown) >= min(length, 40)
    assert found.sentence.isprintable()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"status": "fine"}', '{"status": "skipped", "kl": NaN}']
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
    assert not artifact.facts()["gguf"]["data_hash"]
    assert run(["inspect", str(other), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "Not checked: another tool stored its tensors in other types." in shown
    assert "there is no hash to check them with" in shown


@pytest.mark.parametrize(("kind", "counts"), [("F32", False), ("Q8_0", False), ("COPY", True)])
def test_a_check_that_llama_quantize_copies(kind, counts, checked, tmp_path, llama_tools):
    require_ggml()
    theirs = tmp_path / "theirs.gguf"
    run_tool(llama_tools / "llama-quantize", checked, theirs, kind)
    assert integrity.check_text(FOUND) == read_header(theirs).values[integrity.CHECK]
    found = open_gguf(theirs).manifest.check
    assert found == (FOUND if counts else skipped("another tool stored its tensors in other types"))
