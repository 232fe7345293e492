import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.griffin.layout import model_tensors
from rgexport.validate.opening import Request
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
from tests.models import make_config, random_weights, write_hugging_face
from tests.validate.conftest import CONFIG, KINDS

Clean = Callable[[str], Path]
Spoil = Callable[..., Path]


def failed(result: Result) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


COSTS = {"fp32": 0, "fp16": 1e-9, "int8": 1e-5, "int4": 1e-2, "int4-exact": 1e-2}
"""Kind → the least KL that it costs; the next kind's is the most."""


@pytest.mark.parametrize("kind", KINDS)
def test_clean_artifacts_pass(clean: Clean, checkpoint: Path, kind: str) -> None:
    result = validate_artifact(clean(kind), Request(model=str(checkpoint)))
    assert failed(result) == [] and result.verdict == "PASS"
    assert result.source.found and result.source.same_files
    assert result.text.windows > 4
    assert result.weights is not None
    assert [error.name for error in result.weights] == list(model_tensors(CONFIG))
    assert result.original is not None
    assert result.original.kl.mean >= 0.9 * result.twin.kl.mean
    least, most = COSTS[kind], min((c for c in COSTS.values() if c > COSTS[kind]), default=1)
    assert least <= result.original.kl.mean < most


def test_without_the_original(clean: Clean) -> None:
    result = validate_artifact(clean("int4"))
    assert result.verdict == "PASS"
    assert result.original is None and result.weights is None and not result.source.found
    assert result.source.made_from == "original"


@pytest.mark.parametrize(
    "config", [{"soft_cap": 25.0}, {"rope_theta": 20_000.0}, {"rms_eps": 1e-2}]
)
def test_a_graph_that_differs_from_its_manifest_fails(spoil: Spoil, config: dict[str, Any]) -> None:
    result = validate_artifact(spoil("fp32", config=config))
    assert "twin.logits" in failed(result)
    assert result.verdict == "FAIL"


def test_another_model_of_the_same_shape_is_compared(clean: Clean, tmp_path: Path) -> None:
    cousin = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300, window=20)
    folder = write_hugging_face(cousin, random_weights(cousin, seed=1), tmp_path / "cousin")
    result = validate_artifact(clean("fp32"), Request(model=str(folder), max_tokens=60))
    assert result.source.same_files is False
    assert result.source.config_differences == ("window: 16 → 20",)
    assert {"original.rms"} < set(failed(result))
    assert "twin.logits" not in failed(result)


def test_without_torch(clean: Clean, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(RequestError, match=r"needs torch .* 'rgexport\[export\]'"):
        validate_artifact(clean("fp32"))
