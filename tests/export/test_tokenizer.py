"""The tokenizer of an artifact in other programs, beside the one that `rgexport chat` uses."""

import json
from pathlib import Path

import pytest

from rgexport.chat.artifact_text import open_template, open_tokenizer
from rgexport.chat.template import load_template
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.export.tokenizer import complete_tokenizer
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.control_tokens import read_control_tokens
from rgexport.quantize.gguf_header import read_header
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face
from tests.vocabularies import ODD_VOCABULARIES, SIZE, write_vocabulary

transformers = pytest.importorskip("transformers")
CONFIG = make_config("ra", width=32, heads=2, vocab_size=SIZE)
TEXTS = ["hello user", "  the  user", "caf\u00e9 \U0001f642\n\n42", "a <s>", "[BOS] is text"]
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the text"},
    {"role": "user", "content": "tokens"},
]
FILES = "tokenizer.json", "tokenizer_config.json"


def checkpoint(folder: Path, vocabulary: str) -> Checkpoint:
    """A random model with a vocabulary, and no word of whether it was tuned."""
    write_vocabulary(folder, **ODD_VOCABULARIES[vocabulary])
    write_hugging_face(CONFIG, random_weights(CONFIG), folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module", params=ODD_VOCABULARIES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    source = checkpoint(folder / "model", request.param)
    return export_onnx(source, OnnxOptions(precision="fp32"), folder / "onnx")


def beginning(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def can_chat(tokenizer: Tokenizer) -> bool:
    return tokenizer.end_of_turn_id is not None


def marked(text: str, tokenizer: Tokenizer) -> bool:
    """Whether other programs read markup in a text, which rgexport never does."""
    return any(literal in text for literal in tokenizer.special)


def test_transformers_reads_what_a_chat_reads(artifact: Path) -> None:
    ours, theirs = load_tokenizer(artifact), transformers.AutoTokenizer.from_pretrained(artifact)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    for text in (text for text in TEXTS if not marked(text, ours)):
        assert theirs(text)["input_ids"] == beginning(ours) + ours.encode_text(text)
    if can_chat(ours):
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        assert ids == load_template(artifact).render_ids(ours, MESSAGES, True)
    else:
        assert theirs.chat_template is None


def test_genai_reads_what_a_chat_reads(artifact: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    ours, theirs = load_tokenizer(artifact), genai.Tokenizer(genai.Model(str(artifact)))
    if ours.bos_id is not None:
        assert theirs.bos_token_id == ours.bos_id
    if ours.stop_ids:
        assert set(theirs.eos_token_ids.tolist()) == ours.stop_ids
    for text in (text for text in TEXTS if not marked(text, ours)):
        ids = theirs.encode(text)
        assert ids.tolist() == ours.encode_text(text) and theirs.decode(ids) == text
    if can_chat(ours):
        rendered = theirs.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
        ids = theirs.encode(rendered).tolist()
        assert ids == load_template(artifact).render_ids(ours, MESSAGES, True)


def test_configurations_have_the_ids_of_a_chat(artifact: Path) -> None:
    ours = load_tokenizer(artifact)
    genai = json.loads((artifact / "genai_config.json").read_text())["model"]
    for config in (genai, json.loads((artifact / "config.json").read_text())):
        assert config.get("bos_token_id") == ours.bos_id
        assert set(config.get("eos_token_id", ())) == ours.stop_ids


def test_a_tokenizer_json_alone_has_the_same_control_tokens(artifact: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
    assert read_control_tokens(tmp_path) == read_control_tokens(artifact)
    ours, alone = load_tokenizer(artifact), load_tokenizer(tmp_path)
    assert (alone.bos_id, alone.stop_ids) == (ours.bos_id, ours.stop_ids)


@pytest.mark.parametrize("vocabulary", ["brackets", "no beginning"])
def test_every_format_has_the_same_tokens_and_template(vocabulary: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", vocabulary)
    onnx = export_onnx(source, OnnxOptions(precision="fp32"), tmp_path / "onnx")
    gguf = export_gguf(source, GgufOptions(type="f32"), tmp_path / "model.gguf")
    values = read_header(gguf).values
    tokens, template = read_control_tokens(onnx), load_template(onnx)
    for key, token in {"bos": tokens.bos, "eos": tokens.eos, "padding": tokens.pad}.items():
        assert values.get(f"tokenizer.ggml.{key}_token_id") == (token and token.id)
    assert values["tokenizer.chat_template"] == template.source
    assert template.origin == "tokenizer_config.json"
    pytest.importorskip("coremltools")
    coreml = export_coreml(source, CoreMLOptions(precision="fp32"), tmp_path / "coreml")
    assert all((coreml / name).read_bytes() == (onnx / name).read_bytes() for name in FILES)


@needs_llama_cpp
@pytest.mark.parametrize("vocabulary", ODD_VOCABULARIES)
def test_llama_cpp_reads_what_a_chat_reads(vocabulary: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", vocabulary)
    gguf = export_gguf(source, GgufOptions(type="f32"), tmp_path / "model.gguf")
    ours, theirs = load_tokenizer(tmp_path / "model"), open_tokenizer(open_artifact(gguf))
    assert (theirs.bos_id, theirs.stop_ids) == (ours.bos_id, ours.stop_ids)
    assert theirs.unknown_id == ours.unknown_id
    for text in TEXTS:
        assert theirs.encode_text(text) == ours.encode_text(text)
    if can_chat(ours):
        template = open_template(open_artifact(gguf))
        ids = template.render_ids(theirs, MESSAGES, True)
        assert ids == load_template(tmp_path / "model").render_ids(ours, MESSAGES, True)


def test_what_a_checkpoint_names_is_kept_unless_the_vocabulary_lacks_it(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path, **ODD_VOCABULARIES["brackets"])
    named = {"bos_token": "<bos>", "eos_token": {"content": "<end_of_turn>"}, "model_max_length": 9}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ids = complete_tokenizer(folder, "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "[BOS]" and config["pad_token"] == "[PAD]"
    assert config["eos_token"] == named["eos_token"] and config["model_max_length"] == 9
    assert config["chat_template"] == "{{ messages[0].content }}"
    assert (ids.bos_token_id, ids.eos_token_id[0], ids.pad_token_id) == (7, 6, 0)


def test_special_tokens_map_names_the_tokens_of_a_tokenizer_json(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path, **ODD_VOCABULARIES["brackets"])
    complete_tokenizer(folder, "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "special_tokens_map.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (7, 6)


def test_a_model_that_cannot_chat_is_told(tmp_path: Path, capsys) -> None:
    folder = write_vocabulary(tmp_path, **ODD_VOCABULARIES["no turns"])
    complete_tokenizer(folder, "griffin")
    assert "griffin cannot chat: its tokenizer has no <start_of_turn>" in capsys.readouterr().err
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_damaged_settings_end_the_export_in_one_line(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(RequestError, match=r"tokenizer_config.json cannot be read .*copy it again"):
        complete_tokenizer(folder, "model")


@pytest.mark.parametrize("prefix", [True, False])
def test_text_is_normalized_as_sentencepiece_does(prefix: bool, tmp_path: Path, capsys) -> None:
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    folder = write_vocabulary(tmp_path, add_dummy_prefix=prefix, **options)
    complete_tokenizer(folder, "model")
    assert "(nmt_nfkc), which onnxruntime-genai does not" in capsys.readouterr().err
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ["hello user", "  the   user ", "\uff34\uff25\uff38\uff34 \ufb01", "a\tb"]:
        assert theirs(text)["input_ids"] == beginning(ours) + ours.encode_text(text)
