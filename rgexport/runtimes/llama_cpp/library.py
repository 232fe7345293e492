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
from rgexport.errors import NotInstalled, RequestError
from rgexport.export.gguf.naming import ARCHITECTURE
from rgexport.kernels.llama_cpp import port
from rgexport.runtimes.huge_pages import BackgroundAdvice, huge_pages

REMEDY = f"`{port.BUILD_COMMAND}` installs the one that runs RecurrentGemma"
_UNKNOWN_ARCHITECTURE = f"unknown model architecture: '{ARCHITECTURE}'"
_ERROR, _CONTINUED = 4, 5
"""Of `enum ggml_log_level` (ggml.h)."""


@functools.cache
def bindings() -> Any:
    """Returns the low-level bindings, `llama_cpp.llama_cpp`; llama.cpp then logs to `-v`.

    Raises:
        NotInstalled: llama-cpp-python is missing, cannot be loaded, or is another release than the
            one whose structures and states we know.
    """
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
        raise NotInstalled(
            f"llama-cpp-python is {package.__version__}; this rgexport knows {port.RELEASE}: "
            f"{REMEDY}"
        )
    _log.receive_from(module)
    module.llama_backend_init()
    return module


def version() -> str:
    number = bindings().llama_version().decode()
    package = importlib.import_module("llama_cpp").__version__
    return f"{number} ({port.DISTRIBUTION} {package})"


class _Log:
    """Receives llama.cpp's log, which arrives in pieces of lines."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.interrupted = False
        self._level = 0
        self._line = ""
        self._callback: Any = None

    def receive_from(self, module: Any) -> None:
        """Makes llama.cpp log here; the callback must live as long as the library."""
        self._callback = module.llama_log_callback(self._receive)
        module.llama_log_set(self._callback, None)

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        try:
            self._take(level, text.decode("utf-8", "replace"))
        except KeyboardInterrupt:  # C cannot pass it on: `logged` raises it afterwards
            self.interrupted = True
        except Exception:
            self._line = ""

    def _take(self, level: int, text: str) -> None:
        self._level = self._level if level == _CONTINUED else level
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(None, map(str.strip, lines)):
            progress.detail(f"llama.cpp: {line}")
            if self._level == _ERROR:
                self.errors.append(line)


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
    """Returns the first error that the last `logged` call logged, without the function's name.

    The first line is nearest to the cause.
    """
    first = next(iter(_log.errors), "it does not say why")
    return first.split(": ", 1)[-1] if first.split(":")[0].isidentifier() else first


class Handle:
    """A C pointer, or none, that is freed when the handle is closed or collected.

    The handle keeps `keep` alive until then.
    """

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
    """Loads a .gguf file: all of it, or its metadata and vocabulary.

    `metadata` are numbers and flags that replace those of the file.

    Raises:
        NotInstalled: it is a stock llama.cpp, which does not know the architecture.
        RequestError: it cannot load the file.
    """
    llama = bindings()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = vocab_only
    overrides = _overrides(metadata or {})
    parameters.kv_overrides = overrides
    parameters.load_mode = llama.LLAMA_LOAD_MODE_AUTO if mmap else llama.LLAMA_LOAD_MODE_NONE
    advised = contextlib.nullcontext(BackgroundAdvice()) if vocab_only else huge_pages()
    with logged(), advised as advice:

        def free(pointer: Any) -> None:
            advice.stop()
            llama.llama_model_free(pointer)

        model = Handle(llama.llama_model_load_from_file(os.fsencode(path), parameters), free)
    if model.pointer:
        return model
    reason = complaint()
    if _UNKNOWN_ARCHITECTURE in reason:
        raise NotInstalled(
            f"the installed llama-cpp-python is a stock one, which cannot run {path} "
            f"({reason}); {REMEDY}"
        )
    raise RequestError(f"llama.cpp cannot load {path}: {reason}")


def _overrides(metadata: Mapping[str, int]) -> Any:
    """Returns an array for `kv_overrides`, which ends with an empty key; None if it is empty."""
    llama = bindings()
    if not metadata:
        return None
    array = (llama.llama_model_kv_override * (len(metadata) + 1))()
    for entry, (key, value) in zip(array, metadata.items(), strict=False):
        kind, field = ("BOOL", "val_bool") if isinstance(value, bool) else ("INT", "val_i64")
        entry.tag = getattr(llama, f"LLAMA_KV_OVERRIDE_TYPE_{kind}")
        entry.key = key.encode()
        setattr(entry.value, field, value)
    return array
