"""The types of tensors, compared with output of llama-quantize, recorded and live."""

import random
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.quantize.ggml_mix import (
    GgmlTensor,
    TypeRequest,
    choose_types,
    parse_override,
    require_importances,
)
from rgexport.quantize.ggml_types import FILE_TYPES, TYPES, find_file_type
from tests.llama_tools import run_tool
from tests.quantize.ggml_files import tensors_of, write_f32, write_imatrix

GRIFFIN_2B, ATTENTION = "rra" * 8 + "rr", "a" * 16


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
    (GRIFFIN_2B, "q8_0"): {"token_embd": "1 q8_0"},
    (GRIFFIN_2B, "q6_k"): {"token_embd": "1 q6_k"},
    (GRIFFIN_2B, "q5_1"): {"token_embd": "1 q6_k"},
    (GRIFFIN_2B, "q4_0"): {"token_embd": "1 q6_k"},
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
    (GRIFFIN_2B, "q3_k_l"): {
        "token_embd": "1 q6_k",
        **{"ffn_down": "26 q5_k", "attn_output": "8 q5_k", "attn_v": "8 q5_k"},
    },
    (GRIFFIN_2B, "q3_k_m"): {
        "token_embd": "1 q6_k",
        "ffn_down": "1 q5_k, 25 q4_k",
        "attn_output": "8 q4_k",
        "attn_v": "2 q5_k, 6 q4_k",
    },
    (GRIFFIN_2B, "q3_k_s"): {"token_embd": "1 q6_k"},
    (GRIFFIN_2B, "q2_k"): {
        "token_embd": "1 q6_k",
        **{"ffn_down": "26 q3_k", "attn_output": "8 q3_k", "attn_v": "8 q3_k"},
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


def assert_sites(types: dict[str, str], layers: str, word: str, printed: dict[str, str]) -> None:
    for tensor in tensors_of(layers):
        site = tensor.name.split(".")[-2]
        if not tensor.quantizable:
            assert types[tensor.name] == "f32"
        elif site not in printed:
            assert types[tensor.name] == FILE_TYPES[word].default
    assert {site: runs(types, site) for site in printed} == printed


@pytest.mark.parametrize(("layers", "word"), PRINTED)
def test_mixes_are_what_llama_quantize_printed(layers: str, word: str) -> None:
    assert_sites(chosen(layers, word), layers, word, PRINTED[layers, word])


@pytest.mark.parametrize("word", PRINTED_WITH_IMATRIX)
def test_mixes_with_an_importance_matrix(word: str) -> None:
    types = chosen(GRIFFIN_2B, word, has_imatrix=True)
    assert_sites(types, GRIFFIN_2B, word, PRINTED_WITH_IMATRIX[word])


@pytest.mark.parametrize("word", ["q4_k_m", "q2_k", "q4_0", "f16"])
def test_pure_means_one_type(word: str) -> None:
    types = chosen("rra", word, pure=True)
    found = {types[tensor.name] for tensor in tensors_of("rra") if tensor.quantizable}
    assert found == {FILE_TYPES[word].default}


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


@pytest.mark.parametrize("word", ["f16", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("pure", [True, False])
def test_the_embedding_has_its_own_word(word: str, pure: bool) -> None:
    types = chosen("rra", word, pure=pure, token_embedding_type="q5_0")
    assert types["token_embd.weight"] == "q5_0"
    assert types["blk.0.ffn_up.weight"] == FILE_TYPES[word].default


@pytest.mark.parametrize(
    ("word", "columns", "expected"),
    [
        *[("q2_k", 96, "q4_0"), ("q3_k_s", 96, "q4_0"), ("q4_k_s", 96, "q5_0")],
        *[("q5_k_s", 96, "q5_1"), ("q6_k", 96, "q8_0"), ("q4_k_s", 40, "f16")],
        *[("q4_0", 40, "f16"), ("q8_0", 40, "f16"), ("q8_0", 96, "q8_0")],
    ],
)
def test_rows_of_no_whole_blocks_fall_back(word: str, columns: int, expected: str) -> None:
    tensor = GgmlTensor("blk.0.ffn_up.weight", (8, columns), quantizable=True)
    request = TypeRequest(file_type=FILE_TYPES[word])
    assert choose_types([tensor], request, gqa=0, has_imatrix=False) == {tensor.name: expected}


@pytest.mark.parametrize(
    "text", ["attn_v", "=q8_0", "attn_v=", "attn_v=q9_0", "(=q8_0", "a{2,1}=f16"]
)
def test_wrong_overrides(text: str) -> None:
    with pytest.raises(RequestError, match=r"expected|regular"):
        parse_override(text)


def test_overrides_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(RequestError, match=r"attn_w=q8_0 matches no tensor.*token_embd\.weight"):
        chosen("rra", "q4_0", overrides=(("attn_w", "q8_0"),))
    with pytest.raises(RequestError, match="changes nothing in a file of type f16"):
        chosen("rra", "f16", overrides=(("attn_v", "q8_0"),))


def test_the_smallest_type_needs_an_importance_matrix() -> None:
    complaint = r"q2_k_s needs an importance matrix.*has blk\.0\.attn_gate\.weight"
    with pytest.raises(RequestError, match=complaint):
        chosen("rra", "q2_k_s")
    assert chosen("rra", "q2_k_s", overrides=(("blk", "q4_0"),))["blk.0.ssm_in.weight"] == "q4_0"


def test_the_matrix_must_cover_the_smallest_type() -> None:
    file_type, types = FILE_TYPES["q2_k_s"], chosen("rra", "q2_k_s", has_imatrix=True)
    require_importances(types, file_type, types)
    require_importances(types, file_type, types.keys() - {"token_embd.weight"})
    with pytest.raises(RequestError, match=r"has blk\.1\.ffn_up\.weight"):
        require_importances(types, file_type, types.keys() - {"blk.1.ffn_up.weight"})


# What llama-quantize prints now.

KINDS = [*TYPES]
PATTERNS = ["ffn", "attn_v", r"blk\.[0-3]\.", "weight$", "ffn_down", "^blk.1.", "(up|gate)"]
MODELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "like the 2B": ("rra" * 8 + "rr", (256, 512, 256, 4, 64)),
    "attention first": ("arr" * 6, (256, 256, 256, 4, 64)),
    "one key head of two": ("ara" * 6, (320, 256, 72, 2, 40)),
    "narrow": ("ra" * 10, (96, 288, 64, 4, 32)),
}


def printed_types(output: str) -> dict[str, str]:
    """Name → type, from lines such as `[ 3/ 9] NAME - [256, 8], type = f32, … (q6_K)`."""
    line = r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), .*?(?:\((\w+)\))?\n"
    return {name: (new or old).lower() for name, old, new in re.findall(line, output)}


def some_request(draw: random.Random, word: str, width: int) -> tuple[TypeRequest, list[str]]:
    """A request, and the arguments that put it to llama-quantize."""
    quantized = TYPES[FILE_TYPES[word].default].is_quantized
    overrides = tuple(
        (draw.choice(PATTERNS), draw.choice(KINDS))
        for _ in range(draw.choice([0, 0, 1, 2]) if quantized else 0)
    )
    # An embedding that does not fit its rows makes llama-quantize abort.
    embedding = draw.choice([None, *(kind for kind in KINDS if TYPES[kind].fits(width))])
    pure = draw.random() < 0.3
    arguments = ["--pure"] * pure
    arguments += ["--token-embedding-type", embedding] if embedding else []
    arguments += [a for pair in overrides for a in ("--tensor-type", "=".join(pair))]
    request = TypeRequest(
        file_type=FILE_TYPES[word], pure=pure, overrides=overrides, token_embedding_type=embedding
    )
    return request, arguments


@pytest.mark.parametrize("model", MODELS)
def test_types_are_what_llama_quantize_prints(
    model: str, llama_tools: Path, tmp_path: Path
) -> None:
    layers, sizes = MODELS[model]
    tensors = tensors_of(layers, *sizes)
    source, matrix = tmp_path / "f32.gguf", tmp_path / "imatrix.gguf"
    write_f32(source, {t.name: np.zeros(t.shape, np.float32) for t in tensors}, layers, sizes)
    quantizable = [t for t in tensors if t.quantizable]
    write_imatrix(matrix, {t.name: np.ones(t.shape[-1], np.float32) for t in quantizable})

    draw = random.Random(model)
    for word in FILE_TYPES:
        has_imatrix = word == "q2_k_s" or draw.random() < 0.5
        request, arguments = some_request(draw, word, sizes[0])
        arguments += ["--imatrix", str(matrix)] * has_imatrix
        output = run_tool(llama_tools / "llama-quantize", *arguments, "--dry-run", source, word)
        gqa = sizes[3] if layers[0] == "a" else 0
        ours = choose_types(tensors, request, gqa=gqa, has_imatrix=has_imatrix)
        assert printed_types(output) == ours, (word, arguments)
