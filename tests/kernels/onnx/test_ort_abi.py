"""`ort_abi.h` against ONNX Runtime's own C header.

The wheel has no header, so that of the installed release comes from its tag on GitHub into `out/`.
Only its text is compared: nothing of it is compiled. Without a network the tests skip; other
releases are run by `test_other_versions.py`.
"""

import re
import urllib.request
from pathlib import Path

import onnxruntime
import pytest

from rgexport.kernels.onnx import library
from tests.command_line import ROOT

OURS = (library.FOLDER / "src" / "ort_abi.h").read_text()
HEADER = ROOT / "out" / f"onnxruntime_c_api-{onnxruntime.__version__}.h"
URL = (
    f"https://raw.githubusercontent.com/microsoft/onnxruntime/v{onnxruntime.__version__}"
    "/include/onnxruntime/core/session/onnxruntime_c_api.h"
)
FUNCTION = r"\(\s*(?:ORT_API_CALL\s*)?\*\s*(\w+)\)\s*\("
"""A field that points to a function; its name."""


def fetched(path: Path) -> str:
    """The header, which is downloaded if it is not there."""
    if not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=20) as answer:
                text = answer.read()
        except OSError as error:
            pytest.skip(f"{URL} cannot be fetched: {error}")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
    return path.read_text()


@pytest.fixture(scope="module")
def theirs() -> str:
    return without_comments(fetched(HEADER))


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)


def body(text: str, opening: str) -> str:
    return re.search(rf"{opening} \{{(.*?)\n?\}};", text, re.S)[1]


def values(text: str, opening: str) -> dict[str, int]:
    """Names of our enumerations, without the `k`, and their numbers."""
    return {name: int(at) for name, at in re.findall(r"k(\w+) = (\d+)", body(text, opening))}


def api_functions(text: str) -> list[str]:
    """The table of functions, in its order."""
    ways = rf"ORT_API2_STATUS\((\w+)|ORT_CLASS_RELEASE\((\w+)\)|{FUNCTION}"
    found = re.findall(ways, body(text, "struct OrtApi"))
    return [plain or (f"Release{freed}" if freed else other) for plain, freed, other in found]


def test_slots_are_those_of_the_table(theirs: str) -> None:
    table = api_functions(theirs)
    slots = values(OURS, "enum Slot : size_t")
    assert len(slots) > 10
    assert slots == {name: table.index(name) for name in slots}


def test_a_custom_op_has_the_same_fields_in_the_same_order(theirs: str) -> None:
    ours = re.findall(FUNCTION, body(without_comments(OURS), "struct CustomOp"))
    fields = re.findall(FUNCTION, body(theirs, "struct OrtCustomOp"))
    assert len(ours) > 10 and ours == fields[: len(ours)]


def test_element_types_have_their_numbers(theirs: str) -> None:
    names = re.findall(r"ONNX_TENSOR_ELEMENT_DATA_TYPE_(\w+)", theirs)
    found = {name.upper(): at for name, at in values(OURS, "enum ElementType : int").items()}
    assert found == {name: names.index(name) for name in found}


def test_the_table_is_as_old_as_we_ask_for(theirs: str) -> None:
    asked = int(re.search(r"kApiVersion = (\d+)", OURS)[1])
    assert asked <= int(re.search(r"#define ORT_API_VERSION (\d+)", theirs)[1])
