"""The header reader, with files of gguf-py and with forged ones."""

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.quantize.gguf_header import MAGIC, is_gguf, read_header

ARRAYS = {
    "norm.weight": np.arange(5, dtype=np.float32),
    "half.weight": np.arange(64, dtype=np.float16).reshape(2, 32),
    "gate.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}
VALUES = {
    "a.bool": True,
    "a.float32": 0.5,
    "a.string": "naïve ▁text",
    "a.uint32": 4_000_000_000,
    "a.int32": -7,
    "a.array.strings": ["", "▁a", "b"],
    "a.array.floats": [0.5, -1.0, 3.0],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "some")
    for key, value in VALUES.items():
        getattr(writer, f"add_{key.split('.')[1]}")(key, value)
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    blocks = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_and_tensors_are_those_that_were_written(good: Path) -> None:
    header = read_header(good)
    assert is_gguf(good) and header.version == 3
    values = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in header.values.items()
    }
    assert values == {"general.architecture": "some", **VALUES}
    assert list(header.tensors) == [*ARRAYS, "q.weight"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(header.tensors[name].rows().whole(), array)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(good).tensors}
    for name, tensor in header.tensors.items():
        assert (tensor.offset, tensor.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
    start, stop = header.spans["a.uint32"]
    assert good.read_bytes()[start:stop] == struct.pack("<II", 4, 4_000_000_000)
    quantized = header.tensors["q.weight"]
    assert (quantized.shape, quantized.type.name, quantized.nbytes) == ((3, 64), "q8_0", 3 * 68)
    assert quantized.rows().whole().shape == (3, 68)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_header(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_every_truncation_is_refused(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in read_header(good).tensors.values())
    for size in range(end):
        refusal(tmp_path / "cut.gguf", content[:size])
    assert "is truncated" in refusal(tmp_path / "cut.gguf", content[: end - 1])


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word.encode())) + word.encode()


def header_of(values: Sequence[bytes], tensors: Sequence[bytes] = ()) -> bytes:
    counts = struct.pack("<IQQ", 3, len(tensors), len(values))
    return MAGIC + counts + b"".join([*values, *tensors])


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


HUGE = 1 << 62
WRONG_VALUES = {
    "endless string": (struct.pack("<IQ", 8, HUGE), "truncated or damaged"),
    "endless array": (struct.pack("<IIQ", 9, 0, HUGE), "truncated or damaged"),
    "endless strings": (struct.pack("<IIQ", 9, 8, HUGE), "truncated or damaged"),
    "array of arrays": (struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
    "unknown value": (struct.pack("<I", 77), "unknown type 77"),
    "no text": (struct.pack("<IQ", 8, 1) + b"\xff", "not UTF-8"),
}
WRONG_TENSORS = {
    "no dimensions": ([tensor("t", (), 0, 0)], "0 dimensions"),
    "huge dimensions": ([tensor("t", (HUGE, HUGE), 0, 0)], "truncated"),
    "an empty tensor": ([tensor("t", (0,), 0, 0)], "cannot be f32"),
    "half a block": ([tensor("t", (48,), 2, 0)], "cannot be q4_0"),
    "unknown tensor type": ([tensor("t", (32,), 20, 0)], "type 20"),
    "a gap": ([tensor("t", (1,), 0, 32)], "does not follow"),
    "a tensor twice": ([tensor("t", (8,), 0, 0), tensor("t", (8,), 0, 32)], "tensor t twice"),
}
NUMBER = struct.pack("<II", 4, 24)
FORGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "foreign": (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
    "version 1": (MAGIC + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
    "big-endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless values": (MAGIC + struct.pack("<IQQ", 3, 0, HUGE), "truncated or damaged"),
    "endless tensors": (MAGIC + struct.pack("<IQQ", 3, HUGE, 0), "truncated or damaged"),
    "endless key": (header_of([struct.pack("<Q", HUGE)]), "a name .* bytes long"),
    "lines in a key": (header_of([text("a\nb") + NUMBER]), r"name 'a\\nb'"),
    "a key twice": (header_of(2 * [text("a") + NUMBER]), "has a twice"),
    "odd alignment": (header_of([text("general.alignment") + NUMBER]), "alignment is 24"),
    **{
        case: (header_of([text("a") + value]), said) for case, (value, said) in WRONG_VALUES.items()
    },
    "more than it says": (
        header_of([], [tensor("t", (8,), 0, 0)]) + bytes(200),
        "is damaged: it has",
    ),
    **{case: (header_of([], tensors), said) for case, (tensors, said) in WRONG_TENSORS.items()},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, complaint = FORGED[case]
    path = tmp_path / "forged.gguf"
    assert re.search(complaint, refusal(path, content))
