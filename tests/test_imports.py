"""Each floor imports only from the floors before it, and the core needs no torch.

Checked on the syntax trees, so that imports inside functions count, too.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import rgexport

PACKAGE = Path(rgexport.__file__).parent
FACE = PACKAGE / "__init__.py"
"""Gives `rgexport.load` when it is asked for."""
TREES = {path: ast.parse(path.read_text()) for path in sorted({*PACKAGE.rglob("*.py")} - {FACE})}
MODULES = list(TREES)
FLOORS = (
    *("griffin", "kernels", "quantize", "export", "runtimes", "chat", "serve", "web_page"),
    *("validate", "evaluate", "compress", "commands", "cli"),
)
ANYWHERE = {
    *"errors files formats npm parallelism printing progress reporting units".split(),
    *("_version", "__init__"),
}
"""What every floor may import."""
SIBLINGS = {"validate", "evaluate", "compress"}
"""None of these imports another one."""

NEEDS_TORCH = {
    *(f"compress/{name}.py" for name in "head measure statistics sums".split()),
    *(f"griffin/{name}.py" for name in "gradients ops reference scan step triton_scan".split()),
    *("validate/reference/deepmind_model.py", "evaluate/reference_session.py", "export/trace.py"),
}
FENCED = {
    "torch": NEEDS_TORCH,
    "gguf": {"export/gguf/exporter.py", "export/gguf/metadata.py"},
    **dict.fromkeys("onnx onnx_ir coremltools prompt_toolkit datasets".split(), frozenset()),
    **dict.fromkeys("distributed llama_cpp lm_eval tensorstore".split(), frozenset()),
}
"""Package of an extra → modules that import it when they are loaded."""
IMPLEMENTATIONS = {"recurrentgemma", "triton"}
"""Packages that a user installs for a reference of DeepMind's, or for a GPU."""

EMITTERS = "export/onnx/", "export/coreml/"
"""Folders whose modules load a converter; those that the core needs of them do it when called."""

APART_FROM_THE_EMITTER = "export/mil/", "runtimes/coreml/interpreter/"
"""These check the emitter, so they must not share its code."""


def name_of(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_on_load(tree: ast.Module | ast.ClassDef) -> set[str]:
    """Returns what a module imports when it is loaded: not in functions, not for type checkers."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= imports_on_load(node)
        elif not ast.unparse(node).startswith(("def ", "@", "if TYPE_CHECKING:")):
            names |= set(imports(node))
    return names


def floors_for(module: Path) -> set[str]:
    """Returns the packages of rgexport that a module may import."""
    floor = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if floor not in FLOORS:
        return ANYWHERE
    below = {*FLOORS[: FLOORS.index(floor)]}
    return ANYWHERE | {floor} | (below - SIBLINGS if floor in SIBLINGS else below)


def test_imports_go_one_way():
    assert MODULES
    wrong = [
        f"{name_of(module)} imports {name}"
        for module in MODULES
        for name in imports(TREES[module])
        if name.split(".")[0] == "rgexport"
        if name.removeprefix("rgexport.").split(".")[0] not in floors_for(module)
    ]
    assert wrong == []


def requirements(*extras: str) -> set[str]:
    """Returns the packages of the core and of these extras, as they are imported."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.match(r"[\w-]+", line).group().replace("-", "_") for line in lines}


def test_the_core_installs_what_it_imports():
    """And no more: each package is imported by a module that belongs to no extra."""
    core = [module for module in MODULES if not name_of(module).startswith((*EMITTERS, "serve/"))]
    roots = {
        name.removeprefix("google.").split(".")[0]
        for module in core
        for name in imports(TREES[module])
    }
    assert requirements() <= roots
    loaded = {n.split(".")[0] for module in core for n in imports_on_load(TREES[module])}
    others = loaded - requirements() - FENCED.keys() - sys.stdlib_module_names
    assert others == {"google", "rgexport", *IMPLEMENTATIONS}


def test_the_server_installs_what_it_imports():
    server = [module for module in MODULES if name_of(module).startswith("serve/")]
    loaded = {n.split(".")[0] for module in server for n in imports_on_load(TREES[module])}
    others = loaded - requirements("serve") - sys.stdlib_module_names
    assert others == {"rgexport", "starlette"}  # fastapi brings starlette


def test_packages_of_extras_are_fenced():
    outside = [module for module in MODULES if not name_of(module).startswith(EMITTERS)]
    wrong = [
        f"{name_of(module)} imports {name}"
        for module in outside
        for name in imports_on_load(TREES[module])
        if name_of(module) not in FENCED.get(name.split(".")[0], {name_of(module)})
    ]
    assert outside and wrong == []


def test_readers_of_packages_share_nothing_with_the_emitter():
    for folder in APART_FROM_THE_EMITTER:
        modules = [module for module in MODULES if name_of(module).startswith(folder)]
        names = [name for module in modules for name in imports(TREES[module])]
        assert names and not [n for n in names if n.startswith("rgexport.export.coreml")]
