"""The drawing of mutations, and their measurement with a small project that has its own tests."""

import ast
import subprocess
from pathlib import Path

import pytest

from bench.mutants import (
    KINDS,
    Mutation,
    c_edits,
    draw,
    likely_tests,
    patch_edits,
    python_edits,
    template_edits,
)
from bench.mutations import NOT_QUICKLY, Checkout, Measurement, compare, run, survivors
from tests.command_line import ROOT

PROJECT = {
    "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['nightly: left out']\n",
    ".gitignore": "__pycache__/\n.pytest_cache/\nout\n",
    "page/index.html": "",
    "rgexport/__init__.py": "",
    "rgexport/sums/__init__.py": "",
    "rgexport/sums/adding.py": "def total(a, b):\n    return a + b\n",
    "rgexport/sums/limits.py": "def lowest(a, b):\n    return min(a, b)\n",
    "rgexport/kernels/__init__.py": "",
    "rgexport/kernels/build.py": (
        "import pathlib, sys\n"
        "sys.exit('x != 0' in pathlib.Path('rgexport/kernels/onnx/src/a.h').read_text())\n"
    ),
    "rgexport/kernels/onnx/src/a.h": "int sign(int x) {\n  return x == 0 || x < 1;\n}\n",
    "tests/kernels/test_a.py": (
        "from pathlib import Path\n\n"
        "HEADER = Path('rgexport/kernels/onnx/src/a.h')\n\n"
        "def test_text():\n    assert 'x < 1' in HEADER.read_text()\n"
    ),
    "tests/sums/test_adding.py": (
        "import pytest\n\n"
        "from rgexport.sums.adding import total\n\n"
        "def test_always_fails():\n    assert False\n\n"
        "def test_total():\n    assert total(2, 3) == 5\n"
    ),
    "tests/sums/test_limits.py": (
        "import pytest\n\n"
        "from rgexport.sums.limits import lowest\n\n"
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


@pytest.fixture
def checkout(project: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load
    return Checkout(project.parent / "tree", "HEAD", built=project)


def measurement(folder: Path, *, quick: bool = False) -> Measurement:
    return Measurement(folder / "results.json", {"tier": "full"}, quick=quick)


def mutation(file: str, line: int, before: str, after: str) -> Mutation:
    return Mutation("a kind", "an operator", file, line, before, after, "a function")


ADDING = mutation("rgexport/sums/adding.py", 2, "    return a + b", "    return a - b")
LIMITS = mutation("rgexport/sums/limits.py", 2, "    return min(a, b)", "    return max(a, b)")
HEADER = "  return x == 0 || x < 1;"
BROKEN = mutation("rgexport/kernels/onnx/src/a.h", 2, HEADER, HEADER.replace("==", "!="))
COMPILES = mutation("rgexport/kernels/onnx/src/a.h", 2, HEADER, HEADER.replace("< 1", "< 2"))


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """All sources, but only every fourth in Python."""
    endings = ".h", ".cpp", ".mjs", ".patch", ".j2"
    paths = [path for end in endings for path in (ROOT / "rgexport").rglob(f"*{end}")]
    paths += (ROOT / "page" / "src").glob("*.ts")
    paths += sorted((ROOT / "rgexport").rglob("*.py"))[::4]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def test_the_seed_decides_what_is_drawn(sources: dict[str, str]) -> None:
    drawn = draw(sources, 1)
    assert drawn == draw(dict(reversed(sources.items())), 1) != draw(sources, 2)
    for kind in KINDS:
        chosen = drawn[kind.name][: kind.count]
        assert len(chosen) == kind.count
        assert len({(one.file, one.scope) for one in drawn[kind.name]}) == len(drawn[kind.name])
        assert len({one.file for one in chosen}) >= 0.6 * kind.count


def test_each_mutation_changes_its_line_and_python_still_parses(sources: dict[str, str]) -> None:
    for mutations in draw(sources, 1).values():
        for one in mutations[:100]:
            mutated = one.apply(sources[one.file])
            assert mutated is not None
            lines = sources[one.file].splitlines()
            changed = [i for i, line in enumerate(mutated.splitlines(), 1) if line != lines[i - 1]]
            assert changed == [one.line]
            if one.file.endswith(".py"):
                ast.parse(mutated)


LINES = [
    (python_edits, "if a < b: f(a)", "comparison swapped", "if a <= b: f(a)"),
    (python_edits, "return a not in b", "comparison swapped", "return a in b"),
    (python_edits, "x = (a) + (b)", "+ and - swapped", "x = (a) - (b)"),
    (python_edits, "x = 'ä' if a else 7", "constant changed by one", "x = 'ä' if a else 8"),
    (python_edits, "x = not (a or b)", "boolean negated", "x = (a or b)"),
    (python_edits, "x = a and b", "and and or swapped", "x = a or b"),
    (python_edits, "return np.minimum(a, b)", "min and max swapped", "return np.maximum(a, b)"),
    (python_edits, "return a.b", "wrong value returned", "return None"),
    (python_edits, "a.b(c)", "statement removed", "pass"),
    (python_edits, "a.b = c", "statement removed", "pass"),
    (c_edits, "if (a < b) return 1;", "comparison swapped", "if (a <= b) return 1;"),
    (c_edits, "x += a && b;  // a + b", "and and or swapped", "x += a || b;  // a + b"),
    (c_edits, 'f(a, "1 + 1", 3);', "constant changed by one", 'f(a, "1 + 1", 4);'),
    (c_edits, "x = std::min(a, b);", "min and max swapped", "x = std::max(a, b);"),
    (c_edits, "x->rows[0] = f(a);", "statement removed", ";"),
    (template_edits, "<b>1{{ a[0] | visible }}", "filter removed", "<b>1{{ a[0] }}"),
    (template_edits, "{% if a.b %}1", "boolean negated", "{% if not (a.b) %}1"),
    (template_edits, "{{ a[1:] ~ '1' }}", "constant changed by one", "{{ a[2:] ~ '1' }}"),
]


@pytest.mark.parametrize(("edits", "line", "operator", "expected"), LINES)
def test_operators(edits, line, operator, expected) -> None:
    around = {python_edits: "def f(a, b):\n    ", c_edits: "int f() {\n  ", template_edits: ""}[
        edits
    ]
    text = around + line
    changed = [
        text.splitlines()[-1][: edit.start] + edit.replacement + text.splitlines()[-1][edit.end :]
        for _, edit in edits(text)
        if edit.operator == operator
    ]
    assert expected in [line.strip() for line in changed]


def test_only_added_lines_of_a_patch_are_changed() -> None:
    patch = "+++ b/src/a.cpp\n@@ -1 +1 @@\n     a = 1;\n-    a = 2;\n+    a = 3;\n"
    assert {edit.line for _, edit in patch_edits(patch)} == {5}
    assert not list(patch_edits(patch.replace("src/a.cpp", "ggml/src/ggml-cuda/a.cu")))


@pytest.mark.parametrize(
    "line",
    [
        '"""a + 1"""',
        "raise ValueError(a + 1)",
        "log.info(a + 1)",
        "x: Literal[1]",
        "timeout_seconds = a + 1",
        'x = f"{a + 1}"',
        "x = 0o755",
    ],
)
def test_what_tests_need_not_notice_is_not_changed(line: str) -> None:
    assert not list(python_edits(f"def f(a):\n    {line}\n"))


def test_a_line_that_moved_is_still_mutated() -> None:
    assert LIMITS.apply("# new\n\n    return min(a, b)\n") == "# new\n\n    return max(a, b)\n"
    assert LIMITS.apply("    return min(b, a)\n") is None


def test_a_test_that_fails_only_with_the_mutation_catches_it(
    project: Path, checkout: Checkout
) -> None:
    measured = measurement(project)
    run(measured, {1: [ADDING], 2: [LIMITS], 3: [BROKEN, COMPILES]}, [checkout])
    caught, survived, replaced = measured.results.values()
    assert (caught.outcome, caught.test) == ("caught", "tests/sums/test_adding.py::test_total")
    assert survived.outcome == "survived"
    assert (replaced.outcome, replaced.mutation) == ("caught", COMPILES)
    assert len(replaced.not_built) == 1
    assert "-    return min(a, b)\n+    return max(a, b)" in survivors(measured.results, PROJECT)
    assert git(checkout.folder, "status", "--porcelain") == ""
    assert git(project, "status", "--porcelain") == "?? results.json\n"


def test_a_run_goes_on_where_the_earlier_one_ended(project: Path, checkout: Checkout) -> None:
    quick = measurement(project, quick=True)
    run(quick, {1: [ADDING], 2: [LIMITS]}, [checkout])
    assert [r.outcome for r in quick.results.values()] == ["caught", NOT_QUICKLY]
    assert [quick.is_done(number) for number in (1, 2, 3)] == [True, True, False]
    whole = measurement(project)
    assert [whole.is_done(number) for number in (1, 2)] == [True, False]
    run(whole, {1: [ADDING], 2: [LIMITS]}, [checkout])
    assert [r.outcome for r in whole.results.values()] == ["caught", "survived"]
    table = compare(quick.results, whole.results)
    assert f"{NOT_QUICKLY} | survived |" in table
    assert "Caught: 1 of 2 before, 1 of 2 after." in table
    with pytest.raises(SystemExit, match="name another"):
        Measurement(project / "results.json", {"tier": "test"}, quick=False)


@pytest.mark.parametrize(
    ("file", "group", "first"),
    [
        ("rgexport/quantize/plan.py", 0, "tests/quantize/test_plan.py"),
        ("rgexport/kernels/onnx/src/floats.h", 2, "tests/kernels/onnx"),
        ("page/src/main.ts", 1, "tests/page"),
        ("rgexport/web/state_file.mjs", 1, "tests/web"),
    ],
)
def test_likely_tests_come_first(file: str, group: int, first: str) -> None:
    assert likely_tests(ROOT, file)[group][0] == first
