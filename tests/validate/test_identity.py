"""Artifacts that are not of the model that they claim to be, with hashes that fit, all fail."""

import json
import shutil
from dataclasses import replace
from functools import cache, reduce

import numpy as np
import pytest
from safetensors.numpy import save_file

from rgexport.cli import run
from rgexport.griffin import adapter
from rgexport.kernels.onnx import library
from rgexport.validate.opening import ValidationRequest, open_all
from rgexport.validate.reference.reference_file import read_reference, write_reference
from rgexport.validate.run import validate_artifact
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face
from tests.validate.conftest import at, claim
from tests.vocabularies import SIZE, TURNS, write_vocabulary

SHAPE = make_config("ra", width=32, heads=2, vocab_size=SIZE)
OPTIONS = {"onnx": "--no-check --precision fp32", "gguf": "--no-check --type f32", "reference": ""}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_vocabulary(tmp_path_factory.mktemp("m") / "model", user_defined_symbols=TURNS)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    return write_hugging_face(SHAPE, random_weights(SHAPE), folder)


@pytest.fixture(scope="module", params=["model", "reference"])
def given(request, model):
    if request.param == "model":
        return ValidationRequest(model=str(model), max_tokens=24)
    return ValidationRequest(reference=read_reference(made("reference", model, model.parent / "r")))


@pytest.fixture(scope="module")
def sound(model):
    return cache(lambda kind: made(kind, model, model.parent / kind))


def made(kind, model, target, *options):
    arguments = kind, *OPTIONS[kind].split(), "-m", str(model), "-o", str(target), *options
    assert run(arguments) == 0
    return target


def outcomes(path, given, outcome="differs"):
    return {item.name for item in open_all(path, given).identity if item.outcome == outcome}


def put(name, place, value):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        *outer, last = place.split(".")
        inner = reduce(lambda fields, key: fields[key], outer, content)
        inner[last] = value(inner[last]) if callable(value) else value
        (folder / name).write_text(json.dumps(content))

    return edit


def text(old, new, name="."):
    def edit(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content.replace(old.encode(), new.encode(), 1))

    return edit


SCALES = {"soft_cap": 20.0, "embedding_scale": 1.0, "rms_eps": 1e-5}
FIELDS = SCALES | {"rope_theta": 9e3, "rope_dims": 4}
SETTINGS, THEIRS = "tokenizer_config.json", "tokenizer.ggml."
FAULTS = {
    "onnx": {
        **{name: put("rgexport.json", f"config.{name}", value) for name, value in FIELDS.items()},
        "tokenizer.model vocabulary": text("hello", "hallo", "tokenizer.model"),
        "tokenizer.json": put("tokenizer.json", "model.merges", lambda merges: merges[::-1]),
        f"{SETTINGS} chat_template": put(SETTINGS, "chat_template", "{}"),
        "chat_template.jinja chat_template": lambda f: (f / "chat_template.jinja").write_text("{}"),
        SETTINGS: put(SETTINGS, "eos_token", "<unk>"),
        "genai_config.json": put("genai_config.json", "model.eos_token_id", [3]),
        "config.json": put("config.json", "bos_token_id", 7),
        "generation_config.json": put("generation_config.json", "temperature", 2.0),
        "recurrent_gemma.mjs": text("export", "evil(); export", "recurrent_gemma.mjs"),
    },
    "gguf": {
        f"{THEIRS}add_bos_token": at(f"{THEIRS}add_bos_token", False),
        "bos": at(f"{THEIRS}bos_token_id", 9),
        "eos": at(f"{THEIRS}eos_token_id", 9),
        "vocabulary": at(f"{THEIRS}scores", 0.5, -130),
        "vocabulary tokenization": at(f"{THEIRS}token_type", 3, -300),
        "chat_template": text("<start_of_turn>model", "<start_of_turn>robot"),
        "rms_eps": text('"rms_eps": 1e-06', '"rms_eps": 1e-05'),
    },
}
CASES = [("onnx", items) for items in FAULTS["onnx"]]
CASES += [pytest.param("gguf", items, marks=needs_llama_cpp) for items in FAULTS["gguf"]]


@pytest.mark.parametrize(("kind", "items"), CASES)
def test_what_is_of_another_model(sound, given, tmp_path, kind, items):
    path = (shutil.copytree if kind == "onnx" else shutil.copy)(sound(kind), tmp_path / kind)
    FAULTS[kind][items](path)
    claim(path)
    assert {*items.split()} <= outcomes(path, given)


@pytest.mark.parametrize("kind", ["onnx", pytest.param("gguf", marks=needs_llama_cpp)])
def test_a_window_that_was_asked_for_passes(kind, model, given, tmp_path):
    path = made(kind, model, tmp_path / "asked", "--window", "8")
    result = validate_artifact(path, given)
    assert result.verdict == "PASS", [check for check in result.checks if not check.passed]
    told = [item.sentence for item in result.identity if item.outcome == "asked for"]
    assert len(told) == 1 and told[0].startswith("window: 8, asked for at the export (the ")
    if kind == "onnx":
        assert "`--window 8`" in (path / "README.md").read_text()
        put("rgexport.json", "asked_for", {})(path)
        checks = validate_artifact(path, given).checks
        assert "identity.window" in {check.name for check in checks if not check.passed}


def test_adapters_kernels_and_what_is_not_compared(sound, model, tmp_path):
    module = "base_model.model.model.layers.1.mlp_block.up_proj"
    (lora := tmp_path / "tiny").mkdir()
    (lora / adapter.CONFIG).write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    a, b = np.full((1, 32), 0.3, np.float32), np.full((96, 1), 0.3, np.float32)
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, lora / adapter.WEIGHTS)
    merge, native = ("--adapter", str(lora)), ["--genai-native"] * bool(library.library())
    merged = made("onnx", model, tmp_path / "a", *merge, *native)
    base = shutil.copytree(sound("onnx"), tmp_path / "b")
    file = read_reference(made("reference", model, tmp_path / "r", *merge))
    original = ValidationRequest(model=str(model))
    for given in (replace(original, adapter=lora), ValidationRequest(reference=file)):
        assert validate_artifact(merged, replace(given, max_tokens=8)).verdict == "PASS"
        assert outcomes(base, given) == {"adapter"}
    assert outcomes(merged, original, "asked for") == {"adapter"}

    (base / "evil.py").write_text("")
    put("rgexport.json", "created_with.rgexport", "0.0.1")(base)
    put("config.json", "bos_token_id", 7)(base)
    claim(base)
    assert outcomes(base, original) == set()
    assert outcomes(base, original, "not compared") == {"config.json", "foreign files"}
    arrays = {name: array.whole() for name, array in file.arrays.items()}
    before = replace(file.header, identity=None)
    write_reference(tmp_path / "r", before, arrays, force=True)
    old = ValidationRequest(reference=read_reference(tmp_path / "r"))
    assert {"vocabulary", "tokenizer.json"} <= outcomes(base, old, "not compared")
