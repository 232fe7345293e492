"""DeepMind's .pt files, compared with the state dict of DeepMind's own class."""

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recurrentgemma import common
from recurrentgemma.torch import Griffin

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.config import GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.tensor import DTYPES, RowTensor
from rgexport.griffin.torch_file import locate_tensors
from tests.deepmind import write_deepmind
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face

RECURRENT, ATTENTION = common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The state dict of a model of DeepMind's, every tensor random."""
    config = common.GriffinConfig(
        vocab_size=61,
        width=48,
        mlp_expanded_width=80,
        num_heads=4,
        block_types=(RECURRENT, ATTENTION, ATTENTION, RECURRENT),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=2048,
        logits_soft_cap=30.0,
        lru_width=64,
    )
    generator = torch.Generator().manual_seed(0)
    tensors = Griffin(config, dtype=torch.float32).state_dict()
    return {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def save(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "model.pt", **options)
    return folder / "model.pt"


def expected(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The canonical weights, written out by hand for the layers of `state`."""
    found: dict[str, torch.Tensor] = {
        "embed_tokens.weight": state["embedder.input_embedding"],
        "final_norm.weight": state["final_norm.scale"],
    }
    for i, kind in enumerate("raar"):
        block, layer = f"blocks.{i}.", f"layers.{i}."
        mix = layer + "temporal_block."
        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            found[f"{layer}{norm}.weight"] = state[f"{block}{norm}.scale"]
        up, bias = state[f"{block}mlp_block.ffw_up.w"], state[f"{block}mlp_block.ffw_up.b"]
        found[f"{layer}mlp_block.gate_proj.weight"] = up[0].T
        found[f"{layer}mlp_block.up_proj.weight"] = up[1].T
        found[f"{layer}mlp_block.gate_proj.bias"] = bias[0, 0, 0]
        found[f"{layer}mlp_block.up_proj.bias"] = bias[1, 0, 0]
        for part in ("weight", "bias"):
            down = state[f"{block}mlp_block.ffw_down.{part}"]
            found[f"{layer}mlp_block.down_proj.{part}"] = down
        if kind == "a":
            attention = block + "attention_block."
            for letter in "qkv":
                found[f"{mix}{letter}_proj.weight"] = state[f"{attention}proj_{letter}.weight"]
            found[f"{mix}o_proj.weight"] = state[f"{attention}proj_final.weight"]
            found[f"{mix}o_proj.bias"] = state[f"{attention}proj_final.bias"]
            continue
        recurrent = block + "recurrent_block."
        for linear in ("linear_x", "linear_y", "linear_out"):
            for part in ("weight", "bias"):
                found[f"{mix}{linear}.{part}"] = state[f"{recurrent}{linear}.{part}"]
        found[f"{mix}conv_1d.weight"] = state[f"{recurrent}conv_1d.w"].T[:, None]
        found[f"{mix}conv_1d.bias"] = state[f"{recurrent}conv_1d.b"]
        found[f"{mix}rg_lru.recurrent_param"] = state[f"{recurrent}rg_lru.a_param"]
        for ours, theirs in (("input_gate", "input_gate"), ("recurrent_gate", "a_gate")):
            found[f"{mix}rg_lru.{ours}_weight"] = state[f"{recurrent}rg_lru.{theirs}.w"]
            found[f"{mix}rg_lru.{ours}_bias"] = state[f"{recurrent}rg_lru.{theirs}.b"]
    return {name: tensor.numpy() for name, tensor in found.items()}


def assert_same(found: dict[str, RowTensor] | Any, wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name].whole(), array, err_msg=name)


def test_reads_the_state_dict_of_the_reference(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    checkpoint = open_checkpoint(save(tmp_path, state))
    assert checkpoint.problems == ()
    assert checkpoint.config == GriffinConfig(
        vocab_size=61,
        width=48,
        mlp_width=80,
        lru_width=64,
        lru_heads=4,
        num_heads=4,
        head_dim=12,
        block_types=("recurrent", "attention", "attention", "recurrent"),
        rope_dims=6,
        embedding_scale=6.9375,
    )
    assert_same(checkpoint.weights, expected(state))


def test_the_embedding_scale_is_rounded_as_the_reference_rounds_it() -> None:
    for width in range(1, 10_000):
        scale = torch.tensor(math.sqrt(width)).type(torch.bfloat16)
        assert sqrt_embedding_scale(width) == scale.float().item(), width


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_all_dtypes_in_their_own(
    tmp_path: Path, state: dict[str, torch.Tensor], dtype: str
) -> None:
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    weights = open_checkpoint(save(tmp_path, stored)).weights
    assert {tensor.dtype for tensor in weights.values()} == {DTYPES[dtype]}
    wanted = {name: array.astype(DTYPES[dtype]) for name, array in expected(state).items()}
    assert_same(weights, wanted)


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_both_layouts_give_the_same_model(tmp_path: Path, name: str) -> None:
    config, weights = ODD_CONFIGS[name], random_weights(ODD_CONFIGS[name])
    theirs = open_checkpoint(
        write_deepmind(weights, tmp_path / "pt"), window=config.window, soft_cap=config.soft_cap
    )
    ours = open_checkpoint(write_hugging_face(config, weights, tmp_path / "hf"))
    assert theirs.problems == ours.problems == ()
    assert ours.config == config
    if config.embedding_scale != 1.0:  # the one thing that no shape tells
        assert theirs.config == config
    assert_same(ours.weights, weights)
    assert_same(theirs.weights, weights)


@pytest.mark.parametrize("limit", [1, 200, 1000])
def test_slabs_add_up_to_the_tensor(
    tmp_path: Path, state: dict[str, torch.Tensor], limit: int
) -> None:
    weights = open_checkpoint(save(tmp_path, state)).weights
    for name, array in expected(state).items():
        slabs = [rows for _, rows in weights[name].slabs(limit)]
        np.testing.assert_array_equal(np.concatenate(slabs), array, err_msg=name)


def test_nested_names_are_joined(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    nested: dict[str, Any] = {}
    for name, tensor in state.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    checkpoint = open_checkpoint(save(tmp_path, {"params": nested}))
    assert checkpoint.problems == ()
    assert_same(checkpoint.weights, expected(state))


def test_tensors_may_share_a_storage(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    shared = {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(state.items(), parts, strict=True)
    }
    assert_same(open_checkpoint(save(tmp_path, shared)).weights, expected(state))


def test_problems_of_tensors_are_listed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    broken: dict[str, Any] = dict(state)
    del broken["blocks.1.attention_block.proj_v.weight"]
    broken["blocks.0.recurrent_block.linear_x.bias"] = torch.zeros(63)
    broken["blocks.2.mlp_block.ffw_up.b"] = torch.zeros(2, 80)
    broken["final_norm.scale"] = torch.zeros(48, dtype=torch.float64)
    broken["optimizer.step"] = 7
    assert open_checkpoint(save(tmp_path, broken)).problems == (
        "wrong shape: layers.0.temporal_block.linear_x.bias is [63] (expected [64])",
        "missing: layers.1.temporal_block.v_proj.weight",
        "wrong shape: layers.2.mlp_block.gate_proj.bias is [2, 80] (expected [80])",
        "wrong shape: layers.2.mlp_block.up_proj.bias is [2, 80] (expected [80])",
        "wrong dtype: final_norm.weight is float64 (expected float32, float16, bfloat16)",
        "unexpected: optimizer.step",
    )


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.zeros(2), "b": Malicious(tmp_path / "ran")})
    with pytest.raises(RequestError, match="which could run code"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_state_dict(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    every_other = state | {"final_norm.scale": torch.zeros(2, 6)[:, ::2]}
    cases: dict[str, Any] = {
        "holds list; expected a dictionary": [torch.zeros(2)],
        "final_norm.scale \\[2, 3\\] is not stored row by row": every_other,
        "it has no 2-dimensional embedder.input_embedding": {"a": torch.zeros(2)},
        "it has no 3-dimensional blocks.0.mlp_block": {
            "embedder.input_embedding": torch.ones(2, 2)
        },
    }
    for message, content in cases.items():
        with pytest.raises(RequestError, match=message):
            open_checkpoint(save(tmp_path, content))


def test_matrices_may_be_stored_transposed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """As DeepMind's own conversion from flax leaves them."""
    turned = {n: x.T.contiguous().T if x.dim() == 2 else x for n, x in state.items()}
    assert any(not x.is_contiguous() for x in turned.values())
    (tmp_path / "turned").mkdir()
    ours = open_checkpoint(save(tmp_path / "turned", turned)).weights
    theirs = open_checkpoint(save(tmp_path, state)).weights
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.array_equal(tensor.whole(), theirs[name].whole()), name


@pytest.mark.parametrize("drop", ["blocks.1.attention_block", "blocks.1."])
def test_a_layer_without_a_kind(tmp_path: Path, state: dict[str, torch.Tensor], drop: str) -> None:
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(drop)}
    with pytest.raises(RequestError, match=r"blocks.1 has no temporal block"):
        open_checkpoint(save(tmp_path, rest))


def test_damaged_files(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    whole = save(tmp_path, state).read_bytes()
    legacy = save(tmp_path, state, _use_new_zipfile_serialization=False).read_bytes()
    cases = {
        "is truncated": whole[:-1000],
        "is not a torch checkpoint": b"Call me Ishmael.",
        "legacy format": legacy,
        "legacy format ": pickle.dumps({"a": 1}),
        "is damaged: Bad CRC": whole.replace(b"ctorch._utils", b"\xfftorch._utils"),
    }
    for message, content in cases.items():
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(RequestError, match=message.strip()) as caught:
            open_checkpoint(tmp_path / "model.pt")
        assert "\n" not in str(caught.value)


PICKLE = "model/data.pkl"
REWRITTEN: dict[str, tuple[int, tuple[bytes, bytes], str]] = {
    "other function": (zipfile.ZIP_STORED, (b"torch._utils", b"torch._utilz"), "could run code"),
    "unknown opcode": (zipfile.ZIP_STORED, (b"ctorch", b"\xfftorch"), "opcode .* unknown"),
    "compressed": (zipfile.ZIP_DEFLATED, (b"", b""), "is compressed"),
    # the count of a storage of 16 bytes
    "storage too small": (zipfile.ZIP_STORED, (b"K\4tq", b"K\2tq"), "record 0 of 16 bytes is said"),
    "storage too large": (zipfile.ZIP_STORED, (b"K\4tq", b"K\6tq"), "record 0 of 16 bytes is said"),
    "tensor too large": (zipfile.ZIP_STORED, (b"K\4\x85", b"K\6\x85"), "tensor a does not lie in"),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_rewritten_files(tmp_path: Path, case: str) -> None:
    how, (old, new), message = REWRITTEN[case]
    path, target = save(tmp_path, {"a": torch.arange(4.0)}), tmp_path / "other.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as other:
        for name in source.namelist():
            content = source.read(name)
            assert name != PICKLE or old in content
            other.writestr(name, content.replace(old, new, 1) if name == PICKLE else content, how)
    with pytest.raises(RequestError, match=message):
        locate_tensors(target)
