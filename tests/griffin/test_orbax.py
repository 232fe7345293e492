"""DeepMind's flax checkpoints against the torch file that DeepMind's package makes of them."""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from recurrentgemma import common, conversion
from recurrentgemma import jax as flax_model

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint

pytestmark = pytest.mark.full
TYPES = common.TemporalBlockType
SHAPES: dict[str, dict[str, Any]] = {
    "regular": {"block_types": (TYPES.RECURRENT, TYPES.ATTENTION), "lru_width": 24},
    "hawk": {"block_types": (TYPES.RECURRENT,) * 2, "lru_width": 16},
}


def write(folder: Path, shape: str, *, database: bool, dtype: Any = jnp.float32) -> Path:
    """A random model as an orbax folder and as a torch file beside it; the folder."""
    config = common.GriffinConfig(
        vocab_size=32,
        width=16,
        mlp_expanded_width=24,
        num_heads=2,
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
        **SHAPES[shape],
    )
    model = flax_model.Griffin(config, dtype=dtype, param_dtype=dtype)
    tokens, positions = jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None]
    initial = model.init(jax.random.PRNGKey(3), tokens, positions)
    keys = iter(jax.random.split(jax.random.PRNGKey(4), 100))
    params = jax.tree_util.tree_map(
        lambda x: (x + 0.1 * jax.random.normal(next(keys), x.shape)).astype(dtype), initial
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=database)) as saver:
        saver.save(folder / "flax", params)
    state = conversion.flax_params_to_pytorch_state_dict(params["params"])
    torch.save(state, folder / "model.pt")
    return folder / "flax"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("database", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_those_of_the_torch_file(shape, database, dtype, tmp_path):
    folder = write(tmp_path, shape, database=database, dtype=dtype)
    ours = open_checkpoint(folder, window=8)
    theirs = open_checkpoint(tmp_path / "model.pt", window=8)
    assert ours.problems == theirs.problems == () and ours.config == theirs.config
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in ours.weights.items():
        expected = theirs.weights[name]
        assert tensor.dtype == expected.dtype, name
        assert tensor.whole().tobytes() == expected.whole().tobytes(), name
        middle = tensor.shape[0] // 2
        assert tensor.read(1, middle + 1).tobytes() == expected.read(1, middle + 1).tobytes()


def test_folders_of_any_name_and_depth(tmp_path):
    folder = write(tmp_path, "regular", database=True)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    checkpoint = open_checkpoint(folder, window=8)
    assert [path.name for path in checkpoint.tokenizer_files] == ["tokenizer.model"]
    for name in ("a b", "a%20b", "a#b", "a?b"):
        odd = Path(shutil.copytree(folder, tmp_path / name / "default"))
        assert open_checkpoint(odd, window=8).problems == ()
        assert open_checkpoint(odd.parent, window=8).path == odd


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(tmp_path / "other", {"params": {"x": np.zeros((2, 3), np.float32)}})
    with pytest.raises(RequestError, match="is not a DeepMind Griffin checkpoint"):
        open_checkpoint(tmp_path / "other")
    folder = write(tmp_path, "regular", database=True)
    (folder / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(RequestError, match="flax cannot be read"):
        open_checkpoint(folder, window=8)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(RequestError, match=r"pip install 'rgexport\[orbax\]'"):
        open_checkpoint(folder, window=8)
