"""The drawing of mutations, and their measurement with a small project that has its own tests."""

import subprocess
from pathlib import Path

import pytest

from bench.mutants import Mutation, c_edits, python_edits, template_edits
from bench.mutations import NOT_QUICKLY, Checkout, Measurement, run, survivors

PROJECT = {
    "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['nightly: left out']\n",
    ".gitignore": "__pycache__/\n.pytest_cache/\nout\n",
    "page/index.html": "",
    "rgexport/__init__.py": "",
    "rgexport/adding.py": "def total(a, b):\n    return a + b\n",
    "rgexport/limits.py": "def lowest(a, b):\n    return min(a, b)\n",
    "rgexport/kernels/__init__.py": "",
    "rgexport/kernels/build.py": (
        "import pathlib, sys\n"
        "sys.exit('x != 0' in pathlib.Path('rgexport/kernels/onnx/src/a.h').read_text())\n"
    ),
    "rgexport/kernels/onnx/src/a.h": "int sign(int x) {\n  return x == 0 || x < 1;\n}\n",
    "tests/test_all.py": (
        "from pathlib import Path\n\n"
        "import pytest\n\n"
        "from rgexport.adding import total\nfrom rgexport.limits import lowest\n\n"
        "HEADER = Path('rgexport/kernels/onnx/src/a.h')\n\n"
        "def test_always_fails():\n    assert False\n\n"
        "def test_text():\n    assert 'x < 1' in HEADER.read_text()\n\n"
        "def test_total():\n    assert total(2, 3) == 5\n\n"
        "def test_equal():\n    assert lowest(2, 2) == 2\n\n"
        "@pytest.mark.nightly\n"
        "def test_others():\n    assert lowest(2, 3) == 2\n"
    ),
}
"""Files of a project in which some mutations are caught and some are not."""


def git(folder: Path, *arguments: str) -> str:
    identity = "-c", "user.name=Name", "-c", "user.email=name@example.org"
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name, text in PROJECT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "A project")
    return folder


def mutation(file: str, line: int, before: str, after: str) -> Mutation:
    return Mutation("a kind", "an operator", file, line, before, after, "a function")


ADDING = mutation("rgexport/adding.py", 2, "    return a + b", "    return a - b")
LIMITS = mutation("rgexport/limits.py", 2, "    return min(a, b)", "    return max(a, b)")
HEADER = "  return x == 0 || x < 1;"
BROKEN = mutation("rgexport/kernels/onnx/src/a.h", 2, HEADER, HEADER.replace("==", "!="))
COMPILES = mutation("rgexport/kernels/onnx/src/a.h", 2, HEADER, HEADER.replace("< 1", "< 2"))


OPERATORS = [
    (python_edits, "if a < b: f(a)", "comparison swapped", "if a <= b: f(a)"),
    (python_edits, "x = 'ä' if a else 7", "constant changed by one", "x = 'ä' if a else 8"),
    (python_edits, "x = not (a or b)", "boolean negated", "x = (a or b)"),
    (python_edits, "a.b = c", "statement removed", "pass"),
    (c_edits, "x += a && b;  // a + b", "and and or swapped", "x += a || b;  // a + b"),
    (c_edits, 'f(a, "1 + 1", 3);', "constant changed by one", 'f(a, "1 + 1", 4);'),
    (template_edits, "<b>1{{ a[0] | visible }}", "filter removed", "<b>1{{ a[0] }}"),
]


@pytest.mark.parametrize(("edits", "line", "operator", "expected"), OPERATORS)
def test_operators(edits, line, operator, expected):
    before = {python_edits: "def f(a, b):\n    ", c_edits: "int f() {\n  ", template_edits: ""}
    text = before[edits] + line
    last = text.splitlines()[-1]
    changed = [
        (last[: edit.start] + edit.replacement + last[edit.end :]).strip()
        for _, edit in edits(text)
        if edit.operator == operator
    ]
    assert expected in changed


def test_a_test_that_fails_only_with_the_mutation_catches_it(project, monkeypatch):
    """A quick run is not all; the next one goes on where it ended."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load
    checkout = Checkout(project.parent / "tree", "HEAD", built=project)
    mutations = {1: [ADDING], 2: [LIMITS], 3: [BROKEN, COMPILES]}
    quick = Measurement(project / "results.json", {"tier": "full"}, quick=True)
    run(quick, mutations, [checkout])
    assert quick.results[2].outcome == NOT_QUICKLY and quick.is_done(2)
    whole = Measurement(project / "results.json", {"tier": "full"}, quick=False)
    assert whole.is_done(1) and not whole.is_done(2)
    run(whole, mutations, [checkout])
    caught, survived, replaced = whole.results.values()
    assert (caught.outcome, caught.test) == ("caught", "tests/test_all.py::test_total")
    assert survived.outcome == "survived"
    assert (replaced.outcome, replaced.mutation) == ("caught", COMPILES)
    assert len(replaced.not_built) == 1
    assert "-    return min(a, b)\n+    return max(a, b)" in survivors(whole.results, PROJECT)
    assert git(checkout.folder, "status", "--porcelain") == ""
    with pytest.raises(SystemExit, match="name another"):
        Measurement(project / "results.json", {"tier": "test"}, quick=False)
