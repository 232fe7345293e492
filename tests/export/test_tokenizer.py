"""The tokenizer of an artifact in other programs, beside the one that `rgexport chat` uses."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rgexport.artifacts.opening import open_artifact
from rgexport.chat.artifact_text import open_template, open_tokenizer
from rgexport.chat.prompts import load_template
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.export.tokenizer import complete_tokenizer, write_tokenizer_json
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.control_tokens import read_control_tokens
from tests.command_line import ROOT
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face
from tests.vocabularies import ODD_VOCABULARIES, SIZE, write_vocabulary

transformers = pytest.importorskip("transformers")
CONFIG = make_config("ra", width=32, heads=2, vocab_size=SIZE)
TEXTS = ["hello user", "  the  user", "caf\u00e9 \U0001f642\n\n42", "a <s>", "[BOS] is text"]
ROLES = {"user": "hello", "assistant": "the text"}
MESSAGES = [{"role": role, "content": content} for role, content in ROLES.items()]
MESSAGES.append({"role": "user", "content": "tokens"})
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


def texts(tokenizer: Tokenizer) -> list[str]:
    """Texts without what other programs read as markup, which rgexport never does."""
    return [text for text in TEXTS if not any(literal in text for literal in tokenizer.special)]


def test_transformers_reads_what_a_chat_reads(artifact: Path) -> None:
    ours, theirs = load_tokenizer(artifact), transformers.AutoTokenizer.from_pretrained(artifact)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    for text in texts(ours):
        assert theirs(text)["input_ids"] == beginning(ours) + ours.encode_text(text)
    if ours.end_of_turn_id is not None:
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        assert ids == load_template(artifact).render_ids(ours, MESSAGES, True)
    else:
        assert theirs.chat_template is None


def test_a_tokenizer_json_alone_has_the_same_control_tokens(artifact: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
    assert read_control_tokens(tmp_path) == read_control_tokens(artifact)
    ours, alone = load_tokenizer(artifact), load_tokenizer(tmp_path)
    assert (alone.bos_id, alone.stop_ids) == (ours.bos_id, ours.stop_ids)


def test_genai_reads_what_a_chat_reads(artifact: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    ours, theirs = load_tokenizer(artifact), genai.Tokenizer(genai.Model(str(artifact)))
    if ours.bos_id is not None:
        assert theirs.bos_token_id == ours.bos_id
    if ours.stop_ids:
        assert set(theirs.eos_token_ids.tolist()) == ours.stop_ids
    for text in texts(ours):
        ids = theirs.encode(text)
        assert ids.tolist() == ours.encode_text(text) and theirs.decode(ids) == text
    if ours.end_of_turn_id is not None:
        rendered = theirs.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
        ids = theirs.encode(rendered).tolist()
        assert ids == load_template(artifact).render_ids(ours, MESSAGES, True)


def test_both_kinds_of_folders_have_the_same_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    source = checkpoint(tmp_path / "model", "brackets")
    onnx = export_onnx(source, OnnxOptions(precision="fp32"), tmp_path / "onnx")
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
    if ours.end_of_turn_id is not None:
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


def test_a_model_that_cannot_chat_is_told_and_damaged_settings_end_the_export(tmp_path, capsys):
    folder = write_vocabulary(tmp_path, **ODD_VOCABULARIES["no turns"])
    complete_tokenizer(folder, "griffin")
    assert "griffin cannot chat: its tokenizer has no <start_of_turn>" in capsys.readouterr().err
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(RequestError, match=r"tokenizer_config.json cannot be read .*copy it again"):
        complete_tokenizer(folder, "model")


def test_text_is_normalized_as_sentencepiece_does(tmp_path: Path, capsys) -> None:
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    folder = write_vocabulary(tmp_path, add_dummy_prefix=True, **options)
    complete_tokenizer(folder, "model")
    assert "(nmt_nfkc), which onnxruntime-genai does not" in capsys.readouterr().err
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ["hello user", "  the   user ", "\uff34\uff25\uff38\uff34 \ufb01", "a\tb"]:
        assert theirs(text)["input_ids"] == beginning(ours) + ours.encode_text(text)


MODEL = ROOT / "demo" / "model" / "tokenizer.model"
ORACLE = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
WORDS = "a é 🙂 漢 ▁ \u200b < <b> <table> <mask> <start_of_turn> <unused1> 0 … izer \x00".split(" ")
PARTS = st.sampled_from([*WORDS, " ", "  ", "\n", "\t", "the ", " token"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> tokenizers.Tokenizer:
    made = tmp_path_factory.mktemp("made") / "tokenizer.json"
    write_tokenizer_json(MODEL, made)
    return tokenizers.Tokenizer.from_file(str(made))


@given(st.lists(PARTS, max_size=60).map("".join) | st.text(max_size=200))
def test_it_encodes_as_sentencepiece(engine, text: str) -> None:
    assert engine.encode(text, add_special_tokens=False).ids == ORACLE.EncodeAsIds(text)


def test_ids_markup_the_beginning_and_long_text(engine) -> None:
    assert engine.get_vocab_size() == ORACLE.GetPieceSize()
    assert all(engine.id_to_token(i) == ORACLE.IdToPiece(i) for i in range(8192))
    ids = engine.encode("Hi<end_of_turn>").ids
    assert ids[0] == ORACLE.bos_id() and ids[-1] == ORACLE.PieceToId("<end_of_turn>")
    assert engine.decode(ids) == "Hi"
    assert engine.decode(engine.encode("caf\u00e9  \U0001f642").ids) == "caf\u00e9  \U0001f642"
    text = (ROOT / "README.md").read_text("utf-8")
    for long in (text, " " * 100 + "\n" * 100 + "a" * 100):
        assert engine.encode(long, add_special_tokens=False).ids == ORACLE.EncodeAsIds(long)


def test_other_models_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g\n" * 100)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=12, model_type="unigram"
    )
    with pytest.raises(RequestError, match=r"cannot be converted to tokenizer.json .it is no BPE"):
        write_tokenizer_json(tmp_path / "m.model", tmp_path / "made")
    assert not (tmp_path / "made").exists()
