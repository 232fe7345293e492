"""Reads DeepMind's checkpoints: names, orientation and the shape of the model.

The files hold no configuration. Sizes follow from the shapes; the window, the soft cap and RoPE are
those of the released models (`recurrentgemma.common.Preset`), unless a user gives others.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.inventory import FoundTensor
from rgexport.griffin.layer import all_ops
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.orbax_folder import read_orbax
from rgexport.griffin.stored import RowMajor, Stored
from rgexport.griffin.tensor import DTYPES, RowTensor
from rgexport.griffin.torch_file import locate_tensors

NAMES: dict[str, str] = {
    f"{op.deepmind}{tensor.deepmind}": f"{op.site}{tensor.end}"
    for op in all_ops().values()
    if op.deepmind
    for tensor in op.tensors
}
"""Within a block: DeepMind's name → canonical name, for tensors that map one to one."""

GLOBAL_NAMES = {"embedder.input_embedding": EMBEDDING, "final_norm.scale": "final_norm.weight"}
UP, UP_BIAS, CONV = "mlp_block.ffw_up.w", "mlp_block.ffw_up.b", "recurrent_block.conv_1d.w"
BRANCHES = ("mlp_block.gate_proj", "mlp_block.up_proj")
"""The two halves of `ffw_up`, in its order."""

_BLOCK = re.compile(r"blocks\.(\d+)\.((recurrent|attention)_block\.)?.+")

Tensors = Mapping[str, Stored | str]


def read_tensors(path: Path) -> dict[str, Stored | str]:
    """The tensors of a `.pt` file or an orbax folder by the names in DeepMind's torch files.

    For the errors see `locate_tensors` and `read_orbax`.
    """
    if path.is_dir():
        return read_orbax(path)
    found = locate_tensors(path)
    return {name.removeprefix("params."): tensor for name, tensor in found.items()}


def canonical(stored: Tensors) -> dict[str, FoundTensor]:
    """Canonical name → tensor of canonical shape; names that are unknown stay as they are."""
    found: dict[str, FoundTensor] = {}
    for name, tensor in stored.items():
        if isinstance(tensor, Stored) and tensor.dtype not in DTYPES.values():
            tensor = tensor.dtype.name
        found |= _convert(name, tensor)
    return found


def _convert(name: str, tensor: Stored | str) -> dict[str, FoundTensor]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return {GLOBAL_NAMES.get(name, name): _rows(tensor)}
    prefix, suffix = f"layers.{match[1]}.", match[2]
    if suffix in (UP, UP_BIAS):
        kind = "weight" if suffix == UP else "bias"
        names = [f"{prefix}{branch}.{kind}" for branch in BRANCHES]
        return dict(zip(names, _split_up(tensor), strict=True))
    rows = _conv(tensor) if suffix == CONV else _rows(tensor)
    return {prefix + NAMES[suffix] if suffix in NAMES else name: rows}


def _rows(tensor: Stored | str) -> FoundTensor:
    return tensor if isinstance(tensor, str) else tensor.rows()


def _split_up(tensor: Stored | str) -> list[FoundTensor]:
    """`ffw_up.w` [2, W, M] → two [M, W]; `ffw_up.b` [2, 1, 1, M] → two [M]."""
    if not isinstance(tensor, RowMajor) or tensor.shape[:1] != (2,):
        return [_rows(tensor)] * 2  # the inventory reports its shape
    shape = tensor.shape[1:]
    if len(shape) == 2:
        return [tensor.item(index, shape).transposed() for index in range(2)]
    if len(shape) == 3 and shape[:2] == (1, 1):
        return [tensor.item(index, shape[2:]).rows() for index in range(2)]
    return [_rows(tensor)] * 2


def _conv(tensor: Stored | str) -> FoundTensor:
    """`conv_1d.w` [K, W] → [W, 1, K]."""
    if isinstance(tensor, str) or len(tensor.shape) != 2:
        return _rows(tensor)
    taps, width = tensor.shape
    matrix = tensor.transposed()
    return RowTensor(
        (width, 1, taps), matrix.dtype, lambda start, stop: matrix.read(start, stop)[:, None]
    )


def infer_config(
    path: Path, stored: Tensors, window: int | None = None, soft_cap: float | None = None
) -> GriffinConfig:
    """The configuration that the shapes imply.

    Raises:
        RequestError: the tensors are not those of a Griffin model.
    """
    vocab_size, width = _shape(path, stored, r"embedder\.input_embedding", 2)
    mlp_width = _shape(path, stored, r"blocks\.\d+\.mlp_block\.ffw_up\.w", 3)[2]
    types = _block_types(path, stored)
    heads, head_dim = (0, 0)
    lru_width, lru_heads, conv_width = (width, 0, 4)
    if "attention" in types:
        head_dim = _shape(path, stored, r"blocks\.\d+\.attention_block\.proj_k\.weight", 2)[0]
        queries = _shape(path, stored, r"blocks\.\d+\.attention_block\.proj_q\.weight", 2)[0]
        heads = queries // head_dim
        if heads * head_dim != queries or head_dim % 4:
            raise RequestError(
                f"{path}: queries of {queries} and keys of {head_dim} rows do not make heads; "
                "expected one key head, of a multiple of 4 rows, that divides the queries"
            )
    if "recurrent" in types:
        gate = _shape(path, stored, r"blocks\.\d+\.recurrent_block\.rg_lru\.a_gate\.w", 3)
        lru_heads, lru_width = gate[0], gate[0] * gate[1]
        conv_width = _shape(path, stored, r"blocks\.\d+\.recurrent_block\.conv_1d\.w", 2)[0]
    heads = heads or lru_heads
    head_dim = head_dim or max(4, width // heads)  # without attention nothing reads it
    return GriffinConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        lru_width=lru_width,
        lru_heads=lru_heads or heads,
        num_heads=heads,
        head_dim=head_dim,
        block_types=types,
        window=window or 2048,
        conv_width=conv_width,
        rope_dims=head_dim // 2,
        soft_cap=30.0 if soft_cap is None else soft_cap,
        embedding_scale=sqrt_embedding_scale(width),
    )


def _shape(path: Path, stored: Tensors, pattern: str, rank: int) -> tuple[int, ...]:
    """The shape of the first tensor of that name and rank, without empty axes."""
    for name, tensor in stored.items():
        if not re.fullmatch(pattern, name) or not isinstance(tensor, Stored):
            continue
        if len(tensor.shape) == rank and all(tensor.shape):
            return tensor.shape
    readable = pattern.replace("\\", "").replace(".d+.", ".0.")
    raise RequestError(
        f"{path} is not a DeepMind Griffin checkpoint: it has no {rank}-dimensional {readable}"
    )


def _block_types(path: Path, stored: Tensors) -> tuple[BlockType, ...]:
    kinds: dict[int, set[str]] = {}
    for name in stored:
        if match := _BLOCK.fullmatch(name):
            kinds.setdefault(int(match[1]), set()).update({match[3]} - {None})
    types: list[BlockType] = []
    for index in range(len(kinds)):
        match sorted(kinds.get(index, ())):
            case ["recurrent"]:
                types.append("recurrent")
            case ["attention"]:
                types.append("attention")
            case other:
                found = " and ".join(other) or "no temporal block"
                raise RequestError(
                    f"{path}: blocks.{index} has {found}; expected recurrent or attention"
                )
    return tuple(types)
