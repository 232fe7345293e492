"""LoRA adapters against PEFT, which made them and merges them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import RecurrentGemmaForCausalLM

from rgexport.errors import RequestError
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.adapter import CONFIG, WEIGHTS
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
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
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    write_hugging_face(SHAPE, random_weights(SHAPE), folder)
    return folder


def train(base: Path, target: Path, **options: Any) -> PeftModel:
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


def check_weights(checkpoint: Checkpoint, wrapped: PeftModel) -> RecurrentGemmaForCausalLM:
    """All weights are those of PEFT's merged model, also when they are read in parts."""
    merged = wrapped.merge_and_unload()
    expected = {name.removeprefix("model."): x for name, x in merged.state_dict().items()}
    for name, tensor in checkpoint.weights.items():
        array, wanted = tensor.whole(), expected[name].numpy()
        assert np.abs(array - wanted).max() <= 2e-6 * (1 + np.abs(wanted).max()), name
        half = tensor.shape[0] // 2
        parts = np.concatenate([tensor.read(0, half), tensor.read(half, tensor.shape[0])])
        assert np.allclose(parts, array, rtol=1e-6, atol=1e-7)
    return merged


CASES: dict[str, dict[str, Any]] = {
    "linears": {},
    "all linears": {"target_modules": "all-linear"},
    "embedding too": {"target_modules": [*LINEARS.split(), "embed_tokens"]},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.0.temporal_block.linear_x": 6},
        "alpha_pattern": {"q_proj": 5, "model.layers.2.mlp_block.up_proj": 1},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_pefts(base: Path, name: str, tmp_path: Path) -> None:
    wrapped = train(base, tmp_path / "adapter", **CASES[name])
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    merged = check_weights(checkpoint, wrapped)

    options = OnnxOptions(precision="fp32")
    artifact = open_artifact(export_onnx(checkpoint, options, tmp_path / "artifact"))
    tokens = random_tokens(SHAPE, 2, SHAPE.window - 1)  # later, Hugging Face's window differs
    with torch.no_grad():
        expected = merged(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    session = OrtSession(artifact)
    session.reset(2)
    assert distance(session.prefill(tokens, tokens.shape[1]), expected) <= 1e-4
    files = artifact.manifest.source.files
    assert {CONFIG, WEIGHTS, "model.safetensors"} == files.keys()
    assert artifact.manifest.name == "base-adapter"
    original = find_original(artifact.manifest, str(base), tmp_path / "adapter")
    assert original is not None and original.same_files
    alone = find_original(artifact.manifest, str(base))
    assert alone is not None and not alone.same_files


def test_the_layout_of_the_base_does_not_matter(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "adapter", target_modules=[*LINEARS.split(), "embed_tokens"])
    other = write_deepmind(random_weights(SHAPE), tmp_path / "deepmind")
    ours = open_checkpoint(base, adapter=tmp_path / "adapter").weights
    theirs = open_checkpoint(other, window=32, adapter=tmp_path / "adapter").weights
    for name, tensor in ours.items():
        assert np.array_equal(tensor.whole(), theirs[name].whole()), name


def test_every_export_takes_one(base: Path, tmp_path: Path) -> None:
    rgexport = partial(run, folder=tmp_path)
    train(base, tmp_path / "adapter")
    given = "-m", base, "--adapter", tmp_path / "adapter"
    for verb, target in (("onnx", "a"), ("gguf", "a.gguf")):
        done = rgexport(verb, *given, "-o", tmp_path / target, "--int8")
        assert done.returncode == 0, done.stderr
    checked = rgexport("validate", tmp_path / "a", *given)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "other weight files" not in checked.stderr
    lone = rgexport("validate", tmp_path / "a", "--adapter", tmp_path / "adapter")
    assert lone.returncode == 2 and "--adapter is for the model that -m names" in lone.stderr


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _first(tensors: dict[str, torch.Tensor], side: str) -> str:
    return next(name for name in tensors if f"lora_{side}" in name)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.9.x.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.model.layers.9.x.lora_B.weight"] = torch.zeros(64, 4)


WRONG: dict[str, tuple[Any, str]] = {
    "no adapter": (lambda f: (f / CONFIG).unlink(), "has no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "not LoRA": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora is True"),
    "bias": (lambda f: edit_config(f, bias="all"), "bias is 'all'"),
    "modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save is"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), "leaves the base as it is"),
    "rank": (lambda f: edit_config(f, r=8), "is 4; adapter_config.json says 8"),
    "regex": (lambda f: edit_config(f, alpha_pattern={"(a+)+": 1}), "is a regular expression"),
    "half": (
        lambda f: edit_weights(f, lambda t: t.pop(_first(t, "B"))),
        "expected A .r, in. and B .out, r.",
    ),
    "shape": (
        lambda f: edit_weights(f, lambda t: t.update({_first(t, "A"): torch.zeros(4, 63)})),
        "expected an adapter that was trained on this model",
    ),
    "other model": (
        lambda f: edit_weights(f, _rename),
        "layers.9.x.weight of shape .64, 64., which base does not have",
    ),
    "head": (
        lambda f: edit_weights(
            f, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)})
        ),
        "the head is tied",
    ),
    "other tensor": (
        lambda f: edit_weights(f, lambda t: t.update({"x.lora_magnitude": torch.zeros(4)})),
        "it is no LoRA matrix",
    ),
    "empty": (lambda f: edit_weights(f, dict.clear), "has no matrices"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_merged_is_told(base: Path, name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    train(base, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(RequestError, match=message) as caught:
        open_checkpoint(base, adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_a_value_that_is_no_number_is_found(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "adapter")
    spoil = {"value": float("nan")}
    edit_weights(tmp_path / "adapter", lambda t: t[_first(t, "A")].fill_(spoil["value"]))
    checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
    with pytest.raises(RequestError, match="NaN/Inf"):
        export_onnx(checkpoint, OnnxOptions(), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
