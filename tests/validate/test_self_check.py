"""The self-check that ends an export: what it finds, what it says, and what it leaves."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export import verified
from rgexport.export.checked import CheckRecord
from rgexport.export.gguf import metadata
from rgexport.export.manifest import MANIFEST
from rgexport.export.onnx import lowering
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.onnx.profiles import LoweringProfile
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize import affine
from rgexport.runtimes.coreml.interpreter.weights import CACHE_BYTES
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate import room
from rgexport.validate.formats import coreml as coreml_format
from rgexport.validate.formats.expected import Schedule, expected_of
from tests.artifacts import require_ggml
from tests.command_line import ROOT, START, rgexport
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300, soft_cap=5.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose logits reach the soft cap."""
    folder = tmp_path_factory.mktemp("checked") / "model"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder, dtype="bfloat16")


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, with the working directory an empty one."""
    monkeypatch.chdir(tmp_path)
    return str(checkpoint)


def export(model: str, kind: str, *options: str) -> tuple[int, CheckRecord]:
    """Exports to `out` by the command line; the exit code, and what the manifest says."""
    code = run([kind, "-m", model, "-o", "out", *options])
    return code, open_artifact("out").manifest.check


KINDS = {
    "onnx": ["--int4", "--precision fp32", "--precision fp16", "--int8 --exact"],
    "coreml": ["--int4 --prefill-length 8", "--precision pal4 --prefill-length 3 --all-logits"],
    "gguf": ["--type f32", "--type f16", "--int4"],
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, marks=needs_llama_cpp if kind == "gguf" else ())
        for kind, cases in KINDS.items()
        for options in cases
    ],
)
def test_clean_artifacts_are_verified(kind, options, model, capsys):
    if kind == "gguf":
        require_ggml()
    code, found = export(model, kind, *options.split())
    assert code == 0 and found.status == "verified" and not found.reason
    assert found.kl is not None and 0 <= found.kl < 1 and found.relative_max < 0.1
    line, closing = capsys.readouterr().out.splitlines()
    assert line == found.sentence and line.startswith("Checked on ") and line.endswith("verified.")
    assert closing.startswith("out is complete (")
    assert run(["inspect", "out"]) == 0 and line in capsys.readouterr().out
    assert run(["inspect", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"] == dataclasses.asdict(found)


def test_what_the_card_says(model):
    _, found = export(model, "onnx", "--int4")
    card = Path("out/README.md").read_text("utf-8")
    assert f"on 32 tokens in {found.engine}" in card and "| verdict | verified |" in card
    assert f"over 32 tokens | {found.nats} |" in card
    assert f"| {found.share} of the largest logit |" in card


def test_the_demo_reads_the_built_in_text(demo_artifact):
    found = open_artifact(demo_artifact).manifest.check
    assert found.status == "verified" and found.tokens == found.positions == 32
    assert 0 < found.kl < 0.2  # random ids would not be what it was trained on


# What is wrong.


def drop_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(emitter: Any, node: Any) -> Any:
        (x,) = emitter.inputs(node)
        return [emitter.op("Identity", emitter.cast(x, "float32"))]

    monkeypatch.setitem(lowering.LOWERINGS, "soft_cap", faulty)


def spoil_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = affine.pack_parts

    def faulty(*arguments: Any) -> affine.Parts:
        parts = pack(*arguments)
        return parts | {"scales": parts["scales"] * parts["scales"].dtype.type(40)}

    monkeypatch.setattr(affine, "pack_parts", faulty)


def break_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(emitter: Any, node: Any) -> Any:
        return [emitter.op("NoSuchOperator", *emitter.inputs(node))]

    monkeypatch.setitem(lowering.LOWERINGS, "soft_cap", faulty)
    monkeypatch.setattr(LoweringProfile, "require_allowed", lambda profile, model: None)


def break_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(session: Any, tokens: np.ndarray) -> np.ndarray:
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr(OrtSession, "step", faulty)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "graph": (
        drop_soft_cap,
        "the largest difference from the dequantized reference.* beyond 0.001",
    ),
    "weights": (spoil_scales, "the difference from the original .* beyond"),
    "unusable": (
        break_graph,
        "has the op .*NoSuchOperator, which rgexport does not write",
    ),
    "fails": (break_engine, "onnxruntime .* cannot run it: a fault of two lines"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_artifacts_stay_and_are_marked(fault, model, monkeypatch, capsys):
    break_it, complaint = FAULTS[fault]
    with monkeypatch.context() as patch:
        break_it(patch)
        code, found = export(model, "onnx", "--int4", "--exact")
    assert code == 1 and found.status == "unverified"
    line, closing = capsys.readouterr().out.splitlines()
    assert line.startswith(found.sentence) and "partial" not in line
    assert line.endswith("Look closer: rgexport validate out")
    assert closing.startswith("out is complete (")
    assert_matches(complaint, found.reason)
    assert "unverified, since" in Path("out/README.md").read_text("utf-8").replace("\n", " ")


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


@needs_llama_cpp
def test_wrong_gguf_files_are_marked_and_warned_of(model, monkeypatch, capsys):
    """llama.cpp is told of another soft cap than the manifest is."""
    told = metadata._architecture

    def faulty(config: Any) -> Any:
        return told(dataclasses.replace(config, soft_cap=50.0))

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "_architecture", faulty)
        code, found = export(model, "gguf", "--type", "f32")
    assert code == 1 and found.status == "unverified"
    assert_matches("largest difference from the dequantized reference.* beyond 0.001", found.reason)
    capsys.readouterr()
    assert run(["generate", "out", "--ids", "2", "-n", "2"]) == 0
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Warning: ")]
    assert len(warnings) == 1 and "unverified, since the largest difference" in warnings[0]


def test_numbers_that_are_not_finite_are_reported(model, monkeypatch, capsys):
    """A graph that gives NaN: the manifest stays JSON."""

    def faulty(emitter: Any, node: Any) -> Any:
        (x,) = emitter.inputs(node)
        zero = emitter.constant(0, "float32")
        return [emitter.op("Mul", emitter.cast(x, "float32"), emitter.op("Div", zero, zero))]

    with monkeypatch.context() as patch:
        patch.setitem(lowering.LOWERINGS, "soft_cap", faulty)
        code, found = export(model, "onnx")
    assert code == 1 and found.kl is None and found.relative_max is None
    assert "KL to the original not a number" in capsys.readouterr().out
    assert "is nan, beyond" in found.reason


# What is left out.


def test_no_check(model, capsys):
    code, found = export(model, "onnx", "--no-check")
    assert code == 0 and found.status == "skipped" and found.reason == "it was not asked for"
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert "Not checked: it was not asked for." in Path("out/README.md").read_text("utf-8")


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


def test_memory_that_is_short(model, monkeypatch, capsys):
    monkeypatch.setattr(room, "available_bytes", lambda: 200 << 20)
    code, found = export(model, "onnx", "--int4")
    assert code == 0 and found.status == "skipped"
    assert_matches(r"it takes about \d+ MB of memory, and 210 MB are free", found.reason)
    assert capsys.readouterr().out.startswith("Not checked: it takes")


@pytest.mark.parametrize("available", [None, 1 << 40])
def test_memory_that_is_enough(available, model, monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda: available)
    assert export(model, "onnx")[1].status == "verified"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_float16_takes_the_memory_of_float32(precision, checkpoint, tmp_path, monkeypatch):
    """ONNX Runtime widens it; the embedding is there twice in any precision."""
    monkeypatch.setattr(room, "_references", lambda config: 0)
    options = OnnxOptions(precision=precision)
    artifact = open_artifact(export_onnx(open_checkpoint(checkpoint), options, tmp_path / "out"))
    weights = sum(np.prod(stored.shape) for stored in artifact.manifest.tensors.values())
    embedding = CONFIG.vocab_size * CONFIG.width
    assert room.needed_bytes(artifact.manifest) - room._REST == 4 * (weights + embedding)


# Which tokens.


def schedule_of(path: str) -> Schedule:
    manifest = open_artifact(path).manifest
    return expected_of(manifest.kind).schedule(manifest)


def test_most_engines_take_a_prefill_and_a_few_steps(model):
    export(model, "onnx", "--no-check")
    assert schedule_of("out") == Schedule(28, 28, 4)


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
    assert schedule_of("out") == expected
    assert code == 0 and found.status == "verified"
    assert (found.tokens, found.positions) == (expected.tokens, expected.positions)


def test_the_interpreter_takes_no_more_for_a_larger_package(model):
    pytest.importorskip("coremltools")
    export(model, "coreml", "--no-check")
    manifest = open_artifact("out").manifest
    assert room.needed_bytes(manifest) == CACHE_BYTES + room._REST


# What it leaves behind.


def raising(error: BaseException, path: Path) -> CheckRecord:
    open_artifact(path)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RequestError("no"), ValueError("a fault")])
def test_a_check_that_raises_leaves_what_was(error, checkpoint, tmp_path):
    source, target = open_checkpoint(checkpoint), tmp_path / "out"
    check = partial(raising, error)
    with pytest.raises(type(error)):
        export_onnx(source, OnnxOptions(), target, check=check)
    assert not list(tmp_path.iterdir())

    export_onnx(source, OnnxOptions(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(type(error)):
        export_onnx(source, OnnxOptions(precision="int4"), target, force=True, check=check)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_an_interrupt_leaves_nothing(model, tmp_path):
    # A shell without job control has what it starts in the background ignore SIGINT.
    slow = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time; from rgexport.griffin.reference import Reference; read = Reference._load\n"
        "Reference._load = lambda *a: time.sleep(0.3) or read(*a)"
    )
    program = [sys.executable, "-c", f"{slow}\n{START}", "onnx", "-m", model, "-o", "out"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(program, cwd=tmp_path, env=variables) as process:
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(f".out.partial-*/{MANIFEST}")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not list(tmp_path.iterdir())


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
