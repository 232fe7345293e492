"""Options, fixtures and the choice of cases for all tests."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import tests.processors  # noqa: F401  # before torch is imported, which counts them

# isort: split
from tests.artifacts import IS_PATCHED, export_demo
from tests.llama_tools import llama_tools, needs_llama_cpp
from tests.pairs import pairwise
from tests.skips import ExpectedSkips

__all__ = ["llama_tools"]  # a fixture for all

FOLDERS_OF_FULL = {"web_page", "npm", "kernels/llama_cpp", "runtimes/llama_cpp", "fuzz"}
"""Folders whose tests are all marked `full`."""
MODULE_OF_FULL = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.(full|nightly)\b", re.MULTILINE)

# On a busy machine everything is slow: making inputs, and the tests themselves.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-product",
        action="store_true",
        help="every combination of a test's parameters, not only as many as hold every pair",
    )
    parser.addoption(
        "--expected-skips", type=Path, metavar="FILE", help="other skips fail; see tests/skips.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    expected = config.getoption("expected_skips")
    if expected and not hasattr(config, "workerinput"):  # a parallel process tells this one
        config.pluginmanager.register(ExpectedSkips(expected))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out modules whose tests are all `full`, where those are: they import more packages."""
    if "not full" not in config.getoption("markexpr"):
        return None
    if collection_path.suffix != ".py":
        return _folder(collection_path / "any") in FOLDERS_OF_FULL or None
    return MODULE_OF_FULL.search(collection_path.read_text("utf-8")) is not None or None


@pytest.hookimpl(tryfirst=True)  # before -k, so that a case is chosen or not whatever else runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # What `make test` does not install: Node or llama.cpp.
        if _folder(item.path) in FOLDERS_OF_FULL or needs_llama_cpp.mark in item.iter_markers():
            item.add_marker(pytest.mark.full)
        if "llama_tools" in item.fixturenames:  # to compile them takes minutes
            item.add_marker(pytest.mark.nightly)
    if not config.getoption("whole_product"):
        kept = pairwise(items)
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tells `copy_cached` whether the test may patch the exporter."""
    IS_PATCHED.set("monkeypatch" in item.fixturenames)


def _folder(path: Path) -> str:
    tests = Path(__file__).parent
    return path.parent.relative_to(tests).as_posix() if tests in path.parents else ""


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the hashes of verified files out of the user's cache, and reads no user's defaults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGEXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RGEXPORT_CONFIG", "")
        yield


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model in int4, made by the command line."""
    target = tmp_path_factory.mktemp("demo") / "demo-int4-onnx"
    export_demo(target, "onnx", "--int4")
    return target
