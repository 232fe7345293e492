"""Running an artifact needs no extra: with their packages made unimportable, all works."""

import json
import re

import pytest

from tests.command_line import rgexport
from tests.deepmind import write_deepmind
from tests.llama_tools import installed_version
from tests.models import ODD_CONFIGS, random_weights

BLOCK = """
import sys
extras = "torch", "onnx", "onnx_ir", "coremltools", "gguf", "prompt_toolkit", "fastapi"
for name in (*extras, "jax", "flax", "safetensors", "recurrentgemma"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""
COLD = "from rgexport.runtimes.bench import measure; measure.WARM_UP_SECONDS = 0"
USES: dict[str, tuple[str, str]] = {
    "generate": ("generate {} -p Once -n 8", r"\S+"),
    "chat": ("chat {} -n 8", r"\S+.*\n.*\S+"),
    "bench": ("bench {} -p 4 -n 2 -r 1", "(?s)pp4.*tg2"),
    "inspect": ("inspect {} --json --verify", '"precision": "int4"'),
}


@pytest.mark.parametrize("use", USES)
def test_use_of_an_artifact(use, demo_artifact, tmp_path):
    command, shown = USES[use]
    asked = command.format(demo_artifact).split()
    text = "Hello!\nHow are you?\n" if use == "chat" else ""
    result = rgexport(*asked, folder=tmp_path, before=f"{BLOCK}\n{COLD}", text=text)
    assert result.returncode == 0, result.stderr
    assert re.search(shown, result.stdout)


def test_gguf(tmp_path):
    asked = "gguf", "--size", "demo", "--type", "f16"
    block = BLOCK.replace(', "gguf"', "")
    result = rgexport(*asked, folder=tmp_path, before=block)
    assert result.returncode == 0, result.stderr
    runs = "+rgexport." in installed_version()
    assert ("Checked on" if runs else "llama-cpp-python") in result.stdout
    result = rgexport("inspect", "demo-F16.gguf", "--json", folder=tmp_path, before=BLOCK)
    assert json.loads(result.stdout)["precision"] == "f16"


@pytest.mark.full
def test_core_ml_package(tmp_path):
    result = rgexport("coreml", "--size", "demo", "--int4", "--no-check", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    block = BLOCK.replace(', "coremltools"', "")
    inspect = "inspect", "demo-int4-coreml", "--json", "--verify"
    result = rgexport(*inspect, folder=tmp_path, before=block)
    assert json.loads(result.stdout)["precision"] == "int4", result.stderr
    asked = ["generate", "demo-int4-coreml", "-p", "Once upon a time", "-n", "8"]
    result = rgexport(*asked, folder=tmp_path, before=block)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) > 8 and "new tokens" in result.stderr
    for command in (inspect, asked, ("inspect", "demo-int4-coreml/model.mlpackage")):
        result = rgexport(*command, folder=tmp_path, before=BLOCK)
        assert result.returncode == 2 and not result.stdout
        line = "Error: reading a Core ML package needs coremltools: pip install 'rgexport[coreml]'"
        assert result.stderr.splitlines()[-1] == line and "Traceback" not in result.stderr


def test_inspect_a_checkpoint(tmp_path):
    write_deepmind(random_weights(ODD_CONFIGS["regular"]), tmp_path)
    for model in (("--size", "demo"), ("model.pt", "--verify")):
        result = rgexport("inspect", *model, folder=tmp_path, before=BLOCK)
        assert result.returncode == 0, result.stderr
        assert "No problems" in result.stdout


def test_validate_against_a_reference_file(demo_artifact, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "The ship sailed at dawn with forty men, two goats and no map of that coast.\n"
        "It is a truth which nobody in the village would have dared to doubt aloud.\n"
    )
    options = "--prompts", "prompts.txt", "-o", "demo.reference"
    made = rgexport("reference", "--size", "demo", *options, folder=tmp_path, before=BLOCK)
    assert made.returncode == 0, made.stderr
    assert made.stdout.endswith("Use it: rgexport validate ARTIFACT --reference demo.reference\n")
    asked = ["validate", demo_artifact, "--reference", "demo.reference", "--json", "r.json"]
    result = rgexport(*asked, folder=tmp_path, before=BLOCK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("PASS")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["dequantized"]["logits"]["relative_max"] > 0 and found["reference"]["same_files"]
    assert found["sites"]["errors"] and not found["sites"]["unseen"]
    assert 0.001 < found["reference"]["kl"]["mean"] < 0.05
    assert found["reference"]["positions"] == found["reference"]["tokens"]


def test_evaluate(demo_artifact, tmp_path):
    """Of the demo and an int4 artifact, all suites but `window`, which traces a graph."""
    suites = ("--suite", "text", "--suite", "noise", "--suite", "length", "--length", "300")
    asked = "evaluate", "demo", demo_artifact, *suites, "--threads", "1", "-v"
    result = rgexport(*asked, folder=tmp_path, before=BLOCK)
    assert result.returncode == 0, result.stderr
    assert "Texts; more nats" in result.stdout and "Length: speed" in result.stdout
    assert "9,220 tokens in text, " in result.stderr and "--suite" in result.stderr


SMALL = """
from dataclasses import replace
from rgexport.griffin.config import SIZES
size = SIZES["2b"]
shape = dict(width=256, mlp_width=96, lru_width=256, num_heads=1, lru_heads=1, embedding_scale=16)
blocks = size.config.block_types[:3]
config = replace(size.config, vocab_size=8200, block_types=blocks, **shape)
SIZES["2b"] = replace(size, config=config)
"""


def test_random(tmp_path):
    asked = ["random", "--size", "2b", "-o", "my model"]
    result = rgexport(*asked, folder=tmp_path, before=BLOCK + SMALL)
    assert result.returncode == 0, result.stderr
    line = "my model is complete. Export it: rgexport onnx 'my model' --int4\n"
    assert result.stdout == line
    found = rgexport("inspect", "my model", "--verify", folder=tmp_path, before=BLOCK)
    assert found.returncode == 0 and "No problems" in found.stdout, found.stderr
    assert (tmp_path / "my model" / "tokenizer.model").is_file()


NEEDS_TORCH = "pip install 'rgexport[export]'"


@pytest.mark.parametrize(
    ("command", "block", "line"),
    [
        ("onnx --size demo --int4 -o out", BLOCK, NEEDS_TORCH),
        ("reference --size demo --device cuda -o out", BLOCK, NEEDS_TORCH),
        ("evaluate {artifact} --suite text --suite window", BLOCK, NEEDS_TORCH),
        ("coreml --size demo -o out", "coremltools", "coreml"),
        ("gguf --size demo --type f16 -o out.gguf", "gguf", "gguf"),
        ("serve {artifact} --port 0", "fastapi", "serve"),
    ],
)
def test_what_is_missing_is_said_in_one_line(demo_artifact, tmp_path, command, block, line):
    if block != BLOCK:
        line = f"Error: this command needs {block}: pip install 'rgexport[{line}]'"
        block = f"import sys; sys.modules[{block!r}] = None"
    asked = command.format(artifact=demo_artifact).split()
    result = rgexport(*asked, folder=tmp_path, before=block)
    assert result.returncode == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and last.endswith(line) and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
