"""Weight files: DeepMind's .pt and safetensors, sound ones, damaged ones and hostile ones."""

import json
import math
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as safetensors_bytes

from rgexport.errors import RequestError
from rgexport.files.safetensors import read_header, read_metadata
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.config import sqrt_embedding_scale
from rgexport.griffin.huggingface import write_weights
from rgexport.griffin.tensor import DTYPES, entry_rows, from_array
from rgexport.griffin.torch_file import read_torch_file
from rgexport.runtimes.machine import rss_bytes
from tests.deepmind import deepmind_state_dict, write_deepmind
from tests.models import ODD_CONFIGS, make_config, random_weights, write_hugging_face

CONFIG = make_config("raar", width=48, heads=4, lru_width=64, mlp_width=80, vocab_size=61)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture
def state():
    """By DeepMind's names, which `test_reference.py` shows to be right."""
    return deepmind_state_dict(WEIGHTS)


def save(folder, content, **options):
    torch.save(content, folder / "model.pt", **options)
    return folder / "model.pt"


def assert_holds(path, expected):
    """A checkpoint has these weights, also when they are read in slabs."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.problems == () and checkpoint.weights.keys() == expected.keys()
    for name, array in expected.items():
        tensor = checkpoint.weights[name]
        assert tensor.dtype == array.dtype
        np.testing.assert_array_equal(tensor.whole(), array, err_msg=name)
        for limit in (1, 200, 1000):
            slabs = [rows for _, rows in tensor.slabs(limit)]
            np.testing.assert_array_equal(np.concatenate(slabs), array, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_each_dtype(tmp_path, dtype):
    file = write_deepmind(WEIGHTS, tmp_path, dtype=dtype)
    assert_holds(file, {name: array.astype(DTYPES[dtype]) for name, array in WEIGHTS.items()})


def test_the_embedding_scale_is_rounded_as_the_reference_rounds_it():
    for width in range(1, 10_000):
        scale = torch.tensor(math.sqrt(width)).type(torch.bfloat16)
        assert sqrt_embedding_scale(width) == scale.float().item(), width


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_both_layouts_give_the_same_model(tmp_path, name):
    config, weights = ODD_CONFIGS[name], random_weights(ODD_CONFIGS[name])
    file = write_deepmind(weights, tmp_path / "pt")
    theirs = open_checkpoint(file, window=config.window, soft_cap=config.soft_cap)
    ours = open_checkpoint(write_hugging_face(config, weights, tmp_path / "hf"))
    assert ours.config == config
    if config.embedding_scale != 1.0:  # the one thing that no shape tells
        assert theirs.config == config
    for path in (file, tmp_path / "hf"):
        assert_holds(path, weights)


def nested(state):
    """Names that are joined from those of dictionaries in dictionaries."""
    params = {}
    for name, tensor in state.items():
        *path, last = name.split(".")
        inner = params
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = tensor
    return {"params": params}


def shared(state):
    """All tensors in one storage."""
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    pairs = zip(state.items(), parts, strict=True)
    return {name: part.view(tensor.shape) for (name, tensor), part in pairs}


def transposed(state):
    """Matrices as DeepMind's own conversion from flax leaves them."""
    return {n: x.T.contiguous().T if x.dim() == 2 else x for n, x in state.items()}


@pytest.mark.parametrize("layout", [nested, shared, transposed])
def test_other_ways_to_store_it(tmp_path, state, layout):
    assert_holds(save(tmp_path, layout(state)), WEIGHTS)


def test_files_that_are_damaged_or_no_state_dict(tmp_path, state):
    every_other = {"final_norm.scale": torch.zeros(2, 6)[:, ::2]}
    no_attention = {n: x for n, x in state.items() if not n.startswith("blocks.1.attention_block")}
    whole = save(tmp_path, state).read_bytes()
    legacy = save(tmp_path, state, _use_new_zipfile_serialization=False).read_bytes()
    for content, message in (
        (state | every_other, r"final_norm.scale \[2, 3\] is not stored row by row"),
        ({"a": torch.zeros(2)}, "it has no 2-dimensional embedder.input_embedding"),
        (no_attention, r"blocks.1 has no temporal block"),
        (whole[:-1000], "is truncated"),
        (b"Call me Ishmael.", "is not a torch checkpoint"),
        (legacy, "legacy format"),
        (whole.replace(b"ctorch._utils", b"\xfftorch._utils"), "is damaged: Bad CRC"),
    ):
        path = save(tmp_path, content)
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(RequestError, match=message) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


PICKLE = "model/data.pkl"
REWRITTEN = {
    "other function": (zipfile.ZIP_STORED, (b"torch._utils", b"torch._utilz"), "could run code"),
    "unknown opcode": (zipfile.ZIP_STORED, (b"ctorch", b"\xfftorch"), "opcode .* unknown"),
    "compressed": (zipfile.ZIP_DEFLATED, (b"", b""), "is compressed"),
    # the count of a storage of 16 bytes
    "storage too large": (zipfile.ZIP_STORED, (b"K\4tq", b"K\6tq"), "record 0 of 16 bytes is said"),
    "tensor too large": (zipfile.ZIP_STORED, (b"K\4\x85", b"K\6\x85"), "tensor a does not lie in"),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_rewritten_files(tmp_path, case):
    how, (old, new), message = REWRITTEN[case]
    path, target = save(tmp_path, {"a": torch.arange(4.0)}), tmp_path / "other.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as other:
        for name in source.namelist():
            content = source.read(name)
            assert name != PICKLE or old in content
            other.writestr(name, content.replace(old, new, 1) if name == PICKLE else content, how)
    with pytest.raises(RequestError, match=message):
        read_torch_file(target)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("view", [lambda array: array, lambda array: array.T])
def test_memory_of_reading_a_torch_file_does_not_depend_on_its_size(tmp_path, view):
    tensor = read_torch_file(save(tmp_path, {"a": torch.ones(4096, 8192)}))["a"]
    before = rss_bytes()
    for _, rows in tensor.rows(view).slabs(1 << 20):
        assert rss_bytes() - before < 32 << 20, "of 128 MiB"
        assert rows.all()


@pytest.mark.parametrize("turned", [False, True])
def test_views_of_a_torch_file(tmp_path, turned):
    """Both ways to store a matrix, in all views that a conversion takes."""
    matrix = np.arange(35, dtype=np.float32).reshape(5, 7)
    tensor = torch.from_numpy(matrix.T.copy()).T if turned else torch.from_numpy(matrix)
    branches = torch.arange(30.0).reshape(2, 3, 5)
    stored = read_torch_file(save(tmp_path, {"matrix": tensor, "branches": branches}))
    for view in (lambda x: x, lambda x: x.T, lambda x: x.T[:, None]):
        slabs = [slab for _, slab in stored["matrix"].rows(view).slabs(50)]
        np.testing.assert_array_equal(np.concatenate(slabs), view(matrix))
    for view in (lambda x: x, lambda x: x[1].T, lambda x: x[0, 0]):
        whole = stored["branches"].rows(view).whole()
        np.testing.assert_array_equal(whole, view(branches.numpy()))


SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=30)
@given(SHAPES, st.sampled_from(["float32", "float16"]), st.integers(1, 64))
def test_reads_what_the_reference_implementation_writes(tmp_path_factory, shapes, dtype, limit):
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    generator = np.random.default_rng(0)
    arrays = {f"t{i}": generator.random(s).astype(dtype) for i, s in enumerate(shapes)}
    path.write_bytes(safetensors_bytes(arrays))
    header = read_header(path)
    assert header.keys() == arrays.keys()
    for name, array in arrays.items():
        rows = entry_rows(header[name])
        assert rows.dtype == array.dtype
        np.testing.assert_array_equal(rows.whole(), array)
        slabs = [slab for _, slab in rows.slabs(limit)]
        np.testing.assert_array_equal(np.concatenate(slabs), array)


def test_reads_the_metadata(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(safetensors_bytes({"x": np.zeros(2, np.float32)}, {"words": "ä \n"}))
    assert read_metadata(path) == {"words": "ä \n"}
    path.write_bytes(content({"__metadata__": None, "a": tensor()}, bytes(8)))
    assert read_metadata(path) == {} and list(read_header(path)) == ["a"]


def content(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "not JSON": (content(b"{'a': 1}"), "header is not JSON"),
    "deep JSON": (content(b'{"a":' + b"[" * 100_000), "header is not JSON"),
    "twice": (content(b'{"a": {}, "a": {}}'), "names a field twice"),
    "metadata": (content({"__metadata__": {"a": 1}}), "__metadata__ is no object of texts"),
    "dtype": (content({"a": tensor("F31")}, bytes(8)), "tensor a has the unknown dtype 'F31'"),
    "shape": (content({"a": tensor(shape=[-2])}, bytes(8)), "shape.0. is -2"),
    "boolean shape": (content({"a": tensor(shape=[True, 2])}, bytes(8)), "shape.0. is True"),
    "length": (content({"a": tensor(offsets=(0, 4))}, bytes(4)), "spans 4 bytes; expected 8"),
    "overlap": (content({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "b overlaps"),
    "gap": (content({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)), "b leaves a gap"),
    "truncated": (content({"a": tensor()}, bytes(7)), "is truncated"),
    "too long": (content({"a": tensor()}, bytes(9)), "is damaged: it has"),
    "empty": (b"", "not a safetensors file"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "huge header": ((1 << 40).to_bytes(8, "little") + b"{}", "expected at most"),
    "truncated header": ((1 << 20).to_bytes(8, "little") + b"{}", "is truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_says_what_is_wrong_with_a_broken_file(tmp_path, case):
    broken, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(broken)
    with pytest.raises(RequestError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    gaps: list[str] = []
    if case == "gap":
        assert [*read_header(path, gaps)] == ["a", "b"]
        assert gaps == ["4 bytes of model.safetensors, in front of b, belong to no tensor"]


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    write_weights(tmp_path, {"a": from_array(np.zeros((8, 8), np.float32))})
    path = tmp_path / "model.safetensors"
    rows = entry_rows(read_header(path)["model.a"])
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(RequestError, match="it changed while it was read"):
        rows.whole()
