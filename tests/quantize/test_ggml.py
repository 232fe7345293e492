"""ggml's types and mixes, its quantizer and other levels on its scales, beside gguf-py and ggml."""

from itertools import groupby, pairwise

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.artifacts.gguf.naming import file_tensors
from rgexport.errors import RequestError
from rgexport.griffin.tensor import DTYPES
from rgexport.quantize.algorithms.statistics import statistics_of
from rgexport.quantize.schemes import ggml_library
from rgexport.quantize.schemes.ggml_layouts import (
    HALVES,
    LAYOUTS,
    read_levels,
    replace_levels,
)
from rgexport.quantize.schemes.ggml_library import find_library, load_library, quantize_rows
from rgexport.quantize.schemes.ggml_types import (
    BY_VALUE,
    FILE_TYPES,
    TYPES,
    GgmlType,
    TypeRequest,
    choose_types,
    find_file_type,
    parse_override,
)
from rgexport.quantize.schemes.registry import Ggml
from tests.artifacts import require_ggml
from tests.kernels.rounding.test_rounding import gptq
from tests.models import make_config

QUANTIZED = [kind.name for kind in TYPES.values() if kind.is_quantized]


@pytest.fixture(scope="module")
def library():
    """The installed library; without one, the tests that take it are skipped."""
    require_ggml()
    return load_library()


def normal(rows, columns):
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


def dequantized(packed, kind):
    if not len(packed):
        return np.zeros((0, packed.shape[1] // TYPES[kind].block_bytes * TYPES[kind].block))
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(TYPES[kind].value))


def in_one_call(library, rows, kind, importance=None):
    packed = np.empty((len(rows), TYPES[kind].row_bytes(rows.shape[1])), np.uint8)
    arrays = rows.ctypes.data, packed.ctypes.data
    weights = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(TYPES[kind].value, *arrays, 0, *rows.shape, weights)
    return packed


@pytest.mark.parametrize("name", TYPES)
def test_types_are_those_of_gguf(name):
    kind, columns = TYPES[name], 3 * TYPES[name].block
    theirs = gguf.GGMLQuantizationType(kind.value)
    assert theirs.name.lower() == kind.name == Ggml(name).label and BY_VALUE[kind.value] is kind
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)
    (row_bytes,) = gguf.quant_shape_to_byte_shape((columns,), theirs)
    assert kind.row_bytes(columns) == row_bytes
    assert kind.bits_per_weight == Ggml(name).bits_per_weight == 8 * row_bytes / columns
    if kind.is_quantized:
        with pytest.raises(ValueError, match=f"{columns + 1} weights"):
            kind.row_bytes(columns + 1)


@pytest.mark.parametrize("word", FILE_TYPES)
def test_file_types_are_those_of_llama_cpp(word):
    file_type = find_file_type(word.upper())
    theirs = gguf.LlamaFileType(file_type.value).name
    assert theirs.removeprefix("MOSTLY_").removeprefix("ALL_").lower() == file_type.name
    assert file_type.name.startswith(word)  # an alias is cut off before its size
    if not TYPES[file_type.default].has_codebook:  # whose names do not follow from one another
        assert file_type.name.startswith(file_type.default)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_threads_and_dtypes_change_nothing(kind, library, monkeypatch):
    weights = normal(37, 768).astype(DTYPES["bfloat16"])
    importance = np.square(normal(1, 768))[0] if TYPES[kind].needs_importances else None
    expected = in_one_call(library, weights.astype(np.float32), kind, importance)
    monkeypatch.setattr(ggml_library, "CHUNK_BYTES", 5 * 768 * 4)
    np.testing.assert_array_equal(quantize_rows(weights, kind, importance), expected)
    strided = np.repeat(weights, 2, axis=0)[::2]
    np.testing.assert_array_equal(quantize_rows(strided, kind, importance), expected)


@pytest.mark.parametrize("kind", [kind.name for kind in TYPES.values() if kind.needs_importances])
def test_types_that_need_importances_are_refused_without(kind, library):
    """Ggml would end the process for some of them."""
    with pytest.raises(RequestError, match=f"{kind} needs importances"):
        quantize_rows(normal(2, 256), kind)
    with pytest.raises(RequestError, match="needs importances; add --quality best"):
        chosen(GRIFFIN_2B, kind)


@settings(max_examples=20)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([256, 512])),
        elements=st.integers(-100_000, 100_000).map(lambda number: np.float32(number / 1000)),
    )
)
def test_plain_types_are_those_of_gguf_py(library, weights):
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        theirs = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(TYPES[name].value))
        np.testing.assert_array_equal(quantize_rows(weights, name), theirs)


def test_floats_of_all_exponents_are_rounded_as_ggml_rounds_them(library):
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        floats = (patterns | np.uint32(low)).view(np.float32)
        for kind, largest in (("f16", 65519.0), ("bf16", 3.38e38)):
            rows = floats[np.abs(floats) <= largest][None]
            expected = in_one_call(library, rows, kind)
            np.testing.assert_array_equal(quantize_rows(rows, kind), expected)


@pytest.mark.parametrize("name", ["f16", "q4_0", "q6_k"])
def test_a_weight_beyond_the_type_is_named(name, library):
    weights = normal(4, 256)
    weights[2, 7] = -3e8
    with pytest.raises(RequestError, match=f"weight of 3e\\+08 is more than {name} holds"):
        quantize_rows(weights, name)


def test_another_build_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv(ggml_library.LIBRARY_PATH, str(tmp_path))
    with pytest.raises(RequestError, match=f"has no {tmp_path}"):
        load_library()
    (tmp_path / ggml_library.FILE_NAME).write_bytes(b"not a library")
    assert find_library().parent == tmp_path
    with pytest.raises(RequestError, match=f"{tmp_path}.* cannot be used"):
        load_library()


def test_a_library_of_other_types_is_refused(library, monkeypatch):
    monkeypatch.setitem(TYPES, "q4_k", GgmlType("q4_k", 12, 256, 148))
    ggml_library._load.cache_clear()
    with pytest.raises(RequestError, match=r"type 12 is q4_k with 256 weights in 144 bytes.*148"):
        load_library()


def grid_of(packed, kind):
    """The scale, the offset and the level of each weight."""
    *steps, levels = read_levels(packed, kind)
    return *(np.repeat(part, LAYOUTS[kind].group, axis=1) for part in steps), levels


def correlated(draw, columns, cuts=()):
    """Statistics of inputs that go together, of very different sizes; H in blocks between cuts."""
    few = draw.standard_normal((3 * columns, columns // 4))
    mixed = few @ draw.standard_normal((columns // 4, columns))
    inputs = (mixed + draw.standard_normal(mixed.shape)) * np.exp(draw.normal(0, 1, columns))
    h = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    blocks = [h[a:b, a:b] for a, b in pairwise([0, *cuts, columns])]
    return statistics_of(blocks, len(inputs))


def losses(statistics, off):
    """The diagonal of ΔW H ΔWᵀ."""
    wide = off.astype(np.float64)
    parts = [(wide[:, part.start : part.stop], part.matrix) for part in statistics.hessians]
    return sum(((columns @ h) * columns).sum(1) for columns, h in parts)


def packed_by(word, rows, kind, statistics):
    return Ggml(kind, algorithm=word).encode("w", rows, statistics)["data"]


def plain_gptq(rows, packed, kind, statistics):
    """Values by GPTQ as published."""
    scale, offset, _ = grid_of(packed, kind)
    levels = [
        gptq(*(x[:, h.start : h.stop] for x in (rows, scale, offset)), LAYOUTS[kind].top, h.matrix)
        for h in statistics.hessians
    ]
    return scale * np.concatenate(levels, axis=1) + offset


@pytest.mark.parametrize("cuts", [(), (200,)], ids=str)
def test_loss_is_at_most_that_of_published_gptq(cuts, library):
    draw = np.random.default_rng(0)
    rows, known = draw.standard_normal((24, 768)).astype(np.float32), correlated(draw, 768, cuts)
    assert {*LAYOUTS} == {kind for kind in QUANTIZED if not TYPES[kind].has_codebook}
    for kind in LAYOUTS:
        plain = packed_by("ggml", rows, kind, known)
        ours = losses(known, dequantized(packed_by("gptq", rows, kind, known), kind) - rows)
        theirs = losses(known, plain_gptq(rows, plain, kind, known) - rows)
        assert ours.sum() <= 1.001 * theirs.sum(), kind
        assert ours.sum() < 0.8 * losses(known, dequantized(plain, kind) - rows).sum(), kind


@settings(max_examples=40)
@given(
    *(st.sampled_from([*LAYOUTS]), st.integers(0, 4), st.integers(1, 2)),
    *(st.floats(0, 3), st.integers(0, 2**32)),
)
def test_all_but_levels_and_size_is_as_ggml_leaves_it(library, kind, rows, blocks, width, seed):
    draw, columns = np.random.default_rng(seed), 256 * blocks
    weights = draw.standard_normal((rows, columns)) * np.exp(draw.normal(0, width, columns))
    weights = np.where(draw.random(weights.shape) < 0.1, 0, weights).astype(np.float32)
    weights[:1], weights[1:2, :300] = 0, 0.5
    known = correlated(draw, columns, tuple(sorted({*draw.integers(1, columns, 2).tolist()})))
    plain, ours = (packed_by(word, weights, kind, known) for word in ("ggml", "gptq"))
    np.testing.assert_array_equal(plain, quantize_rows(weights, kind, known.importance))
    scale, offset, levels = grid_of(plain, kind)
    error = np.abs(scale * levels + offset - dequantized(plain, kind))
    largest = np.abs(scale) * LAYOUTS[kind].top + np.abs(offset)
    np.testing.assert_array_less(error, 1e-30 + 2e-7 * largest)
    stays = ~np.isin(np.arange(TYPES[kind].block_bytes) // 2 * 2, HALVES.get(kind, 0))
    sides = plain, replace_levels(ours, kind, levels)
    np.testing.assert_array_equal(*(x.reshape(-1, len(stays))[:, stays] for x in sides))
    before, after = (losses(known, dequantized(x, kind) - weights) for x in (plain, ours))
    np.testing.assert_array_less(after, before * 1.25 + 1e-12)


GRIFFIN_2B, ATTENTION = "rra" * 8 + "rr", "a" * 16


def tensors_of(layers):
    config = make_config(layers, width=256, heads=4, mlp_width=512, vocab_size=8)
    return {t.name: t.shape[-1] for t in file_tensors(config) if t.quantizable}


def chosen(layers, word, *, has_imatrix=False, **more):
    request = TypeRequest(file_type=find_file_type(word), **more)
    gqa = 4 if layers[0] == "a" else 0
    return choose_types(tensors_of(layers), request, gqa=gqa, has_imatrix=has_imatrix)


def runs(types, site):
    """The types of a site from layer to layer, such as `5 q6_k, 2 q4_k`."""
    kinds = [kind for name, kind in types.items() if f"{site}.weight" in name]
    return ", ".join(f"{len([*group])} {kind}" for kind, group in groupby(kinds))


# From `llama-quantize --dry-run FILE TYPE` over files with these layers (llama.cpp 0c1e570);
# what is not named is of the file type's default, the embedding q6_k.
_EIGHTHS = ", 2 q4_k, 1 q6_k" * 6 + ", 1 q4_k, 4 q6_k"
PRINTED = [
    *((GRIFFIN_2B, word, False, {}) for word in ("q6_k", "q4_0", "q3_k_s")),
    (GRIFFIN_2B, "q8_0", False, {"token_embd": "1 q8_0"}),
    (
        *(GRIFFIN_2B, "q4_k_m", False),
        {"ffn_down": "3 q6_k" + _EIGHTHS, "attn_v": "1 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 2 q6_k"},
    ),
    (GRIFFIN_2B, "q4_k_s", False, {"ffn_down": "3 q5_k, 23 q4_k", "attn_v": "4 q5_k, 4 q4_k"}),
    (
        *(GRIFFIN_2B, "q3_k_m", False),
        {"ffn_down": "1 q5_k, 25 q4_k", "attn_output": "8 q4_k", "attn_v": "2 q5_k, 6 q4_k"},
    ),
    (
        *(ATTENTION, "q2_k", False),
        {"ffn_down": "16 q3_k", "attn_output": "16 q3_k", "attn_v": "16 q4_k"},
    ),
    (GRIFFIN_2B, "q4_0", True, {"ffn_down": "3 q4_1, 23 q4_0"}),
    (GRIFFIN_2B, "q5_0", True, {"ffn_down": "3 q5_1, 23 q5_0"}),
    (GRIFFIN_2B, "iq4_xs", False, {"ffn_down": "3 q5_k, 23 iq4_xs"}),
    (ATTENTION, "iq4_nl", True, {"attn_v": "16 q5_k"}),
    (
        *(GRIFFIN_2B, "iq3_m", True),
        {"ffn_down": "3 q4_k, 23 iq3_s", "attn_v": "8 q4_k", "attn_output": "8 q4_k"},
    ),
    (
        *(ATTENTION, "iq3_xs", True),
        dict.fromkeys(("attn_q", "attn_k"), "16 iq3_xxs")
        | dict.fromkeys(("ffn_gate", "ffn_up"), "2 iq3_s, 12 iq3_xxs, 2 iq3_s")
        | {"attn_v": "16 q4_k"},
    ),
    (
        *(GRIFFIN_2B, "iq3_xxs", True),
        dict.fromkeys(("attn_q", "attn_k"), "8 iq2_s")
        | {"token_embd": "1 q5_k", "attn_output": "8 iq3_s"},
    ),
    (
        *(GRIFFIN_2B, "iq2_s", True),
        {"token_embd": "1 q5_k", "ffn_down": "3 iq3_s, 23 iq2_xs"}
        | dict.fromkeys(("attn_v", "attn_output"), "8 iq3_s"),
    ),
    (
        *(ATTENTION, "iq2_xxs", True),
        {"token_embd": "1 q5_k", "ffn_down": "2 q2_k, 14 iq2_xxs", "attn_v": "16 q4_k"},
    ),
]


@pytest.mark.parametrize(("layers", "word", "has_imatrix", "printed"), PRINTED)
def test_mixes_are_what_llama_quantize_printed(layers, word, has_imatrix, printed):
    printed = {"token_embd": "1 q6_k"} | printed
    types = chosen(layers, word, has_imatrix=has_imatrix)
    assert types.keys() == tensors_of(layers).keys()
    for name, kind in types.items():
        if name.removesuffix(".weight").rpartition(".")[2] not in printed:
            assert kind == FILE_TYPES[word].default
    assert {site: runs(types, site) for site in printed} == printed


def test_the_first_override_counts_and_the_mix_leaves_its_tensors_out():
    overrides = tuple(map(parse_override, (r"BLK\.0\..*gate=F16", "ffn=q5_1", "ffn_down=q8_0")))
    types = chosen("rra", "q4_k_m", overrides=overrides)
    assert types["blk.0.ffn_gate.weight"] == types["blk.0.attn_gate.weight"] == "f16"
    assert types["blk.0.ffn_down.weight"] == types["blk.2.ffn_up.weight"] == "q5_1"
    assert types["blk.2.attn_q.weight"] == "q4_k" and "blk.0.rg_lru_a_gate.weight" not in types
    # The fifth attn_v is the fourth that the mix sees, and so one of the spared four.
    types = chosen(ATTENTION, "q4_k_s", overrides=(("blk.0.attn_v", "q8_0"),))
    assert runs(types, "attn_v") == "1 q8_0, 4 q5_k, 11 q4_k"


def test_rows_of_no_whole_blocks_fall_back():
    words = {"q2_k": "q4_0", "q3_k_s": "q4_0", "q4_k_s": "q5_0", "q5_k_s": "q5_1", "q6_k": "q8_0"}
    for word, fallback in words.items():
        request = TypeRequest(file_type=FILE_TYPES[word])
        for columns, expected in ((96, fallback), (40, "f16")):
            name = "blk.0.ffn_up.weight"
            types = choose_types({name: columns}, request, gqa=0, has_imatrix=False)
            assert types == {name: expected}
