"""What a GGUF file holds beside the weights: metadata and vocabulary."""

import numpy as np
import pytest
import sentencepiece
from gguf import GGUFReader, GGUFValueType
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from rgexport.artifacts.gguf import vocabulary as kinds
from rgexport.artifacts.gguf.vocabulary import read_vocabulary
from rgexport.errors import RequestError
from rgexport.export.gguf.exporter import metadata
from rgexport.export.tokenizer import write_tokenizer_json
from rgexport.griffin.checkpoint import demo_folder, open_checkpoint
from rgexport.griffin.control_tokens import read_chat_template
from tests.artifacts import export_random_gguf
from tests.models import ODD_CONFIGS, make_config, random_weights
from tests.models import write_hugging_face as write_model

EXPECTED = {
    **{"vocab_size": 256, "context_length": 1 << 20, "embedding_length": 64},
    **{"feed_forward_length": 96, "block_count": 4, "attention.head_count": 4},
    **{"attention.head_count_kv": [0, 0, 1, 0], "attention.key_length": 16},
    **{"attention.value_length": 16, "attention.sliding_window": 17, "rope.dimension_count": 8},
    **{"ssm.conv_kernel": 4, "ssm.inner_size": 96, "ssm.state_size": 1, "ssm.group_count": 0},
    **{"ssm.time_step_rank": 4, "rope.freq_base": 1e4, "final_logit_softcapping": 30.0},
    **{"embedding_scale": 8.0, "attention.layer_norm_rms_epsilon": pytest.approx(1e-6)},
}
FLOATS = [*EXPECTED][-4:]


def test_architecture_and_values(tmp_path):
    artifact, weights = export_random_gguf(ODD_CONFIGS["wide_lru"], tmp_path)
    reader = GGUFReader(artifact.path)
    fields = {
        name.removeprefix("recurrentgemma."): field
        for name, field in reader.fields.items()
        if name.startswith("recurrentgemma.")
    }
    assert {name: field.contents() for name, field in fields.items()} == EXPECTED
    types = dict.fromkeys(EXPECTED, GGUFValueType.UINT32)
    types |= {"attention.head_count_kv": GGUFValueType.INT32}
    types |= dict.fromkeys(FLOATS, GGUFValueType.FLOAT32)
    assert {name: field.types[-1] for name, field in fields.items()} == types
    assert reader.fields["general.architecture"].contents() == "recurrentgemma"
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert not any("tokens" in key for key in reader.fields)
    stored = {tensor.name: tensor.data.squeeze() for tensor in reader.tensors}
    recurrent = "layers.0.temporal_block"
    gate = weights[f"{recurrent}.rg_lru.recurrent_gate_weight"].swapaxes(1, 2)
    np.testing.assert_array_equal(stored["blk.0.rg_lru_a_gate.weight"].reshape(gate.shape), gate)
    taps = weights[f"{recurrent}.conv_1d.weight"].squeeze()
    np.testing.assert_array_equal(stored["blk.0.ssm_conv1d.weight"], taps)
    decay = -8 * np.logaddexp(0, weights[f"{recurrent}.rg_lru.recurrent_param"].astype(np.float64))
    np.testing.assert_array_equal(stored["blk.0.ssm_a"], decay.astype(np.float32))
    np.testing.assert_array_equal(stored["output_norm.weight"], weights["final_norm.weight"] + 1)


def test_demo_has_a_tokenizer_and_a_template(demo_gguf):
    assert demo_gguf.manifest.has_tokenizer and demo_gguf.manifest.instruction_tuned
    reader = GGUFReader(demo_gguf.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = "tokenizer.ggml."
    ids = {key.removeprefix(tokenizer): fields[key] for key in fields if key.endswith("token_id")}
    expected = {"bos": 2, "eos": 1, "eot": 107, "padding": 0, "unknown": 3}
    assert ids == {f"{name}_token_id": id for name, id in expected.items()}
    flags = {key.removeprefix(tokenizer): fields[key] for key in fields if ".add_" in key}
    assert flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": False}
    assert fields[f"{tokenizer}model"] == "llama"
    for name in ("tokens", "scores", "token_type"):
        assert len(fields[tokenizer + name]) == 8192
    template = read_chat_template(demo_folder())
    assert template is not None and fields["tokenizer.chat_template"] == template[0]
    assert fields["general.name"] == "demo" and fields["general.size_label"] == "11M"
    assert fields["general.type"] == "model" and fields["general.license"] == "other"
    last = list(demo_gguf.header.values.items())[-2:]  # as llama-quantize sets them
    assert last == [("general.quantization_version", 2), ("general.file_type", 1)]


SMALL = make_config("ra", width=32, heads=2, vocab_size=8200)
GOOGLE, MINE = "google/recurrentgemma-2b-it", "me/my-griffin"
ORIGINS = {
    "models--google--recurrentgemma-2b-it/snapshots/abc": {
        "general.license": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.source.url": f"https://huggingface.co/{GOOGLE}",
        "general.source.huggingface.repository": GOOGLE,
        "general.finetune": "it",
    },
    "models--me--my-griffin/snapshots/abc": {
        "general.source.url": f"https://huggingface.co/{MINE}",
        "general.license": None,
    },
    "2b": {"general.license": None, "general.source.url": None},  # not DeepMind's file
}
"""Folder of a checkpoint → what is said of its origin."""


def told(checkpoint):
    size = checkpoint.config.vocab_size
    vocabulary = read_vocabulary(checkpoint.tokenizer_files, size)
    return metadata(checkpoint, {}, vocabulary)


@pytest.mark.parametrize("folder", ORIGINS)
def test_origin(folder, tmp_path):
    model = write_model(SMALL, random_weights(SMALL), tmp_path / folder)
    values = told(open_checkpoint(model))
    assert {key: values.get(key) for key in ORIGINS[folder]} == ORIGINS[folder]


DEMO = demo_folder() / "tokenizer.model"
SIZE = 8192


@pytest.fixture(scope="module")
def vocabulary():
    return read(DEMO)


def read(path, size=SIZE):
    vocabulary = read_vocabulary([path], size)
    assert vocabulary is not None
    return vocabulary


def test_pieces_scores_and_ids_are_those_of_sentencepiece(vocabulary):
    engine = sentencepiece.SentencePieceProcessor(model_file=str(DEMO))
    assert len(vocabulary.tokens) == len(vocabulary.types) == SIZE
    for index in range(SIZE):
        assert vocabulary.tokens[index] == engine.IdToPiece(index)
        assert vocabulary.scores[index] == engine.GetScore(index)
        assert (vocabulary.types[index] == kinds.BYTE) == engine.IsByte(index)
    control = vocabulary.control
    tokens = control.pad, control.eos, control.bos, control.unk, control.end_of_turn
    assert [token and token.id for token in tokens] == [0, 1, 2, 3, 107]
    assert not vocabulary.add_space_prefix
    types = dict(zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True))
    markup = "<pad> <eos> <bos> <mask> <2mass> [@BOS@] <unused0> <start_of_turn> <end_of_turn>"
    assert {types[piece] for piece in markup.split()} == {kinds.CONTROL}
    assert types["<unk>"] == kinds.UNKNOWN
    own = "<table> </s> <h1> \n \n\n"
    assert {types[piece] for piece in own.split(" ")} == {kinds.USER_DEFINED}
    assert {types[piece] for piece in ("▁▁", "▁" * 31, "▁the", "in")} == {kinds.NORMAL}


def test_json_has_the_same_pieces_in_the_same_order_of_scores(vocabulary, tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(DEMO, path)
    other = read(path)
    assert other.tokens == vocabulary.tokens
    np.testing.assert_array_equal(other.types, vocabulary.types)
    assert other.control.bos == vocabulary.control.bos
    merged = [i for i in range(SIZE) if other.types[i] == kinds.NORMAL and len(other.tokens[i]) > 1]
    order = np.argsort(-other.scores[merged], kind="stable")
    assert (np.diff(vocabulary.scores[merged][order]) <= 0).all()
    path.write_text("{")
    assert read_vocabulary([path, DEMO], SIZE) is not None  # SentencePiece's comes first


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_refused(vocabulary):
    padded = read(DEMO, SIZE + 2)
    assert padded.tokens == [*vocabulary.tokens, "[PAD8192]", "[PAD8193]"]
    assert padded.types[-2:].tolist() == [kinds.UNUSED, kinds.UNUSED]
    with pytest.raises(RequestError, match=r"8192 tokens .* 8191 rows"):
        read(DEMO, SIZE - 1)


def test_other_normalization(tmp_path, capsys):
    """A learned piece with two spaces makes runs of spaces match in raw text."""
    model = ModelProto.FromString(DEMO.read_bytes())
    model.pieces[8000].piece = "▁▁x"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    model.normalizer_spec.name = "nmt_nfkc"
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    vocabulary = read(path)
    assert vocabulary.tokens[139] == "  " and vocabulary.types[139] == kinds.USER_DEFINED
    assert vocabulary.add_space_prefix
    assert "normalizes text (nmt_nfkc); llama.cpp does not" in capsys.readouterr().err
    model.trainer_spec.byte_fallback = False
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RequestError, match="not a BPE model"):
        read(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"model": {"vocab": 3}}'])
def test_unreadable(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=name) as caught:
        read(path)
    assert "\n" not in str(caught.value)
