"""Reads DeepMind's checkpoints: orbax folders, names, orientation and the shape of the model.

The files hold no configuration. Sizes follow from the shapes; the window, the soft cap and RoPE are
those of the released models (`recurrentgemma.common.Preset`), unless a user gives others.
"""

import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.layout import EMBEDDING, all_ops
from rgexport.griffin.tensor import (
    DTYPES,
    DeepMindTensor,
    DeepMindTensors,
    FoundTensor,
    RowTensor,
    View,
)
from rgexport.griffin.torch_file import read_torch_file

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


def read_tensors(path: Path) -> DeepMindTensors:
    """Opens a `.pt` file or an orbax folder; tensors have the names of DeepMind's torch files."""
    if path.is_dir():
        return read_orbax(path)
    return {n.removeprefix("params."): tensor for n, tensor in read_torch_file(path).items()}


def canonical(stored: DeepMindTensors) -> dict[str, FoundTensor]:
    """Returns canonical name → tensor of canonical shape; unknown names stay as they are."""
    tensors: dict[str, FoundTensor] = {}
    for name, tensor in stored.items():
        if isinstance(tensor, DeepMindTensor) and tensor.dtype not in DTYPES.values():
            tensor = tensor.dtype.name
        tensors |= _convert(name, tensor)
    return tensors


def _convert(name: str, tensor: DeepMindTensor | str) -> dict[str, FoundTensor]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    prefix, suffix = (f"layers.{match[1]}.", match[2]) if match else ("", name)
    if suffix in (UP, UP_BIAS) and match:
        names = [f"{prefix}{branch}.{'weight' if suffix == UP else 'bias'}" for branch in BRANCHES]
        return dict(zip(names, _branches(tensor), strict=True))
    names_here = NAMES if match else GLOBAL_NAMES
    canonical_name = prefix + names_here[suffix] if suffix in names_here else name
    if isinstance(tensor, str):
        return {canonical_name: tensor}
    if suffix == CONV and len(tensor.shape) == 2:  # [K, W] → [W, 1, K]
        return {canonical_name: tensor.rows(lambda array: array.T[:, None])}
    return {canonical_name: tensor.rows()}


def _branches(tensor: DeepMindTensor | str) -> list[FoundTensor]:
    """`ffw_up.w` [2, W, M] → two [M, W]; `ffw_up.b` [2, 1, 1, M] → two [M]."""
    if isinstance(tensor, str):
        return [tensor] * 2
    if tensor.shape[:1] == (2,) and len(tensor.shape) == 3:
        return [tensor.rows(lambda array: array[0].T), tensor.rows(lambda array: array[1].T)]
    if tensor.shape[:3] == (2, 1, 1) and len(tensor.shape) == 4:
        return [tensor.rows(lambda array: array[0, 0, 0]), tensor.rows(lambda a: a[1, 0, 0])]
    return [tensor.rows()] * 2  # the comparison with the model reports its shape


def infer_config(
    path: Path, stored: DeepMindTensors, window: int | None = None, soft_cap: float | None = None
) -> GriffinConfig:
    """Returns the configuration that the shapes imply; RequestError for another model's."""
    vocab_size, width = _shape(path, stored, r"embedder\.input_embedding", 2)
    mlp_width = _shape(path, stored, r"blocks\.\d+\.mlp_block\.ffw_up\.w", 3)[2]
    types = _block_types(path, stored)
    heads = head_dim = lru_heads = 0
    lru_width, conv_width = width, 4
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


def _shape(path: Path, stored: DeepMindTensors, pattern: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of the first tensor of that name and rank without empty axes."""
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
        if match := _BLOCK.fullmatch(name):
            kinds.setdefault(int(match[1]), set()).update({match[3]} - {None})
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


_METADATA, _DATABASE, _ARRAY = "_METADATA", "manifest.ocdbt", "/.zarray"
_NESTED = "default"  # the item that has the parameters, in an orbax checkpoint of several items
_KERNEL, _WEIGHT = ".kernel", ".weight"  # a matrix [in, out] in flax, its transpose in torch


def orbax_folder(path: Path) -> Path | None:
    """Returns the folder that has the parameters, if `path` is an orbax checkpoint."""
    for folder in (path, path / _NESTED):
        is_marked = (folder / _METADATA).is_file() or (folder / _DATABASE).is_file()
        if is_marked or (folder.is_dir() and any(folder.glob(f"params.*{_ARRAY}"))):
            return folder
    return None


def read_orbax(folder: Path) -> DeepMindTensors:
    """Opens an orbax checkpoint; converts names and matrices to the form of DeepMind's torch files.

    Each parameter is a zarr array, in a folder of its own or in one OCDBT database for all, and in
    one compressed chunk, so it is read whole: the largest one of a 2B takes 1.3 GB of memory.
    Raises NotInstalled without tensorstore, RequestError for a folder that cannot be read.
    """
    try:
        import tensorstore
    except ModuleNotFoundError:
        raise NotInstalled(
            f"{folder} is an orbax checkpoint and needs tensorstore: pip install 'rgexport[orbax]'"
        ) from None
    tensors: DeepMindTensors = {}
    try:
        store = tensorstore.KvStore.open(_orbax_store(folder)).result()
        keys = sorted(key.decode() for key in store.list().result())
        for parameter in (key.removesuffix(_ARRAY) for key in keys if key.endswith(_ARRAY)):
            array = _open_array(folder, parameter)
            shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
            name, transposed = parameter.removeprefix("params."), False
            if name.endswith(_KERNEL) and len(shape) == 2:
                name, shape = name.removesuffix(_KERNEL) + _WEIGHT, shape[::-1]
                transposed = True
            view_rows = partial(_view_rows, folder, parameter, shape, dtype, transposed)
            tensors[name] = DeepMindTensor(shape, dtype, view_rows)
    except ValueError as error:  # tensorstore's
        raise _unreadable(folder, error) from None
    return tensors


def _view_rows(
    folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, transposed: bool, view: View
) -> RowTensor:
    def read(start: int, stop: int) -> np.ndarray:
        array = _unpacked(folder, name)
        return np.array(view(array.T if transposed else array)[start:stop], order="C")

    return RowTensor(view(np.broadcast_to(np.zeros((), dtype), shape)).shape, dtype, read)


def _orbax_store(folder: Path) -> dict[str, Any]:
    files = {"driver": "file", "path": f"{folder.resolve().as_posix()}/"}
    return {"driver": "ocdbt", "base": files} if (folder / _DATABASE).is_file() else files


def _open_array(folder: Path, name: str) -> Any:
    import tensorstore

    store = _orbax_store(folder)
    store["path"] = f"{store.get('path', '')}{name}/"
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()


@lru_cache(maxsize=3)
def _unpacked(folder: Path, name: str) -> np.ndarray:
    try:
        return np.asarray(_open_array(folder, name).read().result())
    except ValueError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: ValueError) -> RequestError:
    reason = " ".join(str(error).split())[:300]
    return RequestError(f"{folder} cannot be read: {reason}; copy it again")
