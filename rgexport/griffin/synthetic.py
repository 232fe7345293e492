"""Writes random checkpoints with the statistics of trained ones, to measure without real weights.

Drawing the 2.7 G normals of a 2B would take minutes. Instead each row of a large tensor is a window
of a pool of about a million normals, at a random offset.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from rgexport.errors import RequestError
from rgexport.files.targets import replace_folder, require_free_disk
from rgexport.files.typed_json import read_json
from rgexport.griffin.checkpoint import demo_folder
from rgexport.griffin.config import SIZES, GriffinConfig
from rgexport.griffin.huggingface import CONFIG, SHARD_BYTES, write_weights
from rgexport.griffin.huggingface_config import Dialect, to_hugging_face
from rgexport.griffin.layer_ops import Role
from rgexport.griffin.layout import TensorSpec, model_tensors
from rgexport.griffin.tensor import DTYPES, RowTensor, WeightSource, from_array

POOL = 1 << 20
OUTLIERS, OUTLIER_GAIN = 0.002, 6.0
"""Share of a linear's input channels that are larger than the rest, and by how much."""
SLOWEST, FASTEST = 1e-5, 0.1
"""The least and the largest 1 - a of the RG-LRU with an open gate; a spans 0.9 … 0.99999."""
MARK = "rgexport_random"
"""The field of `config.json` that marks a random checkpoint: only those may be overwritten."""


def write_random(
    model: str | GriffinConfig,
    target: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> None:
    """Writes a random checkpoint in Hugging Face's layout, as a stream of slabs.

    `model` is a word in `SIZES` or a configuration, the dtype bfloat16; a file has at most
    `shard_bytes`. `force` replaces an older random checkpoint. Raises RequestError for a target
    that exists, or too little space.
    """
    config, size = (SIZES[model].config, model) if isinstance(model, str) else (model, "")
    count = sum(math.prod(spec.shape) for spec in model_tensors(config).values())
    require_free_disk(target, count * DTYPES["bfloat16"].itemsize)
    dialect: Dialect = "block_types" if size.startswith("9b") else "_block_types"
    fields = to_hugging_face(config, dialect) | {"torch_dtype": "bfloat16", MARK: {"seed": seed}}
    with replace_folder(target, force=force, replaceable=_is_random) as folder:
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
        _write_tokenizer(folder, config.vocab_size, chat=size.endswith("-it"))
        write_weights(folder, random_weights(config, seed=seed), shard_bytes=shard_bytes)


def _is_random(folder: Path) -> bool:
    try:
        return MARK in read_json(folder / CONFIG)
    except RequestError:
        return False


def _write_tokenizer(folder: Path, vocab_size: int, *, chat: bool) -> None:
    try:
        demo = demo_folder()
    except RequestError:
        return
    # slow to import, and generated without type information
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString((demo / "tokenizer.model").read_bytes())
    if len(model.pieces) > vocab_size:
        return
    last = min(piece.score for piece in model.pieces)
    for index in range(len(model.pieces), vocab_size):
        model.pieces.add(piece=f"▁w{index}", score=last - index)
    model.trainer_spec.vocab_size = vocab_size
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = read_json(demo / "tokenizer_config.json")
    if not chat:
        settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    for name in ("special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(demo / name, folder / name)


def random_weights(
    config: GriffinConfig, *, seed: int = 0, dtype: str = "bfloat16"
) -> WeightSource:
    """Returns random weights, made when they are read; slabs of any size give the same rows."""
    tensors = model_tensors(config)
    longest = max(spec.shape[-1] for spec in tensors.values())
    draw = _Draw(seed, DTYPES[dtype], POOL + longest)
    return {name: draw.tensor(name, spec) for name, spec in tensors.items()}


class _Draw:
    def __init__(self, seed: int, dtype: np.dtype, length: int) -> None:
        self.seed = seed
        self.dtype = dtype
        self.normals = np.random.default_rng(seed).standard_normal(length, np.float32)
        self.scaled: dict[float, np.ndarray] = {}

    def tensor(self, name: str, spec: TensorSpec) -> RowTensor:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if spec.role in _SMALL:
            return from_array(_SMALL[spec.role](rng, spec.shape).astype(self.dtype))
        return self._large(spec, rng)

    def _large(self, spec: TensorSpec, rng: np.random.Generator) -> RowTensor:
        """Takes rows from the pool, scaled so that unit inputs give unit outputs."""
        columns = spec.shape[-1]
        count, inner = math.prod(spec.shape[:-1]), math.prod(spec.shape[1:-1])
        # Without repeats: equal rows of the embedding would tie for the largest logit.
        offsets = rng.choice(POOL, count, replace=count > POOL)
        windows = sliding_window_view(self._pool(columns**-0.5), columns)
        louder = max(1, round(OUTLIERS * columns)) if spec.role == "linear" else 0
        loud = rng.choice(columns, louder, replace=False)

        def read(start: int, stop: int) -> np.ndarray:
            rows = windows[offsets[start * inner : stop * inner]].view(self.dtype)
            rows[:, loud] = (rows[:, loud].astype(np.float32) * OUTLIER_GAIN).astype(self.dtype)
            return rows.reshape(stop - start, *spec.shape[1:])

        return RowTensor(spec.shape, self.dtype, read)

    def _pool(self, std: float) -> np.ndarray:
        """Returns the normals times `std`, stored as integers, which numpy copies faster."""
        if std not in self.scaled:
            stored = (self.normals * np.float32(std)).astype(self.dtype)
            self.scaled[std] = stored.view(f"u{self.dtype.itemsize}")
        return self.scaled[std]


def _normal(std: float) -> Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]:
    return lambda rng, shape: std * rng.standard_normal(shape, np.float32)


def _a_param(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Solves `softplus(p) = -log(a) / 8`, with 1 - a spread evenly over its orders of magnitude."""
    decay = np.exp(rng.uniform(np.log(SLOWEST), np.log(FASTEST), shape))
    return np.asarray(np.log(np.expm1(-np.log1p(-decay) / 8)))


_SMALL: dict[Role, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "norm": _normal(0.05),
    "bias": _normal(0.02),
    "conv": _normal(0.5),  # four taps of 1/2 keep the variance
    "a_param": _a_param,
}
"""Roles whose tensors are drawn whole; the others are windows of the pool."""
