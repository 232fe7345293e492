"""Which tokenizer.json files are run; the others end in one line, whatever the library would do."""

import json
from pathlib import Path
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.griffin.tokenizer_json import panics_raised, read_tokenizer_json

Fields = dict[str, Any]


def replace(pattern: Any, content: str) -> Fields:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*steps: Fields) -> Fields:
    return {"type": "Sequence", "normalizers": list(steps)}


def made(**fields: Any) -> Fields:
    """A small tokenizer of Gemma's form, with other fields."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    sound = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": replace({"String": " "}, "▁"),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": model | {"byte_fallback": True, "fuse_unk": True},
    }
    return sound | fields


DOUBLED = replace({"String": "a"}, "aa")
HOSTILE: dict[str, tuple[Fields, str]] = {
    "bomb": (made(normalizer=chain(*[DOUBLED] * 5)), "more than 16 times as long"),
    "large replacement": (made(normalizer=replace({"String": "a"}, "b" * 65)), "is 65 characters"),
    "prepend of 10 MB": (
        made(normalizer={"type": "Prepend", "prepend": "a" * 10_000_000}),
        "normalizer.prepend is 10000000 characters; expected a text of at most 64",
    ),
    "many steps": (made(normalizer=chain(*[{"type": "NFC"}] * 17)), "more than 16 steps"),
    "nested steps": (
        made(normalizer=chain(chain(*[{"type": "NFC"}] * 9), chain(*[{"type": "NFC"}] * 9))),
        "more than 16 steps",
    ),
    "empty pattern": (made(normalizer=replace({"String": ""}, "b")), "pattern is empty"),
    "no pattern": (made(normalizer=replace({}, "b")), "pattern is empty"),
    "slow expression": (made(normalizer=replace({"Regex": "(a+)+$"}, "b")), r"expression '\(a\+\)"),
    "broken expression": (made(normalizer=replace({"Regex": "(?<n>a"}, "b")), "expression"),
    "expression that recurses": (made(normalizer=replace({"Regex": r"\g<0>"}, "b")), "expression"),
    "expression in a split": (
        made(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(.*)*"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "pre_tokenizer.pattern is the regular expression",
    ),
    "unknown step": (made(normalizer={"type": "Script"}), "normalizer has a step 'Script'"),
    "no step": (made(decoder=[1]), r"decoder has a step \[1\]"),
    "long token": (
        made(added_tokens=[{"id": 0, "content": "a" * 1025, "special": True}]),
        "added_tokens.content is 1025 characters",
    ),
    "many tokens": (made(added_tokens=[{}] * 65537), "added_tokens is no list of at most 65536"),
    "no model": ({"version": "1.0"}, "no object `model`"),
}


def written(folder: Path, fields: Fields) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, tmp_path):
    fields, complaint = HOSTILE[case]
    path = written(tmp_path, fields)
    with pytest.raises(RequestError, match=complaint) as caught:
        read_tokenizer_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


SOUND = {
    "Gemma": {},
    "Llama": {
        "normalizer": chain({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"))
    },
    "runs of spaces": {"normalizer": replace({"Regex": " {2,}"}, "▁")},
    "Metaspace": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
    },
    "decoders": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replace({"String": "▁"}, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        }
    },
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_file(case, tmp_path):
    file = read_tokenizer_json(written(tmp_path, made(**SOUND[case])))
    assert file.engine().encode("a b").ids and file.fields["model"]["byte_fallback"]


def test_a_panic_is_one_line(tmp_path):
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with (
        pytest.raises(RequestError, match=r"tokenizers failed on .*: it broke"),
        panics_raised(tmp_path),
    ):
        raise panic("it broke")
    with pytest.raises(KeyboardInterrupt), panics_raised(tmp_path):
        raise KeyboardInterrupt
