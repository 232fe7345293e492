"""Options, fixtures and the choice of cases for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from rgexport.cli import run
from tests.llama_tools import llama_tools
from tests.pairs import pairwise

__all__ = ["llama_tools"]  # a fixture for all

# On a busy machine every way of making inputs is slow.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-product",
        action="store_true",
        help="every combination of a test's parameters, not only as many as hold every pair; and "
        "tests that take many minutes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Gives each parallel test process its own processors.

    Engines start a busy thread for each processor that they may use: with twice as many threads as
    processors, everything takes several times as long.
    """
    worker = getattr(config, "workerinput", None)
    if worker is not None and hasattr(os, "sched_setaffinity"):  # Linux only
        index, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        own = sorted(os.sched_getaffinity(0))[index::count]
        if own:
            os.sched_setaffinity(0, own)


@pytest.hookimpl(tryfirst=True)  # before -k, so that a case is chosen or not whatever else runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("whole_product"):
        kept = [item for item in pairwise(items) if not item.get_closest_marker("thorough")]
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the hashes of verified files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model in int4, made by the command line."""
    target = tmp_path_factory.mktemp("demo") / "demo-int4-onnx"
    assert run(["onnx", "--size", "demo", "--int4", "-o", str(target)]) == 0
    return target
