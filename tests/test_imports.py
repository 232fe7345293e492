"""Each floor imports only from the floors before it, and the core needs no torch.

Checked on the syntax trees, so that imports inside functions count, too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rgexport

PACKAGE = Path(rgexport.__file__).parent
FACE = PACKAGE / "__init__.py"
"""Gives `rgexport.load` when it is asked for."""
MODULES = sorted({*PACKAGE.rglob("*.py")} - {FACE})
FLOORS = (
    *("griffin", "kernels", "quantize", "export", "runtimes", "chat", "serve", "page"),
    *("validate", "evaluate", "compress", "commands", "cli"),
)
ANYWHERE = {
    *(
        "errors",
        "files",
        "formats",
        "printing",
        "processors",
        "progress",
        "tables",
        "web",
        "__init__",
    ),
}
"""What every floor may import."""

NEEDS_TORCH = {
    "griffin/ops.py",
    "griffin/gradients.py",
    "griffin/scan.py",
    "griffin/triton_scan.py",
    "griffin/step.py",
    "griffin/reference.py",
    "griffin/substitution.py",
    "griffin/variants.py",
    "compress/measure.py",
    "export/trace.py",
    "compress/backward.py",
    "compress/grams.py",
    "compress/head.py",
    "compress/statistics.py",
    "evaluate/reference_session.py",
    "validate/reference/whole_model.py",
    "validate/reference/deepmind_model.py",
    "validate/reference/hugging_face_model.py",
}
CONVERTERS = {"torch": NEEDS_TORCH, "onnx": set(), "onnx_ir": set(), "coremltools": set()}
EMITTERS = "export/onnx/", "export/coreml/"
"""Folders whose modules load a converter; those that the core needs of them do it when called."""

APART_FROM_THE_EMITTER = "export/mil/", "runtimes/coreml/interpreter/"
"""These check the emitter, so they must not share its code."""


def name_of(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def floor_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_on_load(module: Path) -> set[str]:
    """What a module imports when it is loaded: not in functions, not for type checkers."""
    return set(names_on_load(ast.parse(module.read_text())))


def names_on_load(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from names_on_load(node)
        elif not isinstance(node, ast.FunctionDef) and not is_type_checking(node):
            yield from imports(node)


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def floors_for(module: Path) -> set[str]:
    """What a module may import of our own."""
    floor = floor_of(module)
    return ANYWHERE | ({*FLOORS[: FLOORS.index(floor) + 1]} if floor in FLOORS else set())


def test_imports_go_one_way():
    assert MODULES
    wrong = [
        f"{name_of(module)} imports {name}"
        for module in MODULES
        for name in imports(ast.parse(module.read_text()))
        if name.split(".")[0] == "rgexport" and name != "rgexport.__version__"
        if name.removeprefix("rgexport.").split(".")[0] not in floors_for(module)
    ]
    assert wrong == []


def test_the_face_loads_nothing():
    assert imports_on_load(FACE) == {"os", "typing.TYPE_CHECKING", "typing.Any"}


def test_converters_are_fenced():
    outside = [module for module in MODULES if not name_of(module).startswith(EMITTERS)]
    wrong = [
        f"{name_of(module)} imports {name}"
        for module in outside
        for name in imports_on_load(module)
        if name_of(module) not in CONVERTERS.get(name.split(".")[0], {name_of(module)})
    ]
    assert outside and wrong == []


@pytest.mark.parametrize("folder", APART_FROM_THE_EMITTER)
def test_readers_of_packages_share_nothing_with_the_emitter(folder):
    modules = [module for module in MODULES if name_of(module).startswith(folder)]
    assert modules
    for module in modules:
        for name in imports(ast.parse(module.read_text())):
            assert not name.startswith("rgexport.export.coreml"), f"{module} imports {name}"


ERRORS = {"rgexport.errors.RequestError", "rgexport.errors.one_line"}
PRINTING = {"rgexport.printing.print_result", "rgexport.printing.print_reply"}


def test_command_line_loads_nothing_but_click():
    modules = PACKAGE / "cli.py", *(PACKAGE / "commands").glob("*.py")
    loaded = {name for module in modules for name in imports_on_load(module)}
    roots = {name.split(".")[0] for name in loaded}
    assert roots - sys.stdlib_module_names == {"click", "rgexport"}
    ours = {n for n in loaded if n.startswith("rgexport") and "commands" not in n}
    assert ours == {"rgexport.progress", *ERRORS, *PRINTING}
