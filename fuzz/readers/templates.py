"""Chat templates, which are programs of somebody else's."""

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from transformers.utils.chat_template_utils import _compile_jinja_template

from fuzz.readers import bytes_mutator as raw
from fuzz.readers import folders, json_mutator
from fuzz.readers.target import Target, require
from rgexport.chat.prompts import load_template
from rgexport.griffin.control_tokens import GEMMA_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi <bos>"}, {"role": "assistant", "content": " Yes. "}]
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
JINJA, SETTINGS = "chat_template.jinja", "tokenizer_config.json"

_VALUES = (
    *("'a'", "messages", "10**10", "bos_token", "''", "[1]", "{}", "none", "true", "1.5", "-1"),
    *("namespace(a='aa')", "messages[0]", "range(9)", "('a' * 2**20)", "10", "self", "cycler('a')"),
    *(
        "loop.index0",
        "joiner('x')",
        "lipsum",
        "dict(a=1)",
        "raise_exception",
        "strftime_now",
        "caller",
    ),
)
_OPERATORS = (
    " * ",
    " ** ",
    " + ",
    " ~ ",
    " % ",
    " // ",
    " in ",
    " < ",
    " - ",
    " / ",
    " and ",
    " == ",
)
_FILTERS = (
    *(
        "center(10**9)",
        "indent(10**8)",
        "batch(2)",
        "join('ab')",
        "replace('', 'abcdefgh')",
        "trim",
    ),
    *("tojson(indent=10**8)", "tojson", "list", "length", "string", "format(10**9)", "wordwrap(1)"),
    *("slice(10**7)", "map('upper')", "sort", "int", "float", "round(3)", "sum", "e", "xmlattr"),
    *("urlize", "truncate(10**9)", "default(1)", "first", "last", "unique|list", "groupby('role')"),
    *("dictsort", "items|list", "selectattr('role')|list", "batch(10**8, 'x')|list", "pprint"),
    *("filesizeformat", "striptags", "title", "attr('__class__')", "map(attribute='x')|list"),
)
_METHODS = (
    *("upper()", "ljust(10**10)", "zfill(10**9)", "format(1)", "split('')", "__class__", "mro()"),
    *("join(['a','b'])", "replace('', 'aaaa')", "center(10**9)", "expandtabs(10**9)", "append(1)"),
    *("items()", "format_map({})", "__globals__", "encode('utf-32')", "a", "role", "splitlines()"),
    *(
        "pop()",
        "keys()",
        "count('a')",
        "maketrans('a','b')",
        "bit_length()",
        "to_bytes(10**9,'big')",
    ),
)
_BLOCKS = (
    *("{{% for i in {0} %}}{1}{{% endfor %}}", "{{% if {0} %}}{1}{{% endif %}}"),
    *(
        "{{% set ns = {0} %}}{1}",
        "{{% macro m(x) %}}{1}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m({0}) }}}}",
    ),
    *("{{% for a in {0} recursive %}}{1}{{{{ loop({0}) }}}}{{% endfor %}}", "{{{{ {0} }}}}{1}"),
    *(
        "{{% set ns.a = ns.a + ns.a %}}{1}",
        "{{% call m({0}) %}}{1}{{% endcall %}}",
        "{1}{{% break %}}",
    ),
    *("{{% filter upper %}}{1}{{% endfilter %}}", "{{% set b %}}{1}{{% endset %}}{{{{ b }}}}"),
    *("{{% for i in range(99999) %}}{1}{{% endfor %}}", "{{% with a = {0} %}}{1}{{% endwith %}}"),
    *("{{% include 'x' %}}{1}", "{{% import 'x' as y %}}", "{{% block b %}}{1}{{% endblock %}}"),
    *("{{% set a = a ~ a ~ {0} %}}{1}", "{{% raw %}}{1}{{% endraw %}}", "{{% generation %}}{1}"),
)


def _expression(random: Random, depth: int = 0) -> str:
    choice = random.randrange(7 if depth < 3 else 2)
    if choice < 2:
        return random.choice(_VALUES)
    inner = _expression(random, depth + 1)
    if choice < 4:
        return f"({inner}{random.choice(_OPERATORS)}{_expression(random, depth + 1)})"
    if choice == 4:
        return f"({inner} | {random.choice(_FILTERS)})"
    return f"{inner}.{random.choice(_METHODS)}"


def _block(random: Random, depth: int = 0) -> str:
    inner = _block(random, depth + 1) if depth < 4 and random.randrange(2) else "x"
    return random.choice(_BLOCKS).format(_expression(random), inner)


def mutate_template(source: str, random: Random) -> str:
    """Another template: with a block more, another expression, or other text."""
    at = random.randrange(len(source) + 1)
    match random.randrange(8):
        case 0:
            return _block(random)
        case 1 | 2:
            return source[:at] + _block(random) + source[at:]
        case 3 | 4:
            places = [i for i in range(len(source)) if source.startswith(("{{", "{%"), i)]
            begin = random.choice(places) + 2 if places else at
            end = source.find("}", begin)
            return f"{source[:begin]} {_expression(random)} {source[max(begin, end) :]}"
        case 5:
            return source[:at] + source[at + random.choice((1, 4, 20)) :]
        case 6:
            return source[:at] + raw.text(source[at : at + 3], random) + source[at:]
        case _:
            return source + source[at : at + random.choice((5, 50))] * random.choice((1, 9))


def _seeds(folder: Path) -> Iterable[bytes]:
    loop = "{%- for m in messages -%}\n{{ m.role | upper }}: {{ m['content'] | trim }}{% endfor %}"
    rich = (
        "{% macro show(m) %}<{{ m.role }}>{{ m | tojson }}{% endmacro %}{% set ns = "
        "namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ show(m) }}{{ ns.n }}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ 'a'.join(['b', 'c']) }}"
    )
    for source in (GEMMA_TEMPLATE, loop, rich):
        yield folders.pack({JINJA: folders.Entry(source.encode())})
    settings = {"chat_template": [{"name": "default", "template": loop}]}
    yield folders.pack({SETTINGS: folders.Entry(json.dumps(settings).encode())})


def _mutate(data: bytes, random: Random) -> bytes:
    files = folders.unpack(data)
    name = random.choice(list(files))
    content = files[name].content
    if name == SETTINGS:
        return folders.pack({name: folders.Entry(json_mutator.mutate(content, random))})
    if random.randrange(10) == 0:
        return folders.pack({name: folders.Entry(raw.flip(content, random))})
    source = mutate_template(content.decode(errors="replace"), random)
    return folders.pack({name: folders.Entry(source.encode("utf-8", "surrogatepass"))})


def _read(data: bytes, folder: Path) -> tuple[str, str]:
    folders.place(data, folder)
    template = load_template(folder)
    return template.source, template.render(MESSAGES, True, **TOKENS)


def _agree(data: bytes, folder: Path, answer: tuple[str, str]) -> None:
    """The text that transformers renders, which has no bounds of its own."""
    source, text = answer
    if "10**" in source:
        return  # transformers makes such a text before it knows whether anybody wants it
    try:
        theirs = _compile_jinja_template(source).render(
            messages=MESSAGES, tools=None, documents=None, add_generation_prompt=True, **TOKENS
        )
    except Exception as error:
        require(False, "transformers refuses the template", f"{error} of {source[:200]!r}")
    if "strftime_now" in source or " at 0x" in f"{text}{theirs}".lower():
        return  # a second may have passed; two objects have two addresses
    require(text == theirs, "another text than transformers renders", source[:200])


TARGETS = {"template": Target("template", _seeds, _mutate, _read, _agree, 1 << 12)}
