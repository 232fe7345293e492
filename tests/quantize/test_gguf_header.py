"""The header reader, with files of gguf-py and with forged ones."""

import struct
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
    quantized = header.tensors["q.weight"]
    assert (quantized.shape, quantized.type.name, quantized.nbytes) == ((3, 64), "q8_0", 3 * 68)
    assert quantized.rows().whole().shape == (3, 68)


def test_tensors_lie_where_gguf_py_finds_them(good: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(good).tensors}
    for name, tensor in read_header(good).tensors.items():
        assert (tensor.offset, tensor.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)


def test_a_span_holds_type_and_value(good: Path) -> None:
    start, stop = read_header(good).spans["a.uint32"]
    assert good.read_bytes()[start:stop] == struct.pack("<II", 4, 4_000_000_000)


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


def header_of(values: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 1)) -> bytes:
    return MAGIC + struct.pack("<IQQ", 3, *counts) + values + tensors


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


HUGE = 1 << 62
FORGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "foreign": (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
    "version 1": (MAGIC + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
    "big-endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless values": (header_of(counts=(0, HUGE)), "truncated or damaged"),
    "endless tensors": (header_of(counts=(HUGE, 0)), "truncated or damaged"),
    "endless key": (header_of(struct.pack("<Q", HUGE)), "a name .* bytes long"),
    "endless string": (header_of(text("a") + struct.pack("<IQ", 8, HUGE)), "truncated or damaged"),
    "endless array": (header_of(text("a") + struct.pack("<IIQ", 9, 0, HUGE)), "truncated or dam"),
    "endless strings": (header_of(text("a") + struct.pack("<IIQ", 9, 8, HUGE)), "truncated or dam"),
    "array of arrays": (header_of(text("a") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
    "unknown value": (header_of(text("a") + struct.pack("<I", 77)), "unknown type 77"),
    "no text": (header_of(text("a") + struct.pack("<IQ", 8, 1) + b"\xff"), "not UTF-8"),
    "lines in a key": (header_of(text("a\nb") + struct.pack("<II", 4, 1)), r"name 'a\\nb'"),
    "a key twice": (
        header_of(2 * (text("a") + struct.pack("<II", 4, 1)), counts=(0, 2)),
        "has a twice",
    ),
    "odd alignment": (
        header_of(text("general.alignment") + struct.pack("<II", 4, 24)),
        "alignment is 24",
    ),
    "no dimensions": (header_of(tensors=tensor("t", (), 0, 0), counts=(1, 0)), "0 dimensions"),
    "huge dimensions": (
        header_of(tensors=tensor("t", (HUGE, HUGE), 0, 0), counts=(1, 0)),
        "truncated",
    ),
    "an empty tensor": (header_of(tensors=tensor("t", (0,), 0, 0), counts=(1, 0)), "cannot be f32"),
    "half a block": (header_of(tensors=tensor("t", (48,), 2, 0), counts=(1, 0)), "cannot be q4_0"),
    "unknown tensor type": (header_of(tensors=tensor("t", (32,), 20, 0), counts=(1, 0)), "type 20"),
    "a gap": (header_of(tensors=tensor("t", (1,), 0, 32), counts=(1, 0)), "does not follow"),
    "a tensor twice": (
        header_of(tensors=tensor("t", (8,), 0, 0) + tensor("t", (8,), 0, 32), counts=(2, 0)),
        "tensor t twice",
    ),
    "more than it says": (
        header_of(tensors=tensor("t", (8,), 0, 0), counts=(1, 0)) + bytes(200),
        "is damaged: it has",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, complaint = FORGED[case]
    path = tmp_path / "forged.gguf"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=complaint):
        read_header(path)
    refusal(path, content)


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        assert not is_gguf(path)
        with pytest.raises(RequestError, match="cannot be read"):
            read_header(path)
