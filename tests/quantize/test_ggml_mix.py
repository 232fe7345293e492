"""The types of tensors, compared with recorded output of llama-quantize.

`tests/export/gguf/test_exporter.py` compares whole files with those of llama-quantize.
"""

from itertools import groupby

import pytest

from rgexport.errors import RequestError
from rgexport.export.gguf.naming import file_tensors
from rgexport.quantize.ggml_mix import (
    GgmlTensor,
    TypeRequest,
    choose_types,
    parse_override,
    require_importances,
)
from rgexport.quantize.ggml_types import FILE_TYPES, find_file_type
from tests.models import make_config

GRIFFIN_2B, ATTENTION = "rra" * 8 + "rr", "a" * 16


def tensors_of(layers: str) -> list[GgmlTensor]:
    config = make_config(layers, width=256, heads=4, mlp_width=512, vocab_size=8)
    return [GgmlTensor(t.name, t.shape, t.quantizable) for t in file_tensors(config)]


def chosen(layers: str, word: str, *, has_imatrix: bool = False, **more: object) -> dict[str, str]:
    request = TypeRequest(file_type=find_file_type(word), **more)
    gqa = 4 if layers[0] == "a" else 0
    return choose_types(tensors_of(layers), request, gqa=gqa, has_imatrix=has_imatrix)


def runs(types: dict[str, str], site: str) -> str:
    """The types of a site from layer to layer, such as `5 q6_k, 2 q4_k`."""
    found = [kind for name, kind in types.items() if f"{site}.weight" in name]
    return ", ".join(f"{len([*group])} {kind}" for kind, group in groupby(found))


# From `llama-quantize --dry-run FILE TYPE` over files with these layers (llama.cpp 0c1e570);
# what is not named is of the file type's default.
_EIGHTHS = ", 2 q4_k, 1 q6_k" * 6 + ", 1 q4_k, 4 q6_k"
PRINTED: dict[tuple[str, str], dict[str, str]] = {
    **{(GRIFFIN_2B, word): {"token_embd": "1 q6_k"} for word in ("q6_k", "q5_1", "q4_0", "q3_k_s")},
    (GRIFFIN_2B, "q8_0"): {"token_embd": "1 q8_0"},
    (GRIFFIN_2B, "q4_k_m"): {
        "token_embd": "1 q6_k",
        "ffn_down": "3 q6_k" + _EIGHTHS,
        "attn_v": "1 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 2 q6_k",
    },
    (GRIFFIN_2B, "q4_k_s"): {
        "token_embd": "1 q6_k",
        "ffn_down": "3 q5_k, 23 q4_k",
        "attn_v": "4 q5_k, 4 q4_k",
    },
    (GRIFFIN_2B, "q3_k_m"): {
        "token_embd": "1 q6_k",
        "ffn_down": "1 q5_k, 25 q4_k",
        "attn_output": "8 q4_k",
        "attn_v": "2 q5_k, 6 q4_k",
    },
    (ATTENTION, "q2_k"): {
        "token_embd": "1 q6_k",
        **{"ffn_down": "16 q3_k", "attn_output": "16 q3_k", "attn_v": "16 q4_k"},
    },
    (ATTENTION, "q5_k_m"): {
        "token_embd": "1 q6_k",
        "ffn_down": "2 q6_k" + ", 2 q5_k, 1 q6_k" * 3 + ", 2 q5_k, 3 q6_k",
        "attn_v": "2 q6_k" + ", 2 q5_k, 1 q6_k" * 3 + ", 2 q5_k, 3 q6_k",
    },
}
PRINTED_WITH_IMATRIX: dict[str, dict[str, str]] = {
    "q4_0": {"token_embd": "1 q6_k", "ffn_down": "3 q4_1, 23 q4_0"},
    "q5_0": {"token_embd": "1 q6_k", "ffn_down": "3 q5_1, 23 q5_0"},
    "q4_1": {"token_embd": "1 q6_k"},
    "q2_k_s": {"token_embd": "1 q6_k", "ffn_down": "3 q4_k, 23 q2_k"},
}


@pytest.mark.parametrize(
    ("layers", "word", "has_imatrix", "printed"),
    [
        *((layers, word, False, printed) for (layers, word), printed in PRINTED.items()),
        *((GRIFFIN_2B, word, True, printed) for word, printed in PRINTED_WITH_IMATRIX.items()),
    ],
)
def test_mixes_are_what_llama_quantize_printed(
    layers: str, word: str, has_imatrix: bool, printed: dict[str, str]
) -> None:
    types = chosen(layers, word, has_imatrix=has_imatrix)
    for tensor in tensors_of(layers):
        site = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if not tensor.quantizable:
            assert types[tensor.name] == "f32"
        elif site not in printed:
            assert types[tensor.name] == FILE_TYPES[word].default
    assert {site: runs(types, site) for site in printed} == printed


@pytest.mark.parametrize("word", ["q4_k_m", "f16"])
def test_pure_means_one_type_but_for_an_embedding_of_its_own(word: str) -> None:
    types = chosen("rra", word, pure=True, token_embedding_type="q5_0")
    assert types.pop("token_embd.weight") == "q5_0"
    found = {types.get(tensor.name) for tensor in tensors_of("rra") if tensor.quantizable}
    assert found - {None} == {FILE_TYPES[word].default}


def test_the_first_override_that_is_found_counts() -> None:
    overrides = tuple(map(parse_override, (r"BLK\.0\..*gate=F16", "ffn=q5_1", "ffn_down=q8_0")))
    types = chosen("rra", "q4_k_m", overrides=overrides)
    assert types["blk.0.ffn_gate.weight"] == types["blk.0.attn_gate.weight"] == "f16"
    assert types["blk.0.ffn_down.weight"] == types["blk.2.ffn_up.weight"] == "q5_1"
    assert types["blk.2.attn_q.weight"] == "q4_k"
    assert types["blk.0.rg_lru_a_gate.weight"] == "f32"


def test_an_overridden_tensor_does_not_count_in_the_mix() -> None:
    # The fifth attn_v is the fourth that the mix sees, and so one of the spared four.
    types = chosen(ATTENTION, "q4_k_s", overrides=(("blk.0.attn_v", "q8_0"),))
    assert runs(types, "attn_v") == "1 q8_0, 4 q5_k, 11 q4_k"


@pytest.mark.parametrize(
    ("word", "fallback"),
    [
        ("q2_k", "q4_0"),
        ("q3_k_s", "q4_0"),
        ("q4_k_s", "q5_0"),
        ("q5_k_s", "q5_1"),
        ("q6_k", "q8_0"),
    ],
)
def test_rows_of_no_whole_blocks_fall_back(word: str, fallback: str) -> None:
    for columns, expected in ((96, fallback), (40, "f16")):
        tensor = GgmlTensor("blk.0.ffn_up.weight", (8, columns), quantizable=True)
        request = TypeRequest(file_type=FILE_TYPES[word])
        assert choose_types([tensor], request, gqa=0, has_imatrix=False) == {tensor.name: expected}


@pytest.mark.parametrize(
    "text", ["attn_v", "=q8_0", "attn_v=", "attn_v=q9_0", "(=q8_0", "a{2,1}=f16"]
)
def test_wrong_overrides(text: str) -> None:
    with pytest.raises(RequestError, match=r"expected|regular"):
        parse_override(text)


def test_the_smallest_type_needs_an_importance_matrix() -> None:
    complaint = r"q2_k_s needs an importance matrix.*has blk\.0\.attn_gate\.weight"
    with pytest.raises(RequestError, match=complaint):
        chosen("rra", "q2_k_s")
    assert chosen("rra", "q2_k_s", overrides=(("blk", "q4_0"),))["blk.0.ssm_in.weight"] == "q4_0"
    file_type, types = FILE_TYPES["q2_k_s"], chosen("rra", "q2_k_s", has_imatrix=True)
    require_importances(types, file_type, types.keys() - {"token_embd.weight"})
    with pytest.raises(RequestError, match=r"has blk\.1\.ffn_up\.weight"):
        require_importances(types, file_type, types.keys() - {"blk.1.ffn_up.weight"})
