"""The transformer of random weights, read back by gguf-py."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from bench.gemma_shape import Shape, write_gemma

SMALL = Shape(layers=2, width=256, mlp_width=512, heads=2, kv_heads=1, head_dim=64, vocab_size=1000)


def test_file_is_what_it_says(tmp_path):
    write_gemma(tmp_path / "small.gguf", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]
    reader = GGUFReader(tmp_path / "small.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tuple(t.shape[::-1]) for name, t in found.items()} == dict(SMALL.tensors())
    for name, tensor in found.items():
        matrix = len(tensor.shape) == 2
        kind = GGMLQuantizationType.Q4_0 if matrix else GGMLQuantizationType.F32
        assert tensor.tensor_type == kind, name
        values = dequantize(tensor.data, kind)
        gain = np.linalg.norm(values) / np.sqrt(len(values)) if matrix else values.mean()
        assert 0.9 < gain < 1.2, name
    end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    assert 0 <= (tmp_path / "small.gguf").stat().st_size - end < 32
    assert reader.fields["gemma.vocab_size"].contents() == 1000


def test_slabs_join(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gemma_shape.SLAB_BYTES", 1000)
    write_gemma(tmp_path / "slabs.gguf", SMALL)
    tensors = GGUFReader(tmp_path / "slabs.gguf").tensors
    names = [name for name, _ in SMALL.tensors()]
    assert [tensor.name for tensor in tensors] == names
    embedding = dequantize(tensors[0].data, GGMLQuantizationType.Q4_0)
    assert np.isfinite(embedding).all() and len(np.unique(embedding[:, 0])) > 500


def test_default_is_the_2b():
    sizes = dict(Shape().tensors())
    assert len(sizes) == 2 + 9 * 18
    assert sum(np.prod(size) for size in sizes.values()) == 2_506_172_416  # as Gemma's card has it


def test_llama_bench_runs_it(llama_tools, tmp_path):
    from bench.llama import LlamaBench

    write_gemma(tmp_path / "small.gguf", SMALL)
    found = LlamaBench(llama_tools / "llama-bench", 2, 3)(tmp_path / "small.gguf")
    assert len(found["samples_ts"]) == 2 and min(found["samples_ts"]) > 0
    assert found["n_gen"] == 3 and found["peak_bytes"] > found["model_size"] > 0
