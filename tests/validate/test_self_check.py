"""The self-check that ends an export: what it finds, what it says, and what it leaves."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export import verified
from rgexport.export.checked import CheckRecord
from rgexport.export.gguf import metadata
from rgexport.export.onnx import lowering
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize import affine
from rgexport.runtimes.coreml.interpreter.weights import CACHE_BYTES
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate import room
from rgexport.validate.formats import coreml as coreml_format
from rgexport.validate.formats.expected import Schedule, expected_of
from tests.command_line import assert_matches, rgexport
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300, soft_cap=5.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One whose logits reach the soft cap."""
    folder = tmp_path_factory.mktemp("checked") / "model"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder, dtype="bfloat16")


@pytest.fixture
def model(checkpoint, tmp_path, monkeypatch) -> str:
    """The same, with the working directory an empty one."""
    monkeypatch.chdir(tmp_path)
    return str(checkpoint)


def export(model: str, kind: str, *options: str) -> tuple[int, CheckRecord]:
    """Exports to `out` by the command line; the exit code, and what the manifest says."""
    code = run([kind, "-m", model, "-o", "out", *options])
    return code, open_artifact("out").manifest.check


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("onnx", "--int4"),
        ("onnx", "--precision fp16"),
        ("coreml", "--precision pal4 --prefill-length 3 --all-logits"),
        pytest.param("gguf", "--int4", marks=needs_llama_cpp),
    ],
)
def test_clean_artifacts_are_verified(kind, options, model, capsys):
    if kind == "coreml":
        pytest.importorskip("coremltools")
    code, found = export(model, kind, *options.split())
    assert code == 0 and found.status == "verified" and not found.reason
    assert 0 <= found.kl < 1 and found.relative_max < 0.1
    line, closing = capsys.readouterr().out.splitlines()
    assert line == found.sentence and line.startswith("Checked on ") and line.endswith("verified.")
    assert closing.startswith("out is complete (")
    assert run(["inspect", "out"]) == 0 and line in capsys.readouterr().out
    assert run(["inspect", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"] == dataclasses.asdict(found)
    if kind != "gguf":
        card = Path("out/README.md").read_text("utf-8")
        assert f" tokens in {found.engine}" in card and "| verdict | verified |" in card
        assert f"over {found.positions} tokens | {found.nats} |" in card
        assert f"| {found.share} of the largest logit |" in card


def test_the_demo_reads_the_built_in_text(demo_artifact):
    found = open_artifact(demo_artifact).manifest.check
    assert found.status == "verified" and found.tokens == found.positions == 32
    assert 0 < found.kl < 0.2  # random ids would not be what it was trained on


def drop_soft_cap(emitter, node):
    (x,) = emitter.inputs(node)
    return [emitter.op("Identity", emitter.cast(x, "float32"))]


def give_nan(emitter, node):
    zero = emitter.constant(0, "float32")
    return [emitter.op("Mul", *drop_soft_cap(emitter, node), emitter.op("Div", zero, zero))]


def spoiled_parts(*arguments, pack=affine.pack_parts):
    parts = pack(*arguments)
    return parts | {"scales": parts["scales"] * parts["scales"].dtype.type(40)}


def raise_two_lines(session, tokens):
    raise RuntimeError("a fault\nof two lines")


@pytest.mark.parametrize(
    ("owner", "name", "fault", "complaint"),
    [
        (lowering.LOWERINGS, "soft_cap", drop_soft_cap, "from the dequantized .* beyond 0.001"),
        (lowering.LOWERINGS, "soft_cap", give_nan, "is nan, beyond"),
        (affine, "pack_parts", spoiled_parts, "the difference from the original .* beyond"),
        (OrtSession, "step", raise_two_lines, "onnxruntime .* cannot run it: a fault of two lines"),
    ],
)
def test_wrong_artifacts_stay_and_are_marked(
    owner, name, fault, complaint, model, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        change = patch.setitem if isinstance(owner, dict) else patch.setattr
        change(owner, name, fault)
        code, found = export(model, "onnx", "--int4", "--exact")
    assert code == 1 and found.status == "unverified"
    line, closing = capsys.readouterr().out.splitlines()
    assert line.startswith(found.sentence) and "partial" not in line
    assert line.endswith("Look closer: rgexport validate out")
    assert closing.startswith("out is complete (")
    assert_matches(complaint, found.reason)
    assert "unverified, since" in Path("out/README.md").read_text("utf-8").replace("\n", " ")
    if fault is give_nan:  # the manifest stays JSON
        assert found.kl is None and found.relative_max is None
        assert "KL to the original not a number" in line


@needs_llama_cpp
def test_wrong_gguf_files_are_marked_and_warned_of(model, monkeypatch, capsys):
    """The file says another soft cap than the manifest."""
    write, replace = metadata._architecture, dataclasses.replace
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "_architecture", lambda c: write(replace(c, soft_cap=50.0)))
        code, found = export(model, "gguf", "--type", "f32")
    assert code == 1 and found.status == "unverified"
    assert_matches("largest difference from the dequantized reference.* beyond 0.001", found.reason)
    capsys.readouterr()
    assert run(["generate", "out", "--ids", "2", "-n", "2"]) == 0
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Warning: ")]
    assert len(warnings) == 1 and "unverified, since the largest difference" in warnings[0]


def test_a_check_is_left_out_on_request_or_without_memory(model, monkeypatch, capsys):
    code, found = export(model, "onnx", "--no-check")
    assert code == 0 and found.status == "skipped" and found.reason == "it was not asked for"
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert "Not checked: it was not asked for." in Path("out/README.md").read_text("utf-8")
    manifest = open_artifact("out").manifest
    assert expected_of("onnx").schedule(manifest) == Schedule(28, 28, 4)
    free = room.needed_bytes(manifest)
    for available, lacks in ((free - 1, True), (free, False), (None, False)):
        monkeypatch.setattr(room, "available_bytes", lambda free=available: free)
        assert bool(room.lack_of_room(manifest)) is lacks

    monkeypatch.setattr(room, "available_bytes", lambda: 200 << 20)
    code, found = export(model, "onnx", "--int4", "--force")
    assert code == 0 and found.status == "skipped"
    assert_matches(r"it takes about \d+ MB of memory, and 210 MB are free", found.reason)
    assert capsys.readouterr().out.startswith("Not checked: it takes")


def test_engine_that_is_missing(model, tmp_path):
    missing = "import sys; sys.modules['llama_cpp'] = None"
    asked = "gguf", "-m", model, "--type", "f16", "-o", "out"
    result = rgexport(*asked, folder=tmp_path, before=missing)
    assert result.returncode == 0, result.stderr
    line, _ = result.stdout.splitlines()
    assert line.startswith("Not checked: a GGUF file takes llama-cpp-python, which is missing")
    assert "rgexport llama-cpp build" in line and "rgexport validate out" in line
    assert "Self-check" not in result.stderr
    assert open_artifact(tmp_path / "out").manifest.check.status == "skipped"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_float16_takes_the_memory_of_float32(precision, checkpoint, tmp_path, monkeypatch):
    """ONNX Runtime widens it; the embedding is there twice in any precision."""
    monkeypatch.setattr(room, "_references", lambda config: 0)
    options = OnnxOptions(precision=precision)
    artifact = open_artifact(export_onnx(open_checkpoint(checkpoint), options, tmp_path / "out"))
    weights = sum(np.prod(stored.shape) for stored in artifact.manifest.tensors.values())
    embedding = CONFIG.vocab_size * CONFIG.width
    assert room.needed_bytes(artifact.manifest) - room._REST == 4 * (weights + embedding)


@pytest.mark.parametrize(
    ("options", "largest", "expected"),
    [
        ((), 10**8, Schedule(8, 1, 31)),
        ((), 10, Schedule(8, 1, 2)),
        (("--all-logits",), 10, Schedule(8, 8, 2)),
    ],
)
def test_core_mls_schedules(options, largest, expected, model, monkeypatch):
    pytest.importorskip("coremltools")
    monkeypatch.setattr(coreml_format, "SMALL_MODEL", largest)
    code, found = export(model, "coreml", "--prefill-length", "8", *options)
    assert expected_of("coreml").schedule(open_artifact("out").manifest) == expected
    assert code == 0 and found.status == "verified"
    assert (found.tokens, found.positions) == (expected.tokens, expected.positions)


def test_the_interpreter_takes_no_more_for_a_larger_package(model):
    pytest.importorskip("coremltools")
    export(model, "coreml", "--no-check")
    manifest = open_artifact("out").manifest
    assert room.needed_bytes(manifest) == CACHE_BYTES + room._REST


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RequestError("no"), ValueError("a fault")])
def test_a_check_that_raises_leaves_what_was(error, checkpoint, tmp_path):
    source, target = open_checkpoint(checkpoint), tmp_path / "out"

    def check(path: Path) -> CheckRecord:
        open_artifact(path)
        raise error

    with pytest.raises(type(error)):
        export_onnx(source, OnnxOptions(), target, check=check)
    assert not list(tmp_path.iterdir())

    export_onnx(source, OnnxOptions(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(type(error)):
        export_onnx(source, OnnxOptions(precision="int4"), target, force=True, check=check)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_hashed_for_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("RGEXPORT_CACHE", str(tmp_path / "cache"))

    def check(path: Path) -> CheckRecord:
        with monkeypatch.context() as patch:
            patch.setattr(verified, "hash_files", None)
            open_artifact(path)
        assert path.name.startswith(".out.partial-") and path.parent == tmp_path
        return CheckRecord(status="verified")

    target = export_onnx(open_checkpoint(checkpoint), OnnxOptions(), tmp_path / "out", check=check)
    monkeypatch.setattr(verified, "hash_files", None)
    assert open_artifact(target).manifest.check.status == "verified"
