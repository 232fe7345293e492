import gguf
import pytest

from rgexport.errors import RequestError
from rgexport.quantize.ggml_types import (
    BY_VALUE,
    FILE_TYPES,
    TYPES,
    GgmlType,
    find_file_type,
    find_type,
)
from rgexport.quantize.scheme import Ggml, scheme_from_dict


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_types_are_those_of_gguf(kind: GgmlType) -> None:
    theirs = gguf.GGMLQuantizationType(kind.value)
    assert theirs.name.lower() == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)
    assert BY_VALUE[kind.value] is kind
    columns = 3 * kind.block
    (row_bytes,) = gguf.quant_shape_to_byte_shape((columns,), theirs)
    assert kind.row_bytes(columns) == row_bytes
    assert kind.bits_per_weight == Ggml(kind.name).bits_per_weight == 8 * row_bytes / columns
    assert Ggml(kind.name).label == kind.name
    if kind.is_quantized:
        with pytest.raises(ValueError, match=f"{columns + 1} weights"):
            kind.row_bytes(columns + 1)


@pytest.mark.parametrize("word", FILE_TYPES)
def test_file_types_are_those_of_llama_cpp(word: str) -> None:
    file_type = find_file_type(word.upper())
    theirs = gguf.LlamaFileType(file_type.value).name
    assert theirs.removeprefix("MOSTLY_").removeprefix("ALL_").lower() == file_type.name
    assert file_type.name.startswith(word)  # an alias is cut off before its size
    assert file_type.name.startswith(file_type.default)


def test_an_unknown_type_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'q4_k_x'.*f32.*q4_k_m.*q2_k_s.*q5_k$"):
        find_file_type("q4_k_x")
    with pytest.raises(RequestError, match=r"'q4_k_m'.*f32.*q4_k.*q6_k$"):
        find_type("q4_k_m")
    with pytest.raises(RequestError, match="type = 'iq4_nl'; expected f32, f16"):
        scheme_from_dict({"kind": "ggml", "type": "iq4_nl"})
