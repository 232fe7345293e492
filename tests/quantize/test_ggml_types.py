import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.quantize.ggml_types import (
    BY_VALUE,
    FILE_TYPES,
    INT_WORDS,
    TYPES,
    GgmlType,
    find_file_type,
    find_type,
)
from rgexport.quantize.scheme import Ggml, scheme_from_dict, scheme_to_dict

kinds = st.sampled_from(list(TYPES.values()))


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_types_are_those_of_gguf(kind: GgmlType) -> None:
    theirs = gguf.GGMLQuantizationType(kind.value)
    assert theirs.name.lower() == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)
    assert BY_VALUE[kind.value] is kind


@given(kinds, st.integers(1, 40))
def test_a_row_takes_its_blocks(kind: GgmlType, blocks: int) -> None:
    columns = blocks * kind.block
    (expected,) = gguf.quant_shape_to_byte_shape((columns,), gguf.GGMLQuantizationType(kind.value))
    assert kind.row_bytes(columns) == expected
    assert kind.bits_per_weight == pytest.approx(8 * expected / columns)


@given(kinds.filter(lambda kind: kind.is_quantized), st.integers(1, 2000))
def test_a_row_of_no_whole_blocks_has_no_size(kind: GgmlType, columns: int) -> None:
    assert kind.fits(columns) == (columns % kind.block == 0)
    if not kind.fits(columns):
        with pytest.raises(ValueError, match=f"{columns} weights"):
            kind.row_bytes(columns)


@pytest.mark.parametrize("word", FILE_TYPES)
def test_file_types_are_those_of_llama_cpp(word: str) -> None:
    file_type = find_file_type(word.upper())
    theirs = gguf.LlamaFileType(file_type.value).name
    assert theirs.removeprefix("MOSTLY_").removeprefix("ALL_").lower() == file_type.name
    assert file_type.name.startswith(word)  # an alias is cut off before its size
    assert file_type.name.startswith(file_type.default)


def test_an_unknown_type_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="'q4_k_x'.*f32.*q4_k_m.*q2_k_s.*q5_k$"):
        find_file_type("q4_k_x")
    with pytest.raises(RequestError, match="'q4_k_m'.*f32.*q4_k.*q6_k$"):
        find_type("q4_k_m")


def test_int_words_mean_as_many_bits() -> None:
    for bits, word in ((8, "int8"), (4, "int4")):
        default = TYPES[find_file_type(INT_WORDS[word]).default]
        assert bits <= default.bits_per_weight < bits + 1


@given(kinds)
def test_a_ggml_scheme_survives_json(kind: GgmlType) -> None:
    scheme = Ggml(kind.name)
    assert scheme_from_dict(scheme_to_dict(scheme)) == scheme
    assert scheme.label == kind.name
    assert scheme.bits_per_weight == kind.bits_per_weight


def test_a_scheme_of_no_known_type_is_refused() -> None:
    with pytest.raises(RequestError, match="type = 'iq4_nl'; expected f32, f16"):
        scheme_from_dict({"kind": "ggml", "type": "iq4_nl"})


def test_bits_fall_as_the_names_say() -> None:
    order = "f32 f16 q8_0 q6_k q5_1 q5_0 q5_k q4_1 q4_0 q4_k q3_k q2_k".split()
    bits = [Ggml(name).bits_per_weight for name in order]
    assert bits == sorted(bits, reverse=True)
