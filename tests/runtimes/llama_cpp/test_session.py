"""llama.cpp's own sessions; see tests/runtimes/test_sessions.py."""

import importlib
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from rgexport.errors import NotInstalled, RequestError
from rgexport.griffin.state import POSITION, state_specs
from rgexport.runtimes.llama_cpp import library
from rgexport.runtimes.llama_cpp.library import load_model
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from rgexport.runtimes.llama_cpp.state import StateLayout, pack, unpack
from tests.artifacts import export_random_gguf
from tests.deepmind import deepmind_logits, deepmind_model
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.quantize.ggml_files import write_tensors
from tests.sessions import distance, random_tokens

pytestmark = needs_llama_cpp

FP32, FLASH = 1e-4, 5e-3
"""Largest |Δlogit| allowed, as a share of the largest |logit|. FLASH: llama.cpp's flash attention
rounds keys, values and queries to float16, and on a CPU sums values in float16."""


def opened(artifact, **options):
    """On one thread: small models take longer on several, most of all on a busy machine."""
    return LlamaCppSession(artifact, **({"threads": 1} | options))


@pytest.mark.parametrize(("flash", "limit"), [(False, FP32), (True, FLASH)])
@pytest.mark.parametrize("name", ["narrow_lru", "attention_tail", "one_head"])
def test_batches_of_any_size(name, flash, limit, tmp_path):
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 3, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for ubatch in (1, 7, 512):
        session = opened(artifact, ubatch=ubatch, flash_attention=flash)
        for batch in (3, 1):
            session.reset(batch)
            assert distance(session.prefill(tokens[:batch], 999), expected[:batch]) <= limit


def write_without(name, source, target):
    """Copies a GGUF file, but for one tensor."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "recurrentgemma")
    for field in reader.fields.values():
        if field.types and not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        if tensor.name != name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    write_tensors(writer, {})


def test_every_tensor_is_required(tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["irregular"], tmp_path)
    target = tmp_path / "copy.gguf"
    write_without(None, artifact.path, target)
    load_model(target)
    for tensor in GGUFReader(artifact.path).tensors:
        write_without(tensor.name, artifact.path, target)
        with pytest.raises(RequestError, match=tensor.name):
            load_model(target)


def test_there_is_no_last_token(tmp_path):
    """Many times what fits into llama.cpp's context, in chunks and token by token."""
    config = ODD_CONFIGS["irregular"]
    artifact, weights = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 2, 900)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = opened(artifact, ubatch=20)
    session.reset(2)
    assert session._open.capacity < 300
    assert distance(session.prefill(tokens[:, :700], 700), expected[:, :700]) <= FP32
    for column in range(700, 900):
        assert distance(session.step(tokens[:, column]), expected[:, column]) <= FP32


@pytest.mark.parametrize(
    ("kind", "cache", "flash"),
    [("f32", "float32", False), ("f16", "float16", False), ("q8_0", "float16", True)],
)
def test_precision_follows_the_weights(kind, cache, flash, tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path, kind)
    session = opened(artifact)
    state, info = session.get_state(), session.info
    assert state["layers.2.key"].dtype == cache and session._flash is flash
    assert (info.engine, info.threads) == ("llama.cpp", 1)
    stored = sum(p.nbytes for t in artifact.manifest.tensors.values() for p in t.parts.values())
    assert info.weight_bytes == stored
    assert info.state_bytes == sum(array.nbytes for array in state.values()) - 8
    tokens = random_tokens(ODD_CONFIGS["regular"], 1, 40)
    copied = opened(artifact, mmap=False).prefill(tokens, 40)
    np.testing.assert_array_equal(copied, session.prefill(tokens, 40))


def test_wrong_requests(tmp_path):
    session = opened(export_random_gguf(ODD_CONFIGS["regular"], tmp_path)[0])
    with pytest.raises(RequestError, match=r"llama.cpp takes 1 to 256"):
        session.reset(257)
    with pytest.raises(RequestError, match=r"2147483648 tokens; llama.cpp counts to"):
        session.set_state(session.get_state() | {POSITION: np.array([1 << 31])})
    assert session.prefill(np.array([[3, 4]])).shape == (1, 1, 256)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session.step(np.array([1]))


BUILD = "`rgexport llama-cpp build`"
OTHER = types.SimpleNamespace(__version__="0.3.99")


@pytest.mark.parametrize(
    ("loaded", "complaint"),
    [
        (ModuleNotFoundError(name="llama_cpp"), "takes llama-cpp-python, which is missing"),
        (FileNotFoundError("no library"), "cannot be loaded: no library"),
        (OTHER, r"is 0\.3\.99; this rgexport knows .*"),
    ],
)
def test_without_the_right_llama_cpp(loaded, complaint, monkeypatch):
    library.bindings.cache_clear()
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=[loaded] * 2))
    with pytest.raises(NotInstalled, match=f"{complaint}(;|:) {BUILD}"):
        load_model(Path("x.gguf"))


def test_stock_llama_cpp(tmp_path, capfd, monkeypatch):
    """What a stock one says of our files, this one says of those of an unknown architecture."""
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(artifact.path.read_bytes().replace(b"recurrentgemma", b"recurrentgemmb"))
    capfd.readouterr()
    with pytest.raises(RequestError, match=r"cannot load .*architecture: 'recurrentgemmb'$"):
        load_model(foreign)
    unknown = library._UNKNOWN_ARCHITECTURE.replace("gemma", "gemmb")
    monkeypatch.setattr(library, "_UNKNOWN_ARCHITECTURE", unknown)
    with pytest.raises(
        RequestError, match=rf"is stock and cannot run .*foreign.gguf .*; {BUILD} ins"
    ):
        load_model(foreign)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("cut", "old", "new", "complaint"),
    [
        (-9000, b"", b"", "not within the file bounds"),
        (None, b"GGUF", b"LLAM", "magic"),
        (None, b"blk.1.ssm_a", b"blk.1.ssm_b", "ssm_a"),
    ],
)
def test_damaged_file(cut, old, new, complaint, tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(artifact.path.read_bytes()[:cut].replace(old, new))
    pattern = f"^llama.cpp cannot load .*damaged.gguf: .*{complaint}.*$"  # in one line
    with pytest.raises(RequestError, match=pattern):
        load_model(damaged)


LAYOUT = StateLayout(ODD_CONFIGS["regular"], "float16", transposed=True, streams=1)


def test_a_state_in_another_layout_is_refused():
    """Whichever number is another one, and wherever the data end."""
    random = np.random.default_rng(0)
    state = {POSITION: np.array(40)}
    for spec in state_specs(LAYOUT.config, LAYOUT.cache_type):
        dtype = spec.dtype if spec.name.endswith(("key", "value")) else "float32"
        state[spec.name] = random.standard_normal(spec.shape).astype(dtype)
    data = pack(state, LAYOUT)
    for name, array in unpack(data, LAYOUT).items():
        np.testing.assert_array_equal(array, state[name])
    cells, row = 16, 2 * LAYOUT.config.head_dim
    keys = 16 + 12 * cells + 8
    values = keys + 12 + cells * row
    recurrent = values + 12 + cells * row
    wrong = [data[:end] for end in (0, 3, 20, 300, len(data) - 1)] + [data + bytes(4)]
    for at in (0, 8, 12, 20, 32, keys, keys + 4, values, values + 4, recurrent, recurrent + 24):
        wrong += [data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]]
    for damaged in wrong:
        with pytest.raises(RequestError, match=r"not laid out as .* (expected|cells in)"):
            unpack(damaged, LAYOUT)
    with pytest.raises(RequestError, match="do not follow one another"):
        unpack(data[:16] + bytes([data[16] ^ 0x40]) + data[17:], LAYOUT)
