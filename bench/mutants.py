"""Mutations, which are small faults in single lines, and the tests that probably notice them."""

import ast
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path, PurePosixPath

TESTS = "tests"
"""The folder of all tests."""


@dataclass(frozen=True)
class Mutation:
    """A line of a file and the line that replaces it; both without the line break."""

    kind: str
    operator: str
    file: str
    line: int
    """Counted from 1."""
    before: str
    after: str
    scope: str
    """The function, or the line that opens the block around it."""

    def apply(self, text: str) -> str | None:
        """Returns the mutated text, or None if the line is no longer in it.

        If the line has moved, the nearest equal line is replaced.
        """
        lines = text.splitlines(keepends=True)
        equal = [i for i, line in enumerate(lines) if line.rstrip("\r\n") == self.before]
        if not equal:
            return None
        nearest = min(equal, key=lambda i: abs(i + 1 - self.line))
        lines[nearest] = lines[nearest].replace(self.before, self.after)
        return "".join(lines)


@dataclass(frozen=True)
class _Edit:
    operator: str
    line: int
    start: int
    end: int
    replacement: str


_UNTESTED = re.compile(
    r"(^|_)(log|logger|print|echo|warn|debug|detail|progress|task|label|title|help|message|text_width"
    r"|timeout|seconds|patience|sleep|interval|cache|lru|maxsize|stacklevel|prefetch|threads|workers"
    r"|reserve|alignas|alignof|alignment|static_assert|assert|console)s?(_|$)",
    re.IGNORECASE,
)
"""Names of what tests need not notice: text for people, durations, sizes of caches."""

_CLOCK = re.compile("perf_counter|monotonic")
_SWAPS = {
    **dict(zip("< <= > >= == != === !==".split(), "<= < >= > != == !== ===".split(), strict=True)),
    **dict(zip("+ - += -= && || and or".split(), "- + -= += || && or and".split(), strict=True)),
    **dict(zip("is,is not,in,not in".split(","), "is not,is,not in,in".split(","), strict=True)),
    **dict(zip("min max minimum maximum".split(), "max min maximum minimum".split(), strict=True)),
    **{"true": "false", "false": "true", "True": "False", "False": "True"},
}
"""Token → the token that replaces it."""
_OPERATORS: dict[str, dict[type[ast.AST], str]] = {
    "comparison swapped": {
        **{ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="},
        **{ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"},
    },
    "+ and - swapped": {ast.Add: "+", ast.Sub: "-"},
    "and and or swapped": {ast.And: "and", ast.Or: "or"},
}
_FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
_TEXTS = ast.JoinedStr, ast.Raise, ast.Assert
_ANNOTATIONS = "annotation", "returns", "decorator_list"


def python_edits(text: str) -> Iterator[tuple[str, _Edit]]:
    """Yields functions and edits of their code, without messages, annotations and docstrings."""
    lines = text.splitlines()
    for scope, function in _functions(ast.parse(text), ""):
        for node in _code(function):
            for operator, start, end, change in _node_edits(node, function):
                line = lines[start[0] - 1].encode()
                if start[0] != end[0] or _CLOCK.search(lines[start[0] - 1]):
                    continue
                old = line[start[1] : end[1]].decode()
                columns = len(line[: start[1]].decode()), len(line[: end[1]].decode())
                if change(old) != old:
                    yield scope, _Edit(operator, start[0], *columns, change(old))


def _functions(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        name = scope
        if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
            name = f"{scope}.{child.name}".strip(".")
        if isinstance(child, _FUNCTIONS) and not (_UNTESTED.search(child.name)):
            yield name, child
        yield from _functions(child, name)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in _ANNOTATIONS and not _is_untested(child):
                yield child
                yield from _code(child)


def _is_untested(node: ast.AST) -> bool:
    if isinstance(node, (*_FUNCTIONS, *_TEXTS, ast.ClassDef)):
        return True
    if isinstance(node, ast.Call):
        called = node.func, getattr(node.func, "value", node)
        return any(_UNTESTED.search(_last_name(name)) for name in called)
    if isinstance(node, ast.keyword):
        return bool(_UNTESTED.search(node.arg or ""))
    if isinstance(node, ast.Assign):
        return bool(_UNTESTED.search(_last_name(node.targets[0])))
    return False


def _last_name(node: ast.AST) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))


_Place = tuple[int, int]
_NodeEdit = tuple[str, _Place, _Place, Callable[[str], str]]


def _start(node: ast.AST) -> _Place:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> _Place:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def _node_edits(node: ast.AST, function: ast.AST) -> Iterator[_NodeEdit]:
    match node:
        case (
            ast.Compare(left, [operator], [right])
            | ast.BinOp(left, operator, right)
            | ast.BoolOp(operator, [left, right])
        ) if (not _is_text(left) and not _is_text(right)) or isinstance(node, ast.Compare):
            for name, tokens in _OPERATORS.items():
                if old := tokens.get(type(operator)):
                    yield name, _end(left), _start(right), partial(_swap_first, old)
        case ast.UnaryOp(ast.Not()):
            yield "boolean negated", _start(node), _end(node), lambda old: old[len("not ") :]
        case ast.If(test) | ast.IfExp(test):
            yield "boolean negated", _start(test), _end(test), "not ({})".format
        case ast.Constant(bool()):
            yield "boolean negated", _start(node), _end(node), _SWAPS.__getitem__
        case ast.Constant(int()):
            yield "constant changed by one", _start(node), _end(node), _next_number
        case ast.Return(ast.expr() as value) if not isinstance(value, (ast.Constant, *_TEXTS)):
            is_bool = _last_name(getattr(function, "returns", None) or value) == "bool"
            wrong = "not ({})".format if is_bool else lambda old: "None"
            yield "wrong value returned", _start(value), _end(value), wrong
        case ast.Expr(ast.Call() as call) if not _is_untested(call):
            yield "statement removed", _start(node), _end(node), lambda old: "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
            yield "statement removed", _start(node), _end(node), lambda old: "pass"
        case ast.Call(ast.Name(name) | ast.Attribute(attr=name) as called) if name in _SWAPS:
            row, column = _end(called)
            start = row, column - len(name)
            yield "min and max swapped", start, (row, column), _SWAPS.__getitem__


def _next_number(digits: str) -> str:
    return str(int(digits) + 1) if digits.isdigit() else digits


def _swap_first(token: str, code: str) -> str:
    return code.replace(token, _SWAPS[token], 1)


def _is_text(node: ast.AST) -> bool:
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_string or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple)


_TOKENS = {
    "comparison swapped": r"(?<= )([<>]=?|[=!]==?)(?= )",
    "+ and - swapped": r"(?<= )[+-]=?(?= )",
    "and and or swapped": r"(?<= )(&&|\|\||and|or)(?= )",
    "boolean negated": r"\b(true|false)\b",
    "min and max swapped": r"\b(min|max)(?=\()",
    "constant changed by one": r"(?<![\w.])\d+(?![\w.])",
}
"""Operator → the tokens that it changes, in C++, TypeScript and templates."""
_STATEMENT = re.compile(r"(?!return\b)[\w.:>\[\]-]+(\(.*\)| [+*/|&-]?= .*);")
"""A call or an assignment, on a line of its own; a declaration has two words before the sign."""
_NO_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|^[ +]*#[^\n]*(?:\\\n[^\n]*)*"
    r"""|"(?:\\.|[^"\\\n])*"|(?<!\w)'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`""",
    re.DOTALL | re.MULTILINE,
)
"""Comments, directives of the preprocessor and strings."""
_SKIPPED_LINE = re.compile(
    r"^\s*(import|export \{|using|template|typedef|throw)\b|[<>]=? 0 \? \w+ : 0\b"
)
_NOT_COMPILED = re.compile(r"ggml-(cuda|sycl|metal|vulkan|opencl|cann|hip|musa|webgpu)/")
_TAG = re.compile(r"\{[{%]-?(?! *(?:from|import|include|macro|endmacro))(.*?)-?[%}]\}")
_LOOKS = re.compile(r"plot\.|format\(")
"""Coordinates and digits, which only an eye can judge."""
_IN_TAG = re.compile(r"""'[^']*'|"[^"]*"|\{#.*?#\}""")


def c_edits(text: str) -> Iterator[tuple[str, _Edit]]:
    """Yields edits of indented lines of C++ or TypeScript, and the unindented line before them."""
    scope = ""
    for number, line in enumerate(_NO_CODE.sub(_blank, text).splitlines(), 1):
        if re.match(r"[\w/]", line):
            scope = f"{line.strip()} ({number})"
        if not line.startswith(" ") or _SKIPPED_LINE.search(line) or _has_untested_name(line):
            continue
        yield from ((scope, edit) for edit in _token_edits(line, number, 0))
        code = line.strip()
        if _STATEMENT.fullmatch(code) and code.count("(") == code.count(")"):
            start = line.index(code)
            yield scope, _Edit("statement removed", number, start, start + len(code), ";")


def patch_edits(text: str) -> Iterator[tuple[str, _Edit]]:
    """Yields edits of the lines that a patch adds, as far as a processor's build compiles them."""
    file = hunk = ""
    for number, line in enumerate(_NO_CODE.sub(_blank, text).splitlines(), 1):
        if line.startswith("+++ "):
            file = line
        elif line.startswith("@@"):
            hunk = f"{file} {line}"
        elif line.startswith("+ ") and not _NOT_COMPILED.search(file):
            yield from ((hunk, edit) for edit in _token_edits(line, number, 0))
            if re.fullmatch(r"\+ +(case \w+:|[\w.]+ = .*;|\{ ?\w+, .*\},)", line.rstrip()):
                yield hunk, _Edit("statement removed", number, 1, len(line), "")


def template_edits(text: str) -> Iterator[tuple[str, _Edit]]:
    """Yields edits of the tags in Jinja's templates; each tag is its own scope."""
    for number, line in enumerate(text.splitlines(), 1):
        for tag in _TAG.finditer(line):
            scope, code = f"{number}: {tag[1].strip()}", _IN_TAG.sub(_blank, tag[1])
            if not _LOOKS.search(code):
                yield from ((scope, e) for e in _token_edits(code, number, tag.start(1)))
            for match in re.finditer(r" \| (?!string|list)\w+(?![\w(])", code):
                start, end = (tag.start(1) + place for place in match.span())
                yield scope, _Edit("filter removed", number, start, end, "")
            if condition := re.match(r" *(?:el)?if (.*\S)", code):
                start, end = (tag.start(1) + place for place in condition.span(1))
                negated = f"not ({line[start:end]})"
                yield scope, _Edit("boolean negated", number, start, end, negated)


def _token_edits(code: str, number: int, shift: int) -> Iterator[_Edit]:
    for operator, pattern in _TOKENS.items():
        for match in re.finditer(pattern, code):
            new = _SWAPS.get(match[0]) or _next_number(match[0])
            yield _Edit(operator, number, shift + match.start(), shift + match.end(), new)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _has_untested_name(line: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", line)
    return any(_UNTESTED.search(word) for word in re.findall(r"\w+", words))


@dataclass(frozen=True)
class Kind:
    """A kind of sources, and how many mutations of it are drawn."""

    name: str
    count: int
    patterns: Mapping[str, Callable[[str], Iterator[tuple[str, _Edit]]]]
    """Names of files → their edits."""
    stratum: Callable[[PurePosixPath], str]
    """Mutations are spread evenly over its values."""


KINDS = (
    Kind(
        "Python",
        20,
        {"rgexport/*.py": python_edits},
        lambda path: path.parts[1] if len(path.parts) > 2 else "",
    ),
    Kind(
        "C++",
        10,
        {"rgexport/kernels/*/src/*.cpp": c_edits, "rgexport/kernels/*/src/*.h": c_edits},
        lambda path: path.name,
    ),
    Kind(
        "TypeScript",
        5,
        {"page/src/*.ts": c_edits, "rgexport/npm/*.mjs": c_edits},
        lambda path: path.name,
    ),
    Kind(
        "template or patch",
        5,
        {
            "rgexport/kernels/llama_cpp/*.cpp": c_edits,
            "rgexport/kernels/llama_cpp/*.patch": patch_edits,
            "rgexport/griffin/control_tokens.py": template_edits,
            "rgexport/*.j2": template_edits,
        },
        lambda path: f"{path.parent}/{path.suffix}",
    ),
)


def draw(texts: Mapping[str, str], seed: int) -> dict[str, list[Mutation]]:
    """Returns the mutations of each kind in the order drawn, at most one of each function.

    There are more than the kind's count: the rest replaces those that do not compile.

    Args:
        texts: path → content of each committed file.
        seed: for all choices.
    """
    return {k.name: _draw_kind(k, texts, random.Random(f"{seed} {k.name}")) for k in KINDS}


def _draw_kind(kind: Kind, texts: Mapping[str, str], rng: random.Random) -> list[Mutation]:
    strata: dict[str, list[Mutation]] = {}
    for file, text in sorted(texts.items()):
        for pattern, edits in kind.patterns.items():
            if fnmatch(file, pattern) and not _UNTESTED.search(PurePosixPath(file).stem):
                mutations = strata.setdefault(kind.stratum(PurePosixPath(file)), [])
                mutations += _one_for_each_scope(kind, file, text, edits(text), rng)
    for mutations in strata.values():
        _mix(mutations, rng)
    drawn = []
    while remaining := [mutations for mutations in strata.values() if mutations]:
        rng.shuffle(remaining)
        drawn += [mutations.pop() for mutations in remaining]
    return drawn


def _mix(mutations: list[Mutation], rng: random.Random) -> None:
    """Shuffles mutations so that frequent operators do not come before rare ones."""
    rng.shuffle(mutations)
    earlier: Counter[str] = Counter()
    ranks = {}
    for mutation in mutations:
        ranks[mutation] = earlier[mutation.operator]
        earlier[mutation.operator] += 1
    rng.shuffle(mutations)
    mutations.sort(key=lambda mutation: -ranks[mutation])  # they are taken from the end


def _one_for_each_scope(
    kind: Kind, file: str, text: str, edits: Iterator[tuple[str, _Edit]], rng: random.Random
) -> list[Mutation]:
    scopes: dict[str, dict[str, list[_Edit]]] = {}
    for scope, edit in edits:
        scopes.setdefault(scope, {}).setdefault(edit.operator, []).append(edit)
    lines, mutations = text.splitlines(), []
    for scope, operators in scopes.items():
        edit = rng.choice(operators[rng.choice(sorted(operators))])
        before = lines[edit.line - 1]
        after = before[: edit.start] + edit.replacement + before[edit.end :]
        mutations.append(Mutation(kind.name, edit.operator, file, edit.line, before, after, scope))
    return mutations


def likely_tests(root: Path, file: str) -> list[list[str]]:
    """Returns tests that are likely to notice a change of a file, the most likely first.

    The groups are: tests in the folder that mirrors the file's, if they import its module or name
    the file; those that import a module that does so; the whole folder; and all other tests that
    import the module, with the folders that mirror those of the modules that do.
    """
    path, mirror = Path(file), _mirror(root, Path(file))
    paths = [path for top in ("rgexport", TESTS) for path in (root / top).rglob("*.py")]
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in paths}
    direct = _importers(texts, _modules(root, path))
    modules = {name for name in direct if name.startswith("rgexport/")}
    direct |= {name for name, text in texts.items() if path.name in text}
    tests, indirect = (
        {name for name in names if Path(name).name.startswith("test_")}
        for names in (direct, _importers(texts, modules))
    )
    near = [
        sorted(
            (name for name in names if name.startswith(f"{mirror}/")),
            key=lambda name: (not name.endswith(f"/test_{path.stem}.py"), name),
        )
        for names in (tests, indirect - tests)
    ]
    folders = {_mirror(root, Path(name)) for name in modules} - {mirror, TESTS}
    others = [*sorted(tests - {*near[0]}), *sorted(folders)]
    return [group for group in (*near, [mirror], others) if group and group != [TESTS]]


def _importers(texts: Mapping[str, str], modules: Iterable[str]) -> set[str]:
    names = {module.removesuffix(".py").replace("/", ".") for module in modules}
    names = {name.removesuffix(".__init__") for name in names}
    return {name for name, text in texts.items() if names & _imports(text)}


def _modules(root: Path, path: Path) -> list[str]:
    """Returns the module, or the modules of the nearest package if the file is no Python."""
    if path.suffix == ".py":
        return [path.as_posix()]
    in_page = path.parts[0] == "page" or path.parts[:2] == ("rgexport", "npm")
    folder = Path("rgexport/web_page") if in_page else path.parent
    while not any((root / folder).glob("*.py")):
        folder = folder.parent
    return [module.relative_to(root).as_posix() for module in (root / folder).glob("*.py")]


@cache
def _imports(text: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _mirror(root: Path, path: Path) -> str:
    """Returns the folder of tests for a file of the package or the page."""
    parts = ("page",) if path.parts[0] == "page" else path.parts[1:-1]
    if parts[:1] == ("artifacts",):  # tests read what an export writes
        parts = ("export", *parts[1:])
    while parts and not (root / TESTS).joinpath(*parts).is_dir():
        parts = parts[:-1]
    return "/".join((TESTS, *parts))
