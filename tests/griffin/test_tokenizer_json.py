"""Which tokenizer.json files are run; the others end in one line, whatever the library would do."""

import json
from pathlib import Path
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.griffin.tokenizer_files import guarded, read_tokenizer_json

Fields = dict[str, Any]


def replace(pattern: Any, content: str) -> Fields:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*steps: Fields) -> Fields:
    return {"type": "Sequence", "normalizers": list(steps)}


def written(folder: Path, **fields: Any) -> Path:
    """A small tokenizer of Gemma's form, with other fields."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    sound = {
        **{"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "post_processor": None},
        "normalizer": replace({"String": " "}, "▁"),
        "decoder": {"type": "ByteFallback"},
        "model": model | {"byte_fallback": True, "fuse_unk": True},
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(sound | fields))
    return path


DOUBLED, UNICODE = replace({"String": "a"}, "aa"), {"type": "NFC"}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": "(.*)*"}}
PREPENDED = {"type": "Prepend", "prepend": "a" * 10_000_000}
LONG_TOKEN = {"id": 0, "content": "a" * 1025, "special": True}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"normalizer": chain(*[DOUBLED] * 5)}, "more than 16 times as long"),
        ({"normalizer": PREPENDED}, r"normalizer.prepend is 10000000 char.*of at most 64"),
        ({"normalizer": chain(chain(*[UNICODE] * 9), chain(*[UNICODE] * 9))}, "more than 16 steps"),
        ({"normalizer": replace({"String": ""}, "b")}, "pattern is empty"),
        ({"normalizer": replace({"Regex": "(a+)+$"}, "b")}, r"expression '\(a\+\)"),
        ({"normalizer": replace({"Regex": r"\g<0>"}, "b")}, "expression"),
        ({"pre_tokenizer": SPLIT}, "pre_tokenizer.pattern is the regular expression"),
        ({"normalizer": {"type": "Script"}}, "normalizer has a step 'Script'"),
        ({"added_tokens": [LONG_TOKEN]}, "added_tokens.content is 1025 characters"),
        ({"model": None}, "no object `model`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_file(fields, complaint, tmp_path):
    path = written(tmp_path, **fields)
    with pytest.raises(RequestError, match=complaint) as caught:
        read_tokenizer_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


LLAMA = {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODERS = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"normalizer": chain(*LLAMA), "decoder": {"type": "Sequence", "decoders": DECODERS}},
        {"normalizer": replace({"Regex": " {2,}"}, "▁")},
        {"normalizer": None, "pre_tokenizer": METASPACE},
    ],
    ids=["Gemma", "Llama", "runs of spaces", "Metaspace"],
)
def test_sound_file(fields, tmp_path):
    file = read_tokenizer_json(written(tmp_path, **fields))
    assert file.engine().encode("a b").ids and file.fields["model"]["byte_fallback"]


def test_a_panic_is_one_line(tmp_path):
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(RequestError, match=r"\(it broke\)"), guarded(tmp_path):
        raise panic("it broke")
    with pytest.raises(KeyboardInterrupt), guarded(tmp_path):
        raise KeyboardInterrupt
