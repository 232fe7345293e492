"""Loads the llama.cpp of llama-cpp-python and its models, and receives its log."""

import contextlib
import functools
import importlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rgexport import progress
from rgexport.artifacts.gguf.naming import ARCHITECTURE
from rgexport.errors import NotInstalled, RequestError
from rgexport.kernels.llama_cpp import port
from rgexport.runtimes.huge_pages import huge_pages

REMEDY = f"`{port.BUILD_COMMAND}` installs the one that runs RecurrentGemma"
_UNKNOWN_ARCHITECTURE = f"unknown model architecture: '{ARCHITECTURE}'"
_ERROR, _CONTINUED = 4, 5  # levels of `enum ggml_log_level` (ggml.h)


@functools.cache
def bindings() -> Any:
    """Returns the low-level bindings, `llama_cpp.llama_cpp`; llama.cpp then logs to `-v`."""
    try:
        package = importlib.import_module("llama_cpp")
        module = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llama_cpp":
            raise
        raise NotInstalled(
            f"a GGUF file takes {port.DISTRIBUTION}, which is missing; {REMEDY}"
        ) from None
    except (OSError, RuntimeError, AttributeError) as error:  # a library missing, broken, or old
        raise NotInstalled(f"llama-cpp-python cannot be loaded: {error}; {REMEDY}") from None
    if package.__version__.partition("+")[0] != port.RELEASE:
        known = f"this rgexport knows {port.RELEASE}: {REMEDY}"
        raise NotInstalled(f"llama-cpp-python is {package.__version__}; {known}")
    _log.receive_from(module)
    module.llama_backend_init()
    return module


def version() -> str:
    number = bindings().llama_version().decode()
    package = importlib.import_module("llama_cpp").__version__
    return f"{number} ({port.DISTRIBUTION} {package})"


class _Log:
    def __init__(self) -> None:
        self.errors: list[str] = []
        self.interrupted, self._level, self._line = False, 0, ""
        self._callback: Any = None

    def receive_from(self, module: Any) -> None:
        self._callback = module.llama_log_callback(self._receive)
        module.llama_log_set(self._callback, None)

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        try:
            self._level = self._level if level == _CONTINUED else level
            *lines, self._line = (self._line + text.decode("utf-8", "replace")).split("\n")
            for line in filter(None, map(str.strip, lines)):
                progress.detail(f"llama.cpp: {line}")
                if self._level == _ERROR:
                    self.errors.append(line)
        except KeyboardInterrupt:  # C cannot pass it on: `logged` raises it afterwards
            self.interrupted = True
        except Exception:
            self._line = ""


_log = _Log()


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Surrounds a call of llama.cpp: clears earlier errors, and raises a Ctrl-C during the call."""
    _log.errors.clear()
    yield
    if _log.interrupted:
        _log.interrupted = False
        raise KeyboardInterrupt


def complaint() -> str:
    """Returns the first error of the last `logged` call, without the function's name."""
    first = next(iter(_log.errors), "it does not say why")
    return first.split(": ", 1)[-1] if first.split(":")[0].isidentifier() else first


class Handle:
    """A C pointer, or none, that is freed when the handle is closed or collected."""

    def __init__(self, pointer: Any, free: Callable[[Any], None], keep: Any = None) -> None:
        self.pointer = pointer
        self._keep = keep
        self._finalizer = weakref.finalize(self, free, pointer) if pointer else None

    def close(self) -> None:
        if self._finalizer:
            self._finalizer()


def load_model(
    path: Path,
    *,
    vocab_only: bool = False,
    mmap: bool = True,
    metadata: Mapping[str, int] | None = None,
) -> Handle:
    """Loads a .gguf file, or its vocabulary; `metadata` replaces its integers."""
    llama = bindings()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = vocab_only
    if metadata:
        overrides = (llama.llama_model_kv_override * (len(metadata) + 1))()
        for entry, (key, value) in zip(overrides, metadata.items(), strict=False):
            entry.tag, entry.key = llama.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
            entry.value.val_i64 = value
        parameters.kv_overrides = overrides
    parameters.load_mode = llama.LLAMA_LOAD_MODE_AUTO if mmap else llama.LLAMA_LOAD_MODE_NONE
    with logged(), huge_pages() as advice:

        def free(pointer: Any) -> None:
            advice.stop()
            llama.llama_model_free(pointer)

        model = Handle(llama.llama_model_load_from_file(os.fsencode(path), parameters), free)
    if model.pointer:
        return model
    reason = complaint()
    if _UNKNOWN_ARCHITECTURE in reason:
        raise NotInstalled(
            f"the installed llama-cpp-python is stock and cannot run {path} ({reason}); {REMEDY}"
        )
    raise RequestError(f"llama.cpp cannot load {path}: {reason}")
