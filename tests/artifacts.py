"""Artifacts of small random models, made by the exporter."""

import functools
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import onnx
import pytest

import rgexport
from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.schemes.ggml_library import load_library
from tests.built import digest_of, filled
from tests.models import Weights, random_weights, write_hugging_face

Made = tuple[Artifact, Weights]
IS_PATCHED = ContextVar("IS_PATCHED", default=False)
"""Whether the test that runs has the fixture `monkeypatch`."""


def export_random(
    config: GriffinConfig, folder: Path, precision: str | None = "fp32", *, slowest=1e-4, **options
) -> Made:
    """Exports a random model of shape `config`; returns the artifact and the original weights.

    By a `plan` among the options, the precision is None.
    """
    asked = OnnxOptions(precision=precision, **options)
    return _made(config, _target(folder, precision, options), slowest, export_onnx, asked)


def export_random_coreml(
    config: GriffinConfig, folder: Path, precision: str | None = "fp32", *, slowest=1e-4, **options
) -> Made:
    pytest.importorskip("coremltools")
    asked = CoreMLOptions(precision=precision, **options)
    target = _target(folder, f"{precision or 'plan'}-coreml", options)
    return _made(config, target, slowest, export_coreml, asked)


def export_random_gguf(
    config: GriffinConfig, folder: Path, type: str = "f32", *, slowest: float = 1e-4, **options: Any
) -> Made:
    """The same as a GGUF file of a file type such as `q4_0`."""
    asked = GgufOptions(type=type, **options)
    target = folder / "-".join([f"{type}.gguf", *options])
    return _made(config, target, slowest, export_gguf, asked)


def _target(folder: Path, precision: str | None, options: dict[str, Any]) -> Path:
    """A folder of a name of its own for each of the options, but for a plan."""
    words = (f"{k}={v}" for k, v in options.items() if k != "plan")
    return folder / "-".join([precision or "plan", *words])


def _made(
    config: GriffinConfig, target: Path, slowest: float, export: Callable[..., Path], asked: Any
) -> Made:
    weights = random_weights(config, slowest=slowest)
    model = target.parent / "model"
    if not model.exists():
        write_hugging_face(config, weights, model)

    def make(artifact: Path) -> None:
        export(open_checkpoint(model), asked, artifact)

    if not target.exists():
        if any(isinstance(value, Path) for value in vars(asked).values()):
            make(target)  # no key tells what is in a file
        else:
            copy_cached(f"{export.__name__} {config} {slowest} {asked}", make, target)
    return open_artifact(target), weights


def export_demo(target: Path, *options: str) -> None:
    """Exports the demo by the command line, such as with the options `onnx --int4`."""
    arguments = [*options, "--size", "demo", "-o"]

    def export(artifact: Path) -> None:
        assert run([*arguments, str(artifact)]) == 0

    copy_cached(" ".join(arguments), export, target)


def copy_cached(key: str, export: Callable[[Path], object], target: Path) -> None:
    """Copies an artifact, which is exported once for all tests, so that a test may change it.

    Tests that may patch the exporter get an export of their own.

    Args:
        key: tells all options of the export.
        export: writes the artifact.
        target: where the copy goes.
    """
    if IS_PATCHED.get():
        export(target)
        return
    name = f"export-{digest_of([], key, target.name)}"
    folder = filled(name, _digest_of_exporter(), lambda new: export(new / target.name))
    cached = folder / target.name
    if cached.is_file():
        shutil.copyfile(cached, target)
    else:
        shutil.copytree(cached, target)


@functools.cache
def _digest_of_exporter() -> str:
    """Returns a hash of what an export depends on beside its options."""
    package, tests = Path(rgexport.__file__).parent, Path(__file__).parent
    demo = tests.parent / "demo" / "model"
    sources = [*package.rglob("*.py"), *package.rglob("*.so"), *demo.iterdir(), tests / "models.py"]
    versions = sorted(f"{package.name} {package.version}" for package in distributions())
    return digest_of(sorted(sources), *versions)


def load_graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)


def require_ggml() -> None:
    """Skips a test that quantizes for llama.cpp, where the library for it is not installed."""
    pytest.importorskip("llama_cpp")
    load_library()
