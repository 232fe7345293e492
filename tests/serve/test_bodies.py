"""Bodies that are small as text and large as objects, and errors that nobody expected."""

import json
import random
from typing import Any

import httpx
import pytest

from rgexport.serve import bodies, works
from rgexport.serve.bodies import require_simple
from rgexport.serve.errors import InvalidBody
from tests.serve.conftest import Serve, Served
from tests.serve.test_origins import ROUTES

JSON = {"Content-Type": "application/json"}
DEEP = b"[" * 500 + b"]" * 500


def post(server: Served, path: str, content: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers=JSON, timeout=60)


def measured(value: Any) -> tuple[int, int, int]:
    """Depth, lists and objects, and values that come after another one."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    items = [measured(item) for item in (value.values() if isinstance(value, dict) else value)]
    depth = 1 + max((item[0] for item in items), default=0)
    objects = 1 + sum(item[1] for item in items)
    return depth, objects, max(0, len(items) - 1) + sum(item[2] for item in items)


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
def test_structure_is_counted_as_json_has_it(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit is met exactly, whatever strings hold and wherever a piece ends."""
    monkeypatch.setattr(bodies, "_PIECE", piece)
    rng = random.Random(piece)
    for _ in range(50):
        value = [any_value(rng), any_value(rng)]
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        depth, objects, separators = measured(value)
        limits = {"MOST_DEPTH": depth, "MOST_OBJECTS": objects, "MOST_VALUES": objects + separators}
        for name, exact in limits.items():
            for other in limits:
                monkeypatch.setattr(bodies, other, 10**9)
            monkeypatch.setattr(bodies, name, exact)
            require_simple(data)
            monkeypatch.setattr(bodies, name, exact - 1)
            with pytest.raises(InvalidBody, match=f"more than {exact - 1} "):
                require_simple(data)


def test_an_empty_body_is_simple() -> None:
    require_simple(b"")


@pytest.mark.parametrize("field", ["tools", "messages", "response_format", "unknown", "logit_bias"])
@pytest.mark.parametrize("route", ROUTES[:5], ids=lambda route: route[0])
def test_500_levels_are_refused(field: str, route: tuple[str, bytes], server: Served) -> None:
    path, body = route
    answer = post(server, path, body[:-1] + b', "' + field.encode() + b'": ' + DEEP + b"}")
    assert answer.status_code == 400
    assert "more than 128 levels" in answer.json()["error"]["message"]


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_as_many_levels_as_are_allowed_are_no_failure(opening: bytes, serve: Serve) -> None:
    """Rendered by a template that writes tools, too."""
    from rgexport.chat.template import ChatTemplate

    with serve() as server:
        server.model.template = ChatTemplate(
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}", "test"
        )
        levels = 120 // opening.count(b"a") // 2 if opening.startswith(b"[{") else 120
        closing = opening.replace(b'"a":', b"")[::-1].translate(bytes.maketrans(b"[{", b"]}"))
        deep = opening * levels + b"1" + closing * levels
        tools = b', "max_tokens": 2, "tools": [{"function": ' + deep + b"}]}"
        answer = post(server, ROUTES[1][0], ROUTES[1][1][:-1] + tools)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "prompt",
    [
        b"[" + b"[]," * 250_000 + b"[]]",
        b"[" + b"0," * 2_200_000 + b"0]",
        b"[" + b"{}," * 250_000 + b"{}]",
    ],
    ids=["lists", "numbers", "objects"],
)
def test_millions_of_values_are_refused_unparsed(
    prompt: bytes, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "json", None)  # parsing would be an error 500
    answer = post(server, ROUTES[0][0], b'{"prompt": ' + prompt + b"}")
    assert answer.status_code == 400 and "more than" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["prompt", "stop", "tools", "messages", "tokens"])
def test_a_list_has_one_error(field: str, server: Served) -> None:
    """A hundred thousand would take seconds to describe."""
    from pydantic import TypeAdapter, ValidationError

    from rgexport.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest

    kinds = {"prompt": CompletionRequest, "tokens": DetokenizeRequest}
    body = {"messages": [{"role": "user", "content": "x"}]} | {field: [[{}]] * 100}
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kinds.get(field, ChatRequest)).validate_python(body)
    assert raised.value.error_count() < 6


@pytest.mark.parametrize("error", [RecursionError("deep"), KeyError("secret"), MemoryError()])
def test_an_unexpected_error_is_an_error_object(
    error: Exception,
    server: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(works, "messages_of", fail)
    answer = post(server, *ROUTES[1])
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the server failed; its log says why",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    log = capsys.readouterr().err
    assert type(error).__name__ in log and "secret" not in log and "Traceback" not in log


def test_the_schema_names_the_bodies(server: Served) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    body = schema["paths"]["/tokenize"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/TokenizeRequest"}
