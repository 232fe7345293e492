"""The transformer of random weights, read back by gguf-py."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from bench.gemma_shape import Shape, write_gemma

SMALL = Shape(layers=2, width=256, mlp_width=512, heads=2, kv_heads=1, head_dim=64, vocab_size=1000)


def test_file_is_what_it_says(tmp_path, monkeypatch):
    """It is written in slabs."""
    monkeypatch.setattr("bench.gemma_shape.SLAB_BYTES", 1000)
    write_gemma(tmp_path / "small.gguf", SMALL)
    reader = GGUFReader(tmp_path / "small.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tuple(t.shape[::-1]) for name, t in tensors.items()} == dict(SMALL.tensors())
    for name, tensor in tensors.items():
        matrix = len(tensor.shape) == 2
        kind = GGMLQuantizationType.Q4_0 if matrix else GGMLQuantizationType.F32
        assert tensor.tensor_type == kind, name
        values = dequantize(tensor.data, kind)
        gain = np.linalg.norm(values) / np.sqrt(len(values)) if matrix else values.mean()
        assert 0.9 < gain < 1.2, name
    assert reader.fields["gemma.vocab_size"].contents() == 1000
    sizes = dict(Shape().tensors()).values()
    assert sum(np.prod(size) for size in sizes) == 2_506_172_416  # as the 2B's card has it
