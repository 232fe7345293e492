"""Core ML's protobuf messages, as coremltools generated them from Apple's schema.

Importing `coremltools` takes seconds and 300 MB, since it loads its converters, and torch if that
is installed. Its messages need neither, so they are loaded by themselves from its folder.
`tests/export/mil/test_package.py` fails if a release moves them.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from rgexport.errors import NotInstalled

_ALONE = "_rgexport_coreml_messages"
"""The name under which the package of messages is loaded."""


def messages(name: str) -> ModuleType:
    """The module `NAME_pb2`, such as `Model` or `MIL`.

    Raises:
        NotInstalled: coremltools is missing.
    """
    return import_module(f"{_package()}.{name}_pb2")


@cache
def _package() -> str:
    folder = _folder()
    spec = spec_from_file_location(
        _ALONE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    sys.modules[_ALONE] = module_from_spec(spec)
    return _ALONE


def _folder() -> Path:
    try:
        spec = find_spec("coremltools")
    except ValueError:  # an entry of sys.modules that is None
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalled(
            "reading a Core ML package needs coremltools: pip install 'rgexport[coreml]'"
        )
    return Path(spec.submodule_search_locations[0]) / "proto"
