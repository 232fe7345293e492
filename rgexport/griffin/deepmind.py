"""Reads DeepMind's checkpoints: names, orientation and the shape of the model.

The files hold no configuration. Sizes follow from the shapes; the window, the soft cap and RoPE are
those of the released models (`recurrentgemma.common.Preset`), unless a user gives others.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.layer_ops import all_ops
from rgexport.griffin.layout import EMBEDDING, FINAL_NORM
from rgexport.griffin.orbax import read_orbax
from rgexport.griffin.tensor import DTYPES, DeepMindTensor, DeepMindTensors, FoundTensor
from rgexport.griffin.torch_file import read_torch_file


def _block_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for op in all_ops().values():
        if op.deepmind:
            for tensor in op.tensors:
                names[f"{op.deepmind}{tensor.deepmind}"] = f"{op.site}{tensor.end}"
    return names


NAMES = _block_names()
"""Within a block: DeepMind's name → canonical name, for tensors that map one to one."""

GLOBAL_NAMES = {"embedder.input_embedding": EMBEDDING, "final_norm.scale": FINAL_NORM}
"""Outside of blocks: DeepMind's name → canonical name."""

UP = "mlp_block.ffw_up.w"
UP_BIAS = "mlp_block.ffw_up.b"
BRANCHES = ("mlp_block.gate_proj", "mlp_block.up_proj")
"""The two halves of `ffw_up`, in its order."""

CONV = "recurrent_block.conv_1d.w"

_BLOCK_TENSOR = re.compile(r"blocks\.(?P<index>\d+)\.(?P<name>.+)")
_BLOCK = re.compile(r"blocks\.(?P<index>\d+)\.((?P<kind>recurrent|attention)_block\.)?.+")


def read_tensors(path: Path) -> DeepMindTensors:
    """Opens a `.pt` file or an orbax folder; tensors have the names of DeepMind's torch files."""
    if path.is_dir():
        return read_orbax(path)
    tensors = read_torch_file(path)
    return {name.removeprefix("params."): tensor for name, tensor in tensors.items()}


def canonical(stored: DeepMindTensors) -> dict[str, FoundTensor]:
    """Returns canonical name → tensor of canonical shape; unknown names stay as they are."""
    tensors: dict[str, FoundTensor] = {}
    for name, tensor in stored.items():
        if isinstance(tensor, DeepMindTensor) and tensor.dtype not in DTYPES.values():
            tensors |= _convert(name, tensor.dtype.name)
        else:
            tensors |= _convert(name, tensor)
    return tensors


def _convert(name: str, tensor: DeepMindTensor | str) -> dict[str, FoundTensor]:
    """Returns the canonical tensors that a stored tensor holds: two for `ffw_up`, else one."""
    match = _BLOCK_TENSOR.fullmatch(name)
    if match is None:
        return {GLOBAL_NAMES.get(name, name): _whole(tensor)}

    prefix = f"layers.{match['index']}."
    local_name = match["name"]
    if local_name == UP:
        return _branches(prefix, "weight", tensor)
    if local_name == UP_BIAS:
        return _branches(prefix, "bias", tensor)
    if local_name not in NAMES:
        return {name: _whole(tensor)}

    canonical_name = prefix + NAMES[local_name]
    if local_name == CONV and isinstance(tensor, DeepMindTensor) and len(tensor.shape) == 2:
        return {canonical_name: tensor.rows(_channels_first)}
    return {canonical_name: _whole(tensor)}


def _whole(tensor: DeepMindTensor | str) -> FoundTensor:
    """Returns a tensor in its stored shape."""
    if isinstance(tensor, str):
        return tensor
    return tensor.rows()


def _branches(prefix: str, kind: str, tensor: DeepMindTensor | str) -> dict[str, FoundTensor]:
    """Returns the halves of `ffw_up`, by the names of both branches' weight or bias."""
    gate_branch, up_branch = BRANCHES
    gate, up = _halves(tensor)
    return {f"{prefix}{gate_branch}.{kind}": gate, f"{prefix}{up_branch}.{kind}": up}


def _halves(tensor: DeepMindTensor | str) -> tuple[FoundTensor, FoundTensor]:
    """Splits `ffw_up.w` [2, W, M] into two [M, W], and `ffw_up.b` [2, 1, 1, M] into two [M]."""
    if isinstance(tensor, str):
        return tensor, tensor
    if len(tensor.shape) == 3 and tensor.shape[0] == 2:
        return tensor.rows(_first_matrix), tensor.rows(_second_matrix)
    if len(tensor.shape) == 4 and tensor.shape[:3] == (2, 1, 1):
        return tensor.rows(_first_bias), tensor.rows(_second_bias)
    # Another shape: the comparison with the model reports it.
    return tensor.rows(), tensor.rows()


def _first_matrix(array: np.ndarray) -> np.ndarray:
    """[2, W, M] → [M, W]."""
    return array[0].T


def _second_matrix(array: np.ndarray) -> np.ndarray:
    """[2, W, M] → [M, W]."""
    return array[1].T


def _first_bias(array: np.ndarray) -> np.ndarray:
    """[2, 1, 1, M] → [M]."""
    return array[0, 0, 0]


def _second_bias(array: np.ndarray) -> np.ndarray:
    """[2, 1, 1, M] → [M]."""
    return array[1, 0, 0]


def _channels_first(array: np.ndarray) -> np.ndarray:
    """[taps, W] → [W, 1, taps], as torch stores the weight of a depthwise convolution."""
    return array.T[:, None]


@dataclass(frozen=True)
class _AttentionSizes:
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class _RecurrentSizes:
    lru_heads: int
    lru_width: int
    conv_width: int


def infer_config(
    path: Path, stored: DeepMindTensors, window: int | None = None, soft_cap: float | None = None
) -> GriffinConfig:
    """Returns the configuration that the shapes imply.

    Raises:
        RequestError: the tensors are another model's.
    """
    vocab_size, width = _shape(path, stored, r"embedder\.input_embedding", 2)
    mlp_width = _shape(path, stored, r"blocks\.\d+\.mlp_block\.ffw_up\.w", 3)[2]
    block_types = _block_types(path, stored)

    attention: _AttentionSizes | None = None
    if "attention" in block_types:
        attention = _attention_sizes(path, stored)
    recurrent: _RecurrentSizes | None = None
    if "recurrent" in block_types:
        recurrent = _recurrent_sizes(path, stored)

    # Nothing reads the sizes of a kind of block that the model lacks; the fields must be set.
    if recurrent is None:
        assert attention is not None
        recurrent = _RecurrentSizes(attention.num_heads, lru_width=width, conv_width=4)
    if attention is None:
        head_dim = max(4, width // recurrent.lru_heads)
        attention = _AttentionSizes(recurrent.lru_heads, head_dim)

    return GriffinConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        lru_width=recurrent.lru_width,
        lru_heads=recurrent.lru_heads,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        block_types=block_types,
        window=window or 2048,
        conv_width=recurrent.conv_width,
        rope_dims=attention.head_dim // 2,
        soft_cap=30.0 if soft_cap is None else soft_cap,
        embedding_scale=sqrt_embedding_scale(width),
    )


def _attention_sizes(path: Path, stored: DeepMindTensors) -> _AttentionSizes:
    keys = _shape(path, stored, r"blocks\.\d+\.attention_block\.proj_k\.weight", 2)
    queries = _shape(path, stored, r"blocks\.\d+\.attention_block\.proj_q\.weight", 2)
    head_dim = keys[0]
    query_width = queries[0]
    if query_width % head_dim or head_dim % 4:
        raise RequestError(
            f"{path}: queries of {query_width} and keys of {head_dim} rows do not make heads; "
            "expected one key head, of a multiple of 4 rows, that divides the queries"
        )
    return _AttentionSizes(query_width // head_dim, head_dim)


def _recurrent_sizes(path: Path, stored: DeepMindTensors) -> _RecurrentSizes:
    gate = _shape(path, stored, r"blocks\.\d+\.recurrent_block\.rg_lru\.a_gate\.w", 3)
    conv = _shape(path, stored, r"blocks\.\d+\.recurrent_block\.conv_1d\.w", 2)
    heads = gate[0]
    block_width = gate[1]
    return _RecurrentSizes(heads, lru_width=heads * block_width, conv_width=conv[0])


def _shape(path: Path, stored: DeepMindTensors, pattern: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of the first tensor with that name and rank, and without empty axes."""
    for name, tensor in stored.items():
        if not re.fullmatch(pattern, name) or not isinstance(tensor, DeepMindTensor):
            continue
        if len(tensor.shape) == rank and all(tensor.shape):
            return tensor.shape
    readable = pattern.replace("\\", "").replace(".d+.", ".0.")
    raise RequestError(
        f"{path} is not a DeepMind Griffin checkpoint: it has no {rank}-dimensional {readable}"
    )


def _block_types(path: Path, stored: DeepMindTensors) -> tuple[BlockType, ...]:
    kinds: dict[int, set[str]] = {}
    for name in stored:
        match = _BLOCK.fullmatch(name)
        if match is None:
            continue
        kinds_of_block = kinds.setdefault(int(match["index"]), set())
        if match["kind"] is not None:
            kinds_of_block.add(match["kind"])

    types: list[BlockType] = []
    for index in range(len(kinds)):
        blocks = sorted(kinds.get(index, ()))
        if len(blocks) != 1:
            names = " and ".join(blocks) or "no temporal block"
            raise RequestError(
                f"{path}: blocks.{index} has {names}; expected recurrent or attention"
            )
        types.append("recurrent" if blocks == ["recurrent"] else "attention")
    return tuple(types)
