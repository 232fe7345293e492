"""Sites as the engines have them: sound artifacts are within their limits, faults have names."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rgexport.export.artifact import Artifact
from rgexport.griffin.config import GriffinConfig
from rgexport.runtimes.engine import open_session
from rgexport.validate.bisect.sites import SiteReport, look_at_sites
from tests.artifacts import export_random, export_random_coreml, export_random_gguf, require_ggml
from tests.models import make_config

CONFIG = make_config("rra", width=96, heads=4, lru_width=64, mlp_width=128, vocab_size=300)
TOKENS = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 70)
FORMATS: dict[str, Callable[..., tuple[Artifact, object]]] = {
    "onnx": export_random,
    "coreml": export_random_coreml,
    "gguf": export_random_gguf,
}
KINDS = {
    "onnx": ("fp32", "fp16", "int4"),
    "coreml": ("fp32", "fp16", "int4"),
    "gguf": ("f32", "f16", "q4_0"),
}
FAULTS = {
    "soft_cap": 0.0,
    "embedding_scale": CONFIG.width**0.5,
    "rope_dims": CONFIG.head_dim,
    "window": CONFIG.window - 1,
}
"""The reference's: the artifact then looks as if it had the opposite faults, all at once."""
NAMED = {
    "embed_tokens",
    "layers.2.temporal_block.rope_q",
    "layers.2.temporal_block.rope_k",
    "layers.2.temporal_block.attention",
    "logits",
}


@pytest.fixture(
    scope="module", params=[(kind, word) for kind, words in KINDS.items() for word in words]
)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One of each kind and precision."""
    kind, word = request.param
    if kind == "gguf" and word.startswith("q"):
        require_ggml()
    options = {"prefill_length": 8} if kind == "coreml" else {}
    folder: Path = tmp_path_factory.mktemp(kind)
    return FORMATS[kind](CONFIG, folder, word, slowest=1e-5, **options)[0]


def look(artifact: Artifact, config: GriffinConfig) -> SiteReport:
    """From a state behind some windows."""
    session = open_session(artifact)
    session.prefill(TOKENS[None, :60])
    return look_at_sites(artifact, config, session.get_state(), TOKENS, "cpu")


def test_a_sound_artifact_is_within_every_limit(artifact):
    report = look(artifact, artifact.manifest.config)
    assert [(e.site, e.state, e.excess) for e in report.beyond] == []
    assert report.first is None
    lengths = sorted({e.length for e in report.errors})
    assert lengths[0] == 1 and len(lengths) > 1
    seen = {e.site for e in report.errors}
    assert {"embed_tokens", "logits"} | {f"layers.{i}.mlp_block.mul" for i in range(3)} <= seen
    assert all(site.endswith((".gelu", "last_tokens")) for site in report.unseen)


def test_faults_are_named_and_do_not_spread(artifact):
    report = look(artifact, dataclasses.replace(CONFIG, **FAULTS))
    assert {e.site for e in report.beyond} == NAMED
    assert report.first is not None
    assert report.first.site == "embed_tokens"
