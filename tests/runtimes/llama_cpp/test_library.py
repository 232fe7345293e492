"""The library's errors in one line, and its memory."""

import importlib
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from rgexport.errors import NotInstalled, RequestError
from rgexport.runtimes.llama_cpp import library
from rgexport.runtimes.llama_cpp.library import Handle, load_model
from tests.artifacts import export_random_gguf
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS

BUILD = "`rgexport llama-cpp build`"


OTHER = types.SimpleNamespace(__version__="0.3.99")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (ModuleNotFoundError(name="llama_cpp"), "takes llama-cpp-python, which is missing"),
        (FileNotFoundError("no library"), "cannot be loaded: no library"),
        (RuntimeError("GLIBC"), "cannot be loaded: GLIBC"),
        (AttributeError("symbol"), "cannot be loaded: symbol"),
        (OTHER, r"is 0\.3\.99; this rgexport knows .*"),
    ],
)
def test_without_the_right_llama_cpp(
    found: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        if isinstance(found, Exception):
            raise found
        return found

    library.bindings.cache_clear()
    monkeypatch.setattr(importlib, "import_module", find)
    with pytest.raises(NotInstalled, match=f"{said}; {BUILD}|{said}: {BUILD}"):
        load_model(Path("x.gguf"))


@needs_llama_cpp
def test_stock_llama_cpp(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stock one says of our files, this one says of those of an unknown architecture."""
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(artifact.path.read_bytes().replace(b"recurrentgemma", b"recurrentgemmb"))
    capfd.readouterr()
    with pytest.raises(RequestError, match=r"cannot load .*architecture: 'recurrentgemmb'$"):
        load_model(foreign)
    unknown = library._UNKNOWN_ARCHITECTURE.replace("gemma", "gemmb")
    monkeypatch.setattr(library, "_UNKNOWN_ARCHITECTURE", unknown)
    with pytest.raises(RequestError, match=r"is a stock one, which cannot run .*foreign.gguf") as e:
        load_model(foreign)
    assert str(e.value).endswith(f"; {BUILD} installs the one that runs RecurrentGemma")
    assert capfd.readouterr() == ("", "")


@needs_llama_cpp
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: b"", "magic"),
        (lambda data: data[:-9000], "not within the file bounds"),
        (lambda data: data.replace(b"blk.1.ssm_a", b"blk.1.ssm_b"), "ssm_a"),
    ],
    ids=["empty", "truncated", "misnamed"],
)
def test_damaged_file(damage: Callable[[bytes], bytes], complaint: str, tmp_path: Path) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(damage(artifact.path.read_bytes()))
    with pytest.raises(RequestError, match=r"llama.cpp cannot load .*damaged.gguf: ") as error:
        load_model(damaged)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_handles_free_once_and_in_order() -> None:
    freed: list[str] = []
    model = Handle("model", freed.append)
    context = Handle("context", freed.append, keep=model)
    del model
    assert freed == []
    context.close()
    context.close()
    assert freed == ["context"]
    del context
    assert freed == ["context", "model"]


@needs_llama_cpp
def test_an_interrupt_during_a_log_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised after the call into C, which cannot pass it on."""
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    capfd.readouterr()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(library.progress, "detail", interrupt)
        load_model(artifact.path)
    assert capfd.readouterr() == ("", "")
    load_model(artifact.path).close()
