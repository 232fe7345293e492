"""Compiles the native kernels for ONNX Runtime into wheels and editable installs.

Where that is impossible the package is installed without them and runs on ONNX Runtime's own.
"""

import importlib.util
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("rgexport/kernels/onnx")
NOT_BUILT = "not-built.txt"  # read by kernels/onnx/library.py
CMAKE, NINJA = "cmake>=3.18,<5", "ninja>=1.10,<2"


class NativeKernels(BuildHookInterface):
    """Runs CMake before a wheel is written."""

    def dependencies(self) -> list[str]:
        """What a build needs and the system lacks."""
        program = _load(Path(self.root) / KERNELS / "build.py").program
        missing = [] if program("cmake") else [CMAKE]
        has_runner = program("ninja") or program("make") or sys.platform == "win32"
        return missing if has_runner else [*missing, NINJA]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds in place for an editable install, else into a scratch folder."""
        root = Path(self.root)
        builder = _load(root / KERNELS / "build.py")
        editable = version == "editable"
        self._scratch = Path(mkdtemp(prefix="rgexport-"))
        folder = root / KERNELS if editable else self._scratch
        (root / KERNELS / NOT_BUILT).unlink(missing_ok=True)
        try:
            made = builder.build(folder, root / "build" / "native" if editable else None)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        except builder.BuildFailed as failed:
            self.app.display_warning(
                f"rgexport is installed without its native kernels and runs on ONNX Runtime's "
                f"own, slower: {failed}"
            )
            made = folder / NOT_BUILT
            made.write_text(f"{failed}\n")
        if not editable:
            build_data["force_include"][str(made)] = str(KERNELS / made.name)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self._scratch)


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """The platform in a wheel's name, as pip of this interpreter accepts it."""
    name = sysconfig.get_platform()
    if name.startswith("macosx"):  # the interpreter may be for two processors, the library is not
        name = f"{name.rsplit('-', 1)[0]}-{platform.machine()}"
    return name.replace("-", "_").replace(".", "_")
