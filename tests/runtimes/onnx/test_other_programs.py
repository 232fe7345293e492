"""Artifacts in onnxruntime-genai and in the loop in C that the documentation shows, as they are."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import rgexport
from bench.genai import run
from rgexport.artifacts.onnx import program_files as files
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.kernels.onnx import library
from tests.artifacts import export_random
from tests.command_line import ROOT
from tests.command_line import rgexport as command
from tests.models import ODD_CONFIGS

pytestmark = pytest.mark.full
DEMO = ROOT / "demo" / "model"


def export_demo(target: Path, model: Path = DEMO, **options) -> Path:
    return export_onnx(open_checkpoint(str(model)), OnnxOptions(**options), target)


def config_of(artifact: Path) -> dict:
    return json.loads((artifact / files.GENAI_CONFIG).read_text())["model"]


def require_equal(artifact: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    results = run(Path(sys.executable), artifact)
    assert results["same_tokens"] and results["largest_difference"] == 0.0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("not_by_32", {"precision": "int8"}),
        ("hawk", {"precision": "fp16"}),
        ("attention_only", {"precision": "int4", "exact": True}),
        ("narrow_lru", {"precision": "int8", "profile": "wasm"}),
        ("irregular", {"precision": "int4", "profile": "webgpu"}),
    ],
)
def test_logits_are_onnx_runtimes(name: str, options: dict, tmp_path: Path) -> None:
    require_equal(export_random(ODD_CONFIGS[name], tmp_path, **options)[0].path)


def test_our_kernels_run_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = export_demo(tmp_path / "demo", genai_native=True)
    assert (artifact / library.LIBRARY.name).read_bytes() == library.LIBRARY.read_bytes()
    assert library.LIBRARY.name in open_artifact(artifact, verify=True).manifest.files
    named = config_of(artifact)["decoder"]["session_options"]["custom_ops_library"]
    assert named == library.LIBRARY.name
    require_equal(artifact)  # beside plain ONNX Runtime with the same kernels
    with pytest.raises(RequestError, match="changes nothing in --profile wasm"):
        OnnxOptions(profile="wasm", genai_native=True)
    monkeypatch.setenv(library.NO_NATIVE, "1")
    with pytest.raises(RequestError, match=r"--genai-native copies .* RGEXPORT_NO_NATIVE turns"):
        export_demo(tmp_path / "refused", genai_native=True)
    assert not (tmp_path / "refused").exists()


def test_a_tokenizer_that_cannot_be_converted_is_told(tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "tokenizer.model").write_bytes(b"\xff\xff")
    artifact = export_demo(tmp_path / "demo", model)
    assert "only rgexport will take text with this artifact" in capsys.readouterr().err
    assert config_of(artifact)["eos_token_id"] == [1] and config_of(artifact)["bos_token_id"] == 2
    assert not (artifact / "tokenizer.json").exists()


@pytest.mark.parametrize("most", [2, 256])
def test_the_guides_conversation_is_ours(tmp_path: Path, most: int, capsys, monkeypatch) -> None:
    pytest.importorskip("onnxruntime_genai")
    artifact = export_demo(tmp_path / "recurrentgemma-2b-it-int4-onnx", precision="fp32")
    guide = (ROOT / "docs" / "genai.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    code = code.replace("most=256", f"most={most}")
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code.replace("\nreply(", "\nprint(); reply("), names)
    said = capsys.readouterr().out.strip().splitlines()
    messages: list = []
    with rgexport.load(artifact) as model:
        for content, text in zip(("Hi!", "And you?"), said, strict=True):
            messages.append({"role": "user", "content": content})
            reply = model.chat(messages, temperature=0, max_new_tokens=most)
            assert text == reply.text and reply.reason == ("length" if most == 2 else "stop")
            messages.append({"role": "assistant", "content": reply.text})
    assert names["generator"].token_count() < 256


HEADERS = Path("/usr/include/onnxruntime")


@pytest.fixture(scope="module")
def loop(tmp_path_factory) -> Path:
    """The program, with the library of the Python package."""
    folder, compiler = tmp_path_factory.mktemp("loop"), shutil.which("cc")
    if not compiler:
        pytest.skip("not installed: cc")
    if not (HEADERS / "onnxruntime_c_api.h").is_file():
        pytest.skip("not installed: ONNX Runtime's headers, such as Debian's libonnxruntime-dev")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    flags = "-std=c11 -Wall -Wextra -Werror -O1 -fsanitize=undefined -lonnxruntime".split()
    paths = [f"-I{HEADERS}", f"-L{folder}", f"-Wl,-rpath,{folder}", "-o", folder / "loop"]
    source = ROOT / "docs" / "examples" / "loop.c"
    subprocess.run([compiler, source, *flags, *paths], check=True, capture_output=True)
    return folder / "loop"


@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_only"])
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_tokens_of_the_loop_in_c(loop: Path, precision: str, name: str, tmp_path: Path) -> None:
    artifact = export_random(ODD_CONFIGS[name], tmp_path, precision)[0].path
    program = [loop, artifact / "model.onnx", "40", "2", "51", "60"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    options = ["--ids", "2,51,60", "-n", "40", "--no-native"]
    expected = command("generate", artifact, *options, folder=artifact)
    assert done.stdout.split() == expected.stdout.split() and len(done.stdout.split()) == 40
