"""Loads coremltools' protobuf messages without coremltools.

Importing `coremltools` takes seconds and 300 MB; its messages are loaded from its folder without.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from rgexport.errors import NotInstalled

_PACKAGE = "_rgexport_coreml_messages"
"""Name under which coremltools' folder of messages is imported."""


def messages(name: str) -> ModuleType:
    """Returns the module `NAME_pb2` of coremltools, such as `Model`; raises NotInstalled."""
    package = _message_package()
    return import_module(f"{package}.{name}_pb2")


@cache
def _message_package() -> str:
    """Makes the folder of messages importable, and returns the name of its package."""
    coremltools = _coremltools_spec()
    if coremltools is None or not coremltools.submodule_search_locations:
        raise NotInstalled(
            "reading a Core ML package needs coremltools: pip install 'rgexport[coreml]'"
        )

    folder = Path(coremltools.submodule_search_locations[0]) / "proto"
    spec = spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    sys.modules[_PACKAGE] = module_from_spec(spec)
    return _PACKAGE


def _coremltools_spec() -> ModuleSpec | None:
    try:
        return find_spec("coremltools")
    except ValueError:  # an entry of sys.modules that is None
        return None
