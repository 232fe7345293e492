"""What every test needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rgexport.cli import run
from tests.llama_tools import llama_tools
from tests.pairs import pairwise

__all__ = ["llama_tools"]  # a fixture for all


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-product",
        action="store_true",
        help="every combination of a test's parameters, not only as many as hold every pair",
    )


@pytest.hookimpl(tryfirst=True)  # before -k, so that a case is chosen or not whatever else runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("whole_product"):
        kept = pairwise(items)
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the memory of verified files out of the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model in int4, made by the command line."""
    target = tmp_path_factory.mktemp("demo") / "demo-int4-onnx"
    assert run(["onnx", "--size", "demo", "--int4", "-o", str(target)]) == 0
    return target
