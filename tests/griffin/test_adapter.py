"""LoRA adapters against PEFT, which made them and merges them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import RecurrentGemmaForCausalLM

from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.adapter import CONFIG, WEIGHTS
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate.source import find_original
from tests.command_line import rgexport as run
from tests.deepmind import write_deepmind
from tests.models import make_config, random_weights, write_hugging_face
from tests.sessions import distance, random_tokens

pytestmark = pytest.mark.full
SHAPE = make_config("rar", width=64, heads=4, lru_width=96, window=32)
LINEARS = "linear_x linear_y linear_out q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    write_hugging_face(SHAPE, random_weights(SHAPE), folder)
    return folder


def train(base, target, **options):
    """An adapter with random matrices, saved to `target`."""
    model = RecurrentGemmaForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 12, "target_modules": LINEARS.split()} | options
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    wrapped.save_pretrained(target)
    return wrapped


CASES = {
    "linears": {},
    "embedding too": {"target_modules": [*LINEARS.split(), "embed_tokens"]},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.0.temporal_block.linear_x": 6},
        "alpha_pattern": {"q_proj": 5, "model.layers.2.mlp_block.up_proj": 1},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_pefts(base, name, tmp_path):
    merged = train(base, tmp_path / "adapter", **CASES[name]).merge_and_unload()
    weights = {n.removeprefix("model."): x.numpy() for n, x in merged.state_dict().items()}
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    deepmind = write_deepmind(random_weights(SHAPE), tmp_path / "deepmind")
    other = open_checkpoint(deepmind, window=32, adapter=tmp_path / "adapter")
    for tensor_name, tensor in checkpoint.weights.items():
        array, expected = tensor.whole(), weights[tensor_name]
        assert np.abs(array - expected).max() <= 2e-6 * (1 + np.abs(expected).max()), tensor_name
        assert np.array_equal(array, other.weights[tensor_name].whole())
        half = tensor.shape[0] // 2
        parts = np.concatenate([tensor.read(0, half), tensor.read(half, tensor.shape[0])])
        assert np.allclose(parts, array, rtol=1e-6, atol=1e-7)

    options = OnnxOptions(precision="fp32")
    artifact = open_artifact(export_onnx(checkpoint, options, tmp_path / "artifact"))
    tokens = random_tokens(SHAPE, 2, SHAPE.window - 1)  # later, Hugging Face's window differs
    with torch.no_grad():
        expected = merged(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    session = OrtSession(artifact)
    session.reset(2)
    assert distance(session.prefill(tokens, tokens.shape[1]), expected) <= 1e-4
    assert {CONFIG, WEIGHTS, "model.safetensors"} == artifact.manifest.source.files.keys()
    assert artifact.manifest.name == "base-adapter"
    for adapter, is_same in ((tmp_path / "adapter", True), (None, False)):
        original = find_original(artifact.manifest, str(base), adapter)
        assert original is not None and original.same_files == is_same


def test_commands_take_one(base, tmp_path):
    rgexport = partial(run, folder=tmp_path)
    train(base, tmp_path / "adapter")
    done = rgexport("gguf", "-m", base, "--adapter", tmp_path / "adapter", "-o", "a", "--int8")
    assert done.returncode == 0, done.stderr
    lone = rgexport("validate", "a", "--adapter", tmp_path / "adapter")
    assert lone.returncode == 2 and "--adapter is for the model that -m names" in lone.stderr


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _first(tensors, side):
    return next(name for name in tensors if f"lora_{side}" in name)


def _add(**tensors):
    added = {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()}
    return lambda folder: edit_weights(folder, lambda stored: stored.update(added))


A, B = torch.zeros(4, 64), torch.zeros(64, 4)
WRONG = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "not LoRA": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora is True"),
    "modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save is"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), "leaves the base as it is"),
    "rank": (lambda f: edit_config(f, r=8), "is 4; adapter_config.json says 8"),
    "regex": (lambda f: edit_config(f, alpha_pattern={"(a+)+": 1}), "is a regular expression"),
    "shape": (
        lambda f: edit_weights(f, lambda t: t.update({_first(t, "A"): torch.zeros(4, 63)})),
        "expected an adapter that was trained on this model",
    ),
    "other model": (
        _add(**{"model.layers.9.x.lora_A": A, "model.layers.9.x.lora_B": B}),
        "layers.9.x.weight of shape .64, 64., which base does not have",
    ),
    "head": (_add(**{"lm_head.lora_A": A}), "the head is tied"),
    "other tensor": (_add(lora_magnitude=A), "it is no LoRA matrix"),
    "empty": (lambda f: edit_weights(f, dict.clear), "has no matrices"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_merged_is_told(base, name, tmp_path):
    change, message = WRONG[name]
    train(base, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(RequestError, match=message) as caught:
        open_checkpoint(base, adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value)
