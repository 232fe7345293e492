"""Faults in the metadata of GGUF files: each fails, and its layer and site are named.

The graph is llama.cpp's, so only the metadata can make it wrong.
"""

from pathlib import Path

import numpy as np
import pytest

from rgexport.export.gguf.integrity import data_start, seal
from rgexport.export.gguf.naming import ARCHITECTURE
from rgexport.files.hashing import hash_file
from rgexport.quantize.gguf_header import read_header
from tests.llama_tools import needs_llama_cpp
from tests.validate.faults.conftest import CONFIG, require_named

pytestmark = needs_llama_cpp


@pytest.mark.parametrize(
    ("key", "value", "site"),
    [
        ("final_logit_softcapping", 0.0, "logits"),
        # llama.cpp's window counts the token too, so this one is one less.
        ("attention.sliding_window", CONFIG.window, "layers.2.temporal_block.attention"),
        ("embedding_scale", CONFIG.width**0.5, "embed_tokens"),
        ("rope.dimension_count", CONFIG.head_dim, "layers.2.temporal_block.rope_q"),
    ],
)
def test_wrong_metadata(copy, judge, key, value, site):
    artifact = copy("gguf-int4")
    set_number(artifact, key, value)
    result = judge(artifact)
    require_named(result, site)
    assert result.sites.first.site == site


def set_number(path: Path, key: str, value: float) -> None:
    """Sets a number of the architecture's metadata, in the type that it has, and fits the hash."""
    _, stop = read_header(path).spans[f"{ARCHITECTURE}.{key}"]
    dtype = np.dtype("<u4" if isinstance(value, int) else "<f4")
    with path.open("r+b") as file:
        file.seek(stop - dtype.itemsize)
        file.write(np.array(value, dtype).tobytes())
    seal(path, hash_file(path, start=data_start(read_header(path))).sha256)
