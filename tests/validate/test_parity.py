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


def test_precision_costs_what_it_should(clean: Clean, checkpoint: Path) -> None:
    cost = {}
    for kind in ("fp32", "fp16", "int8", "int4-exact"):
        original = validate_artifact(
            clean(kind), Request(model=str(checkpoint), max_tokens=40)
        ).original
        assert original is not None
        cost[kind] = original.kl.mean
    assert cost["fp32"] < 1e-9 < cost["fp16"] < 1e-5 < cost["int8"] < 1e-2 < cost["int4-exact"]


@pytest.mark.parametrize(
    "config", [{"soft_cap": 25.0}, {"rope_theta": 20_000.0}, {"rms_eps": 1e-2}]
)
def test_a_graph_that_differs_from_its_manifest_fails(spoil: Spoil, config: dict[str, Any]) -> None:
    result = validate_artifact(spoil("fp32", config=config))
    assert "twin.logits" in failed(result)
    assert result.verdict == "FAIL"


def test_without_the_original(clean: Clean) -> None:
    result = validate_artifact(clean("int4"))
    assert result.verdict == "PASS"
    assert result.original is None and result.weights is None and not result.source.found
    assert result.source.made_from == "original"


def test_another_model_of_the_same_shape_is_compared(clean: Clean, tmp_path: Path) -> None:
    cousin = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300, window=20)
    folder = write_hugging_face(cousin, random_weights(cousin, seed=1), tmp_path / "cousin")
    result = validate_artifact(clean("fp32"), Request(model=str(folder), max_tokens=60))
    assert result.source.same_files is False
    assert result.source.config_differences == ("window: 16 → 20",)
    assert {"original.rms"} < set(failed(result))
    assert "twin.logits" not in failed(result)


def test_a_model_of_another_shape_is_refused(clean: Clean, tmp_path: Path) -> None:
    other = make_config("rra", width=64, heads=4, lru_width=128, vocab_size=300)
    folder = write_hugging_face(other, random_weights(other), tmp_path / "other")
    with pytest.raises(RequestError, match=r"linear_y.weight has shape \[96, 64\]"):
        validate_artifact(clean("fp32"), Request(model=str(folder)))


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


def test_an_unknown_device(clean: Clean) -> None:
    with pytest.raises(RequestError, match="torch cannot use the device 'abacus'"):
        validate_artifact(clean("fp32"), Request(device="abacus"))
