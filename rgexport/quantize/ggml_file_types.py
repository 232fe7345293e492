"""The file types of llama-quantize: a word for how most tensors of a GGUF file are stored."""

from dataclasses import dataclass

from rgexport.errors import RequestError


@dataclass(frozen=True)
class FileType:
    """What `general.file_type` says of a file."""

    name: str
    value: int
    """The number of `enum llama_ftype` (llama.h)."""
    default: str
    """The tensor type that the mix starts from."""


_ROWS = (
    FileType("f32", 0, "f32"),
    FileType("f16", 1, "f16"),
    FileType("bf16", 32, "bf16"),
    FileType("q8_0", 7, "q8_0"),
    FileType("q6_k", 18, "q6_k"),
    FileType("q5_1", 9, "q5_1"),
    FileType("q5_0", 8, "q5_0"),
    FileType("q5_k_m", 17, "q5_k"),
    FileType("q5_k_s", 16, "q5_k"),
    FileType("q4_1", 3, "q4_1"),
    FileType("q4_0", 2, "q4_0"),
    FileType("q4_k_m", 15, "q4_k"),
    FileType("q4_k_s", 14, "q4_k"),
    FileType("q3_k_l", 13, "q3_k"),
    FileType("q3_k_m", 12, "q3_k"),
    FileType("q3_k_s", 11, "q3_k"),
    FileType("q2_k", 10, "q2_k"),
    FileType("q2_k_s", 21, "q2_k"),
)
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_BY_NAME = {row.name: row for row in _ROWS}

FILE_TYPES: dict[str, FileType] = _BY_NAME | {a: _BY_NAME[name] for a, name in _ALIASES.items()}
"""Word, as llama-quantize knows it in lower case → file type; an alias has its target's name."""

INT_WORDS = {"int8": "q8_0", "int4": "q4_k_m"}
"""`--int8` and `--int4` → the best file type of so many bits."""


def find_file_type(word: str) -> FileType:
    """The file type that a user names, in any case.

    Raises:
        RequestError: an unknown type.
    """
    try:
        return FILE_TYPES[word.lower()]
    except KeyError:
        raise RequestError(
            f"unknown type {word!r}; expected one of {', '.join(FILE_TYPES)}"
        ) from None
