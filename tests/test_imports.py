"""Each package imports only from those below it, modules form no cycle, the core needs no torch.

Checked on the syntax trees, so that imports inside functions count, too.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import rgexport

PACKAGE = Path(rgexport.__file__).parent
FACE = PACKAGE / "__init__.py"  # gives `rgexport.load` when it is asked for
TREES = {path: ast.parse(path.read_text()) for path in sorted({*PACKAGE.rglob("*.py")} - {FACE})}
MODULES = list(TREES)
LAYERS = """_version choices errors units numerics parallelism printing progress reporting formats
files npm griffin kernels quantize artifacts export runtimes chat serve
web_page validate evaluation planning api commands cli __main__""".split()
"""Every package and module of rgexport; each imports only from itself and those before it."""
SIBLINGS = {"validate", "evaluation", "planning"}  # none of these imports another one
WITHOUT_EXPORT = {"runtimes", "chat", "serve"}
"""Packages that run artifacts, and import nothing of what writes them."""
CIRCLES_OF_TYPES = {"quantize"}
"""Packages with modules that import one another for type checkers: schemes, and the statistics and
algorithms that they take."""
FORMATS_AND_ENGINES = """
artifacts.onnx artifacts.coreml artifacts.gguf export.onnx export.coreml export.gguf
runtimes.onnx runtimes.coreml runtimes.llama_cpp""".split()
"""Packages of one format or engine; others of their layer ask the format object."""

NEEDS_TORCH = {
    *(f"planning/{name}.py" for name in "losses layer_pass".split()),
    *(f"griffin/{name}.py" for name in "ops reference scan".split()),
    *("validate/reference/deepmind_model.py", "export/trace.py"),
}
FENCED = {
    "torch": NEEDS_TORCH,
    "gguf": {"export/gguf/exporter.py"},
    **dict.fromkeys("onnx onnx_ir coremltools prompt_toolkit datasets".split(), frozenset()),
    **dict.fromkeys("distributed llama_cpp lm_eval tensorstore".split(), frozenset()),
}
"""Package of an extra → modules that import it when they are loaded."""
IMPLEMENTATIONS = {"recurrentgemma"}
"""Packages that a user installs for a reference of DeepMind's, or for a GPU."""

EMITTERS = "export/onnx/", "export/coreml/"
"""Folders whose modules load a converter; those that the core needs of them do it when called."""

APART_FROM_THE_EMITTER = "artifacts/coreml/mil/", "runtimes/coreml/interpreter/"
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


def layer_of(name: str) -> str:
    """Returns the layer of a module, such as `export` of `rgexport.artifacts.card`."""
    return name.removeprefix("rgexport.").split(".")[0]


def own_imports(tree: ast.Module) -> set[str]:
    """Returns the modules and packages of our own that a module imports, as dotted names."""
    names = {name for name in imports(tree) if name.split(".")[0] == "rgexport"}
    return {name if name in DOTTED else name.rpartition(".")[0] for name in names}


DOTTED = {
    ".".join(("rgexport", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in MODULES
}
"""Dotted name of a module or package → its file."""
IMPORTS = [(name, other) for name, path in DOTTED.items() for other in own_imports(TREES[path])]
"""Each of our modules, and one of ours that it imports."""


def test_imports_go_one_way():
    wrong = [
        (name, other)
        for name, other in IMPORTS
        if LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name))
    ]
    assert IMPORTS and wrong == []


def test_siblings_do_not_import_one_another():
    wrong = [
        (name, other)
        for name, other in IMPORTS
        if layer_of(name) != layer_of(other) and {layer_of(name), layer_of(other)} <= SIBLINGS
    ]
    assert wrong == []


def test_what_runs_artifacts_does_not_import_the_exporters():
    wrong = [
        (name, other)
        for name, other in IMPORTS
        if layer_of(name) in WITHOUT_EXPORT and layer_of(other) == "export"
    ]
    assert wrong == []


def test_packages_of_formats_and_engines_are_asked_through_their_object():
    wrong = [
        (name, other)
        for name, other in IMPORTS
        for package in FORMATS_AND_ENGINES
        if layer_of(name) == layer_of(other) and is_inside(other, package)
        if not is_inside(name, package)
    ]
    assert wrong == []


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"rgexport.{package}.")


def test_modules_form_no_cycle():
    """Imports in functions count, too, and those for type checkers but in `CIRCLES_OF_TYPES`."""
    graph = {}
    for name, module in DOTTED.items():
        tree = TREES[module]
        if layer_of(name) in CIRCLES_OF_TYPES:
            tree = without_imports_for_types(tree)
        graph[name] = own_imports(tree) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def without_imports_for_types(tree: ast.Module) -> ast.Module:
    body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    return ast.Module(body, [])


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
        others = [name for name in names if not is_inside(name, "artifacts.coreml.mil")]
        assert others and not [name for name in others if is_inside(name, "artifacts.coreml")]
        assert not [name for name in others if is_inside(name, "export.coreml")]
