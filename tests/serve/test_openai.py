"""The unchanged openai client, and the command line of `llm`, talk with a server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from rgexport.chat.sampling import log_probabilities
from tests.serve.conftest import Serve, Served
from tests.toy_session import ToySession

openai = pytest.importorskip("openai")
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_a_chat_is_what_the_model_says(client: Any, server: Served) -> None:
    expected = server.model.chat(HELLO, max_new_tokens=9)
    found = client.chat.completions.create(
        model="toy", messages=HELLO, temperature=0, max_completion_tokens=9
    )
    (choice,) = found.choices
    assert choice.message.content == expected.text and choice.finish_reason == "length"
    assert found.usage.completion_tokens == 9
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.prompt_tokens_details.cached_tokens == expected.prompt_tokens
    assert [model.id for model in client.models.list()] == ["toy"]


def test_a_stream_has_the_same_text(client: Any, server: Served) -> None:
    asked = {"model": "toy", "messages": HELLO, "temperature": 1.0, "seed": 5, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    chunks = [
        *client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_have_seeds_of_their_own(client: Any) -> None:
    asked = {"model": "toy", "messages": HELLO, "max_tokens": 12, "temperature": 1.0}
    three = client.chat.completions.create(**asked, seed=7, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len({*texts}) == 3
    singles = [
        client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (7, 8, 9)
    ]
    assert texts == singles
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**asked, seed=7, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert [*streamed.values()] == texts


def test_log_probabilities(client: Any, server: Served) -> None:
    found = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=4
    )
    content = found.choices[0].logprobs.content
    prompt = server.model.conversation_prompt(HELLO).ids
    ids = [token.id for token in content]
    logits = ToySession(server.model.vocab_size).prefill(np.array([prompt + ids]), 6)[0, :-1]
    for token, row in zip(content, log_probabilities(logits), strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        order = np.argsort(-row, kind="stable")[:4]
        assert [top.id for top in token.top_logprobs] == order.tolist()
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token


def test_stop_strings_across_tokens(serve: Serve, gemma: Any) -> None:
    with serve() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        letters = [i for c in "hello the model" for i in gemma.encode_text(c)]
        for streaming in (False, True):
            server.model.read([5]).result()  # what the last reply left to be read is read before
            server.session.script = list(letters)
            server.model.scheduler.store.clear()
            found = client.chat.completions.create(
                model="toy",
                messages=HELLO,
                stop=["o the", "never"],
                temperature=0,
                stream=streaming,
            )
            if streaming:
                chunks = [*found]
                text = "".join(c.choices[0].delta.content or "" for c in chunks)
                reason = chunks[-1].choices[0].finish_reason
            else:
                text, reason = found.choices[0].message.content, found.choices[0].finish_reason
            assert (text, reason) == ("hell", "stop")


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "inner": {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}},
                "required": ["ok"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "inner"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=["integer", "array", "nested"])
@pytest.mark.parametrize("seed", range(4))
def test_a_schema_always_parses(schema: dict[str, Any], seed: int, client: Any) -> None:
    found = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        temperature=1.5,
        seed=seed,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert found.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(found.choices[0].message.content), schema)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"grammar": 'root ::= "a" [0-9] [0-9]'}, "a[0-9]{2}"),
    ],
)
def test_grammars(fields: dict[str, str], pattern: str, client: Any) -> None:
    found = client.chat.completions.create(
        model="toy", messages=HELLO, temperature=1.0, max_tokens=30, extra_body=fields
    )
    import re

    assert re.fullmatch(pattern, found.choices[0].message.content)


def test_completions(client: Any, server: Served) -> None:
    """Texts and ids, several at once, with an echo and log probabilities."""
    ids = server.model.text_ids("hello the model")
    alone = server.model.complete("hello the model", max_new_tokens=4).reply().text
    found = client.completions.create(
        model="toy",
        prompt=["hello the model", "it is 42"],
        max_tokens=4,
        temperature=0,
        echo=True,
        logprobs=2,
    )
    assert found.choices[0].text == "hello the model" + alone
    assert found.choices[1].text.startswith("it is 42") and found.choices[1].index == 1
    assert len(found.choices[0].logprobs.tokens) == 4
    again = client.completions.create(model="toy", prompt=ids, max_tokens=4, temperature=0)
    assert again.choices[0].text == alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature: Input should be greater"),
        ({"messages": []}, "messages: List should have at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "function"}]}, "tools: the chat template of this model has none"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "chat template"),
        ({"logit_bias": {"x": 1}}, "logit_bias: its keys are not token ids"),
        ({"response_format": {"type": "json_schema"}}, "its json_schema is missing"),
        ({"extra_body": {"grammar": "start: ("}}, "the grammar cannot be used"),
        ({"extra_body": {"grammar": 'start: "a"', "regex": "a"}}, "grammar and regex: give only"),
        ({"n": 99}, "n: Input should be less than or equal to 16"),
    ],
)
def test_errors_are_openais(fields: dict[str, Any], message: str, client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "toy", "messages": HELLO} | fields)
    assert caught.value.body["type"] == "invalid_request_error"


def test_unknown_fields_are_no_errors(client: Any) -> None:
    found = client.chat.completions.create(
        model="any", messages=HELLO, max_tokens=1, extra_body={"mirostat": 2, "metadata": {"a": 1}}
    )
    assert found.choices[0].finish_reason == "length"


def test_llm_talks_with_it(server: Served, tmp_path: Path) -> None:
    """Simon Willison's `llm`, as its documentation sets up a server of this kind."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: toy\n  model_name: toy\n  api_base: {server.url}/v1\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
    command = [sys.executable, "-m", "llm", "-m", "toy", "-o", "max_tokens", "8", "hello"]
    run = subprocess.run(
        [*command, "-o", "temperature", "0"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == server.model.chat(HELLO, max_new_tokens=8).text.strip()


def test_hugging_faces_client_talks_with_it(server: Served) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=f"{server.url}/v1")
    expected = server.model.chat(HELLO, max_new_tokens=8, stop=["x"]).text
    asked = {"max_tokens": 8, "temperature": 0.0, "stop": ["x"]}
    whole = client.chat_completion(HELLO, model="toy", **asked)
    assert whole.choices[0].message.content == expected
    chunks = client.chat_completion(HELLO, model="toy", stream=True, **asked)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
