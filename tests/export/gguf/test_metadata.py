"""The metadata of a GGUF file, read back by gguf-py."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFValueType

from rgexport.errors import RequestError
from rgexport.export.gguf.artifact import GgufArtifact
from rgexport.export.gguf.embedded import MANIFEST_KEY
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.metadata import metadata
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.gguf.vocabulary import read_vocabulary
from rgexport.griffin.chat_template import GEMMA_TEMPLATE, read_chat_template
from rgexport.griffin.checkpoint import Checkpoint, demo_folder, open_checkpoint
from tests.artifacts import export_random_gguf
from tests.deepmind import write_deepmind
from tests.models import ODD_CONFIGS, make_config, random_weights
from tests.models import write_hugging_face as write_model

U32, I32, F32 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32


def fields_of(path: Path) -> dict[str, Any]:
    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


def told(checkpoint: Checkpoint) -> dict[str, Any]:
    size = checkpoint.config.vocab_size
    vocabulary = read_vocabulary(checkpoint.tokenizer_files, size)
    return {value.key: value.value for value in metadata(checkpoint, {}, vocabulary)}


def test_architecture(tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["wide_lru"], tmp_path)
    reader = GGUFReader(artifact.path)
    expected = {
        "vocab_size": (U32, 256),
        "context_length": (U32, 1 << 20),
        "embedding_length": (U32, 64),
        "feed_forward_length": (U32, 96),
        "block_count": (U32, 4),
        "attention.head_count": (U32, 4),
        "attention.head_count_kv": (I32, [0, 0, 1, 0]),
        "attention.key_length": (U32, 16),
        "attention.value_length": (U32, 16),
        "attention.layer_norm_rms_epsilon": (F32, pytest.approx(1e-6)),
        "attention.sliding_window": (U32, 17),
        "rope.dimension_count": (U32, 8),
        "rope.freq_base": (F32, 10_000),
        "final_logit_softcapping": (F32, 30),
        "embedding_scale": (F32, 8),
        "ssm.conv_kernel": (U32, 4),
        "ssm.inner_size": (U32, 96),
        "ssm.state_size": (U32, 1),
        "ssm.group_count": (U32, 0),
        "ssm.time_step_rank": (U32, 4),
    }
    found = {
        name.removeprefix("recurrentgemma."): (field.types[-1], field.contents())
        for name, field in reader.fields.items()
        if name.startswith("recurrentgemma.")
    }
    assert found == expected
    assert reader.fields["general.architecture"].contents() == "recurrentgemma"


def test_demo_has_a_tokenizer_and_a_template(demo_gguf: GgufArtifact):
    assert demo_gguf.manifest.has_tokenizer and demo_gguf.manifest.instruction_tuned
    fields = fields_of(demo_gguf.path)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.scores"]) == 8192
    assert len(fields["tokenizer.ggml.token_type"]) == 8192
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")}
    assert ids == {"bos": 2, "eos": 1, "eot": 107}
    assert fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.unknown_token_id"] == 3
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    template = read_chat_template(demo_folder())
    assert template is not None and fields["tokenizer.chat_template"] == template[0]
    assert fields["general.name"] == "demo" and fields["general.size_label"] == "11M"
    assert fields["general.type"] == "model" and fields["general.license"] == "other"
    last = list(demo_gguf.header.values.items())[-2:]  # as llama-quantize sets them
    assert last == [("general.quantization_version", 2), ("general.file_type", 1)]
    manifest = json.loads(fields[MANIFEST_KEY])
    assert manifest["kind"] == "gguf" and len(manifest["source"]["files"]) == 1


def test_metadata_are_the_same_for_every_type(tmp_path):
    config = ODD_CONFIGS["regular"]
    files = [export_random_gguf(config, tmp_path, kind)[0] for kind in ("f32", "f16", "bf16")]
    values = [file.header.values for file in files]
    varying = {key for key in values[0] if len({repr(each[key]) for each in values}) > 1}
    hashes = {"rgexport.data_sha256", "rgexport.tensor_types_sha256"}
    assert varying == hashes | {"general.file_type"}


def test_without_a_tokenizer(tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["hawk"], tmp_path)
    assert fields_of(artifact.path)["tokenizer.ggml.model"] == "no_vocab"
    assert not any("tokens" in key for key in artifact.header.values)
    assert not artifact.manifest.has_tokenizer


SMALL = make_config("ra", width=32, heads=2, vocab_size=8200)


def released(folder: Path) -> Path:
    return write_model(SMALL, random_weights(SMALL), folder)


HUB = "https://huggingface.co"
ORIGINS: dict[str, dict[str, str | None]] = {
    "models--google--recurrentgemma-2b-it/snapshots/abc": {
        "general.license": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.source.url": f"{HUB}/google/recurrentgemma-2b-it",
        "general.source.huggingface.repository": "google/recurrentgemma-2b-it",
        "general.finetune": "it",
    },
    "models--me--my-griffin/snapshots/abc": {
        "general.source.url": f"{HUB}/me/my-griffin",
        "general.license": None,
        "general.organization": None,
    },
    "recurrentgemma-2b": {"general.license": "gemma", "general.finetune": None},
    "2b": {"general.license": None, "general.source.url": None},  # not DeepMind's file
}
"""Folder of a checkpoint → what is said of its origin."""


@pytest.mark.parametrize("place", ORIGINS)
def test_origin(place, tmp_path):
    values = told(open_checkpoint(released(tmp_path / place)))
    assert {key: values.get(key) for key in ORIGINS[place]} == ORIGINS[place]


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.model").write_bytes((demo_folder() / "tokenizer.model").read_bytes())
    return folder


def test_deepmind_files_have_their_released_names(tmp_path):
    path = write_deepmind(random_weights(SMALL), tmp_path).rename(tmp_path / "2b-it.pt")
    with_tokenizer(tmp_path)
    values = told(open_checkpoint(path))
    assert values["general.source.huggingface.repository"] == "google/recurrentgemma-2b-it"
    assert values["tokenizer.chat_template"] == GEMMA_TEMPLATE


def test_a_template_that_cannot_be_read_ends_the_export(tmp_path):
    folder = with_tokenizer(released(tmp_path / "model"))
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(RequestError, match=r"chat template .* cannot be read"):
        options = GgufOptions(type="f16")
        export_gguf(open_checkpoint(folder), options, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))
