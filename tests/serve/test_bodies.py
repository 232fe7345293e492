"""Bodies that are small as text and large as objects, and errors that nobody expected."""

import json
import random
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rgexport.chat.template import ChatTemplate
from rgexport.serve import bodies, works
from rgexport.serve.bodies import require_simple
from rgexport.serve.errors import InvalidBody
from rgexport.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest
from tests.serve.conftest import CHAT, COMPLETE, error_of, post
from tests.serve.test_origins import ROUTES


def structure_of(value: Any) -> tuple[int, int, int]:
    """Depth, lists and objects, and values that come after another one."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    items = [structure_of(item) for item in (value.values() if isinstance(value, dict) else value)]
    depths, objects, separators = zip(*items, strict=True) if items else ((0,), (), ())
    return 1 + max(depths), 1 + sum(objects), max(0, len(items) - 1) + sum(separators)


def any_value(rng: random.Random, depth: int = 0) -> Any:
    texts = ['"', "\\", '\\"', "[{", "]}", ",,", "é", ""]
    match rng.randrange(4 if depth < 6 else 2):
        case 0:
            return rng.choice([None, 1, -2.5, True])
        case 1:
            return "".join(rng.choices(texts, k=rng.randrange(5)))
        case 2:
            return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
        case _:
            return {f"{i}{rng.choice(texts)}": any_value(rng, depth + 1) for i in range(3)}


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_structure_is_counted_as_json_has_it(piece, monkeypatch):
    """Each limit is met exactly, whatever strings hold and wherever a piece ends."""
    monkeypatch.setattr(bodies, "_PIECE", piece)
    require_simple(b"")
    rng = random.Random(piece)
    for _ in range(50):
        value = [any_value(rng), any_value(rng)]
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        depth, objects, separators = structure_of(value)
        limits = {"MOST_DEPTH": depth, "MOST_OBJECTS": objects, "MOST_VALUES": objects + separators}
        for name, exact in limits.items():
            for other in limits:
                monkeypatch.setattr(bodies, other, 10**9)
            monkeypatch.setattr(bodies, name, exact)
            require_simple(data)
            monkeypatch.setattr(bodies, name, exact - 1)
            with pytest.raises(InvalidBody, match=f"more than {exact - 1} "):
                require_simple(data)


@pytest.mark.parametrize("route", ROUTES[:5], ids=lambda route: route[0])
def test_500_levels_are_refused(route, server):
    path, body = route
    deep = body[:-1] + b', "unknown": ' + b"[" * 500 + b"]" * 500 + b"}"
    assert "more than 128 levels" in error_of(post(server, path, deep))


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_as_many_levels_as_are_allowed_are_no_failure(opening, closing, serve):
    """Rendered by a template that writes tools, too."""
    with serve() as server:
        server.model.template = ChatTemplate(
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}", "test"
        )
        deep = opening * 120 + b"1" + closing * 120
        tools = b', "max_tokens": 2, "tools": [{"function": ' + deep + b"}]}"
        answer = post(server, CHAT, ROUTES[1][1][:-1] + tools)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("item", "count"), [(b"[]", 250_000), (b"0", 2_200_000), (b"{}", 250_000)])
def test_millions_of_values_are_refused_unparsed(item, count, server, monkeypatch):
    monkeypatch.setattr(bodies, "json", None)  # parsing would be an error 500
    body = b'{"prompt": [' + (item + b",") * count + item + b"]}"
    assert "more than" in error_of(post(server, COMPLETE, body))


@pytest.mark.parametrize("field", ["prompt", "stop", "tools", "messages", "tokens"])
def test_a_list_has_one_error(field):
    """A hundred thousand would take seconds to describe."""
    kinds = {"prompt": CompletionRequest, "tokens": DetokenizeRequest}
    body = {"messages": [{"role": "user", "content": "x"}]} | {field: [[{}]] * 100}
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kinds.get(field, ChatRequest)).validate_python(body)
    assert raised.value.error_count() < 6


@pytest.mark.parametrize("error", [RecursionError("deep"), KeyError("secret"), MemoryError()])
def test_an_unexpected_error_is_an_error_object(error, server, monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(works, "messages_of", fail)
    answer = post(server, *ROUTES[1])
    assert error_of(answer, 500) == "the server failed; its log says why"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    log = capsys.readouterr().err
    assert type(error).__name__ in log and "secret" not in log and "Traceback" not in log
