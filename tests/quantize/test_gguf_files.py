"""Headers of GGUF files and importance matrices in both formats, sound and forged ones."""

import re
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.quantize.gguf_header import MAGIC, is_gguf, read_header
from rgexport.quantize.imatrix import MAX_BYTES, read_imatrix
from tests.quantize.ggml_files import write_imatrix, write_tensors

ARRAYS = {
    "norm.weight": np.arange(5, dtype=np.float32),
    "half.weight": np.arange(64, dtype=np.float16).reshape(2, 32),
    "gate.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}
VALUES = {
    **{"a.bool": True, "a.float32": 0.5, "a.string": "naïve ▁text"},
    **{"a.uint32": 4_000_000_000, "a.int32": -7},
    **{"a.array.strings": ["", "▁a", "b"], "a.array.floats": [0.5, -1.0, 3.0]},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "some")
    for key, value in VALUES.items():
        getattr(writer, f"add_{key.split('.')[1]}")(key, value)
    blocks = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.add_tensor("q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    write_tensors(writer, {})
    return path


def test_values_and_tensors_are_those_that_were_written(good):
    header = read_header(good)
    assert is_gguf(good) and header.version == 3
    values = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in header.values.items()
    }
    assert values == {"general.architecture": "some", **VALUES}
    assert list(header.tensors) == [*ARRAYS, "q.weight"]
    for name, array in ARRAYS.items():
        tensor = header.tensors[name]
        content = good.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert content == array.tobytes() and tensor.shape == array.shape
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(good).tensors}
    for name, tensor in header.tensors.items():
        assert (tensor.offset, tensor.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
    start, stop = header.spans["a.uint32"]
    assert good.read_bytes()[start:stop] == struct.pack("<II", 4, 4_000_000_000)
    quantized = header.tensors["q.weight"]
    assert (quantized.shape, quantized.type.name, quantized.nbytes) == ((3, 64), "q8_0", 3 * 68)


def refusal(read, path, content):
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_every_truncation_is_refused(good, tmp_path):
    content = good.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in read_header(good).tensors.values())
    for size in range(end):
        refusal(read_header, tmp_path / "cut.gguf", content[:size])
    assert "is truncated" in refusal(read_header, tmp_path / "cut.gguf", content[: end - 1])


def text(word):
    return struct.pack("<Q", len(word.encode())) + word.encode()


def header_of(values, tensors=()):
    return MAGIC + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join([*values, *tensors])


def tensor(name, shape, kind, offset):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


HUGE, NUMBER = 1 << 62, struct.pack("<II", 4, 24)
WRONG_VALUES = {
    "endless string": (struct.pack("<IQ", 8, HUGE), "truncated or damaged"),
    "endless array": (struct.pack("<IIQ", 9, 0, HUGE), "truncated or damaged"),
    "no text": (struct.pack("<IQ", 8, 1) + b"\xff", "not UTF-8"),
}
WRONG_TENSORS = {
    "huge dimensions": ([tensor("t", (HUGE, HUGE), 0, 0)], "truncated"),
    "an empty tensor": ([tensor("t", (0,), 0, 0)], "cannot be f32"),
    "half a block": ([tensor("t", (48,), 2, 0)], "cannot be q4_0"),
    "unknown tensor type": ([tensor("t", (32,), 31, 0)], "type 31"),
    "a gap": ([tensor("t", (1,), 0, 32)], "does not follow"),
    "a tensor twice": ([tensor("t", (8,), 0, 0), tensor("t", (8,), 0, 32)], "tensor t twice"),
}
FORGED = {
    "foreign": (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
    "big-endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless values": (MAGIC + struct.pack("<IQQ", 3, 0, HUGE), "truncated or damaged"),
    "endless key": (header_of([struct.pack("<Q", HUGE)]), "the name None of .* bytes"),
    "lines in a key": (header_of([text("a\nb") + NUMBER]), r"name 'a\\nb'"),
    "a key twice": (header_of(2 * [text("a") + NUMBER]), "has a twice"),
    "odd alignment": (header_of([text("general.alignment") + NUMBER]), "alignment is 24"),
    "more": (header_of([], [tensor("t", (8,), 0, 0)]) + bytes(200), "is damaged: it has"),
    **{
        case: (header_of([text("a") + value]), words)
        for case, (value, words) in WRONG_VALUES.items()
    },
    **{case: (header_of([], tensors), words) for case, (tensors, words) in WRONG_TENSORS.items()},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused_in_one_line(case, tmp_path):
    content, complaint = FORGED[case]
    assert re.search(complaint, refusal(read_header, tmp_path / "forged.gguf", content))


NAME, OTHER = "blk.0.ffn_down.weight", "token_embd.weight"
KEYS = {"imatrix.datasets": ["a.txt", "b.txt"], "imatrix.chunk_count": 12, "imatrix.chunk_size": 5}
ONES, COUNT = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32)


def write_gguf(path, tensors, keys):
    writer = gguf.GGUFWriter(path, "none")
    for key, value in keys.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(key, value)
    write_tensors(writer, tensors)
    return path


def sums(values, count=COUNT):
    return {f"{NAME}.in_sum2": values, f"{NAME}.counts": count}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1000, width=32)),
    st.integers(-1, 1000),
)
def test_sums_are_divided_by_counts(tmp_path, values, count):
    """A count of zero gives one."""
    tensors = sums(values[None], np.full((1, 1), max(count, 0), np.float32))
    matrix = read_imatrix(write_gguf(tmp_path / "m.gguf", tensors, KEYS))
    expected = values / np.float32(count) if count > 0 else np.ones_like(values)
    np.testing.assert_array_equal(matrix.entries[NAME], expected)
    assert (matrix.dataset, matrix.chunks) == ("a.txt", 12)


def test_importances_must_fit_the_model(tmp_path):
    path = tmp_path / "m.gguf"
    write_imatrix(path, {NAME: np.ones(4, np.float32)})
    matrix = read_imatrix(path)
    np.testing.assert_array_equal(matrix.importance(NAME, 4), np.ones(4))
    assert matrix.importance("blk.1.ffn_down.weight", 4) is None
    with pytest.raises(RequestError, match=f"4 importances for {NAME}, which has 5 columns"):
        matrix.importance(NAME, 5)
    matrix.require_any_of([NAME, OTHER])
    with pytest.raises(RequestError, match=f"no tensor of this model.*{NAME}"):
        matrix.require_any_of([OTHER])


BAD_GGUF = {
    "no sums": ({NAME: ONES}, KEYS, "tensors NAME.in_sum2"),
    "no counts": ({f"{NAME}.in_sum2": ONES}, KEYS, "counts is missing"),
    "three counts": (sums(ONES, np.ones((1, 3), np.float32)), KEYS, "3 counts for 4 sums"),
    "no number": (sums(ONES * np.nan), KEYS, "no squares"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_wrong_matrices_are_refused_in_one_line(case, tmp_path):
    path = tmp_path / "matrix"
    *content, complaint = BAD_GGUF[case]
    data = write_gguf(path, *content).read_bytes()
    assert re.search(complaint, refusal(read_imatrix, path, data))


def test_a_text_is_no_matrix(tmp_path):
    assert "it is no GGUF file" in refusal(read_imatrix, tmp_path / "matrix", b"hello")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "model.bin").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    with pytest.raises(RequestError, match=f"not an importance matrix.*{MAX_BYTES + 1} bytes"):
        read_imatrix(tmp_path / "model.bin")
