"""Opening GGUF files: sound, foreign, damaged anywhere."""

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.export import verified
from rgexport.export.gguf import integrity
from rgexport.export.gguf.artifact import GgufArtifact
from rgexport.export.gguf.format import FORMAT
from rgexport.export.opening import open_artifact
from rgexport.quantize.gguf_header import read_header
from tests.artifacts import export_random_gguf
from tests.models import make_config

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)

NUMBERS = itertools.count()
"""No two files have one name: within a tick of the clock they would count as the same."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> GgufArtifact:
    """A small file in f16."""
    return export_random_gguf(CONFIG, tmp_path_factory.mktemp("sound"), "f16")[0]


def copy(artifact: GgufArtifact, folder: Path, change: Callable[[bytearray], Any]) -> Path:
    """The file with a change to its bytes."""
    data = bytearray(artifact.path.read_bytes())
    change(data)
    path = folder / f"{next(NUMBERS)}.gguf"
    path.write_bytes(data)
    return path


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(RequestError) as caught:
        open_artifact(path, **options)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and str(path.name) in line and len(line) < 600
    return line


def test_opens_as_any_artifact(sound):
    artifact = open_artifact(sound.path)
    assert isinstance(artifact, GgufArtifact)
    manifest = artifact.manifest
    assert (manifest.kind, manifest.precision, manifest.compute) == ("gguf", "f16", "fp32")
    assert manifest.config == CONFIG and not manifest.has_tokenizer
    assert list(artifact.weights) == list(manifest.plan) == list(manifest.tensors)
    assert artifact.file(sound.path.name) == sound.path


def test_any_name_will_do(sound, tmp_path):
    path = tmp_path / "model.bin"
    shutil.copyfile(sound.path, path)
    assert open_artifact(path).manifest.kind == "gguf"
    assert FORMAT.owns(path) and FORMAT.owns(Path("nowhere.gguf")) and not FORMAT.owns(tmp_path)


def test_verify_does_not_use_the_cache(sound, tmp_path):
    path = copy(sound, tmp_path, lambda data: flip(sound, data))
    start = integrity.data_start(read_header(path))
    verified.remember({path: sound.header.values[integrity.DATA]}, start=start)
    open_artifact(path)
    assert "its tensors were altered" in refusal(path, verify=True)


def overwrite(key: str, text: bytes) -> Callable[[GgufArtifact, bytearray], None]:
    def change(artifact: GgufArtifact, data: bytearray) -> None:
        end = artifact.header.spans[key][1]
        data[end - len(text) : end] = text

    return change


def flip(artifact: GgufArtifact, data: bytearray) -> None:
    data[-40] ^= 1


def rename(artifact: GgufArtifact, data: bytearray) -> None:
    data[data.index(b"output_norm.weight")] = ord("x")


DAMAGE: dict[str, tuple[Callable[[GgufArtifact, bytearray], Any], str]] = {
    "truncated": (lambda a, d: d.__delitem__(slice(-33, None)), "is truncated"),
    "data": (flip, "its tensors were altered"),
    "name": (overwrite("general.name", b"m"), "its metadata were altered"),
    "data hash": (overwrite(integrity.DATA, b"0"), "its tensors were altered|other types"),
    "metadata hash": (overwrite(integrity.METADATA, b"x"), "its metadata were altered"),
    "types hash": (overwrite(integrity.TYPES, b"x"), "other types of tensors"),
    "file type": (overwrite(integrity.FILE_TYPE, b"\xff"), "the file type .*expected"),
    "architecture": (overwrite("general.architecture", b"x"), "'?recurrentgemmx'?; expected"),
    "tensor name": (rename, "xutput_norm.weight|output_norm.weight"),
}
"""Damage that the header's reader does not see, and what is said of it."""


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(sound, tmp_path, case):
    change, complaint = DAMAGE[case]
    line = refusal(copy(sound, tmp_path, lambda data: change(sound, data)))
    assert re.search(complaint, line), line


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_anywhere_is_refused_or_harmless(sound, tmp_path, data):
    """A byte changed, or bytes missing or added, at any place: one line, or nothing changes."""
    size = sound.path.stat().st_size
    header = integrity.data_start(sound.header)
    place = data.draw(st.integers(0, header + 200) | st.integers(0, size - 1), "place")

    def change(content: bytearray) -> None:
        match data.draw(st.sampled_from(["change", "cut", "drop", "add"]), "harm"):
            case "change":
                content[place] ^= data.draw(st.integers(1, 255), "bits")
            case "cut":
                del content[place:]
            case "drop":
                del content[place : place + data.draw(st.integers(1, 64), "count")]
            case "add":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=64), "added")

    path = copy(sound, tmp_path, change)
    try:
        opened = open_artifact(path)
    except RequestError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        first, second = opened.manifest, sound.manifest
        assert first.config == second.config and first.plan == second.plan
        for name in first.tensors:
            one, other = (artifact.tensor(name).whole() for artifact in (opened, sound))
            assert one.tobytes() == other.tobytes()
    finally:
        path.unlink()


FOREIGN = {
    "model": ("llama", None, "of the architecture llama; expected recurrentgemma"),
    "maker": ("recurrentgemma", None, "was not made by rgexport .*`rgexport gguf`"),
    "split": ("recurrentgemma", 2, "one of 2 parts .*llama-gguf-split --merge"),
}
"""What is foreign → architecture, parts, and the complaint."""


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_other_tools(case, tmp_path):
    architecture, parts, complaint = FOREIGN[case]
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_file_type(1)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float16))
    if parts:
        writer.add_key_value("split.count", parts, GGUFValueType.UINT16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert re.search(complaint, refusal(path))


def test_a_manifest_of_another_version(sound, tmp_path, monkeypatch):
    monkeypatch.setattr("rgexport.export.gguf.embedded.FORMAT_VERSION", 2)
    path = copy(sound, tmp_path, lambda data: None)
    assert "format version is 1; this rgexport reads 2" in refusal(path)


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, Path.touch])
def test_nothing_to_open(tmp_path, make):
    path = tmp_path / "x.gguf"
    make(path)
    assert refusal(path)
