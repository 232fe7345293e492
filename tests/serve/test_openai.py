"""The unchanged openai client, and the command line of `llm`, talk with a server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from rgexport.chat.sampling import log_probabilities
from rgexport.serve.app import Settings
from rgexport.serve.requests import ChatRequest, CompletionRequest
from tests.chat.conftest import json_folder
from tests.serve.conftest import Serve, Served
from tests.toy_session import ToySession

__all__ = ["json_folder"]  # a fixture
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
    assert found.usage.prompt_tokens_details.cached_tokens == 0, "it was no client that knew it"
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
    assert len(found.choices[0].logprobs.tokens) == len(ids) + 4
    assert found.usage.prompt_tokens == len(ids) + len(server.model.text_ids("it is 42"))
    again = client.completions.create(model="toy", prompt=ids, max_tokens=4, temperature=0)
    assert again.choices[0].text == alone


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(
    stream: bool, client: Any, server: Served
) -> None:
    """Also where the server knows the state after the prompt, and over several chunks."""
    ids = server.model.text_ids("hello the model " * 30)
    server.model.read(ids).result()
    server.model.scheduler._scored_chunk = 50
    answer = client.completions.create(
        model="toy", prompt=ids, max_tokens=2, temperature=0, echo=True, logprobs=3, stream=stream
    )
    parts = [c.choices[0].logprobs for c in (answer if stream else [answer]) if c.choices]
    logprobs = [value for part in parts if part for value in part.token_logprobs]
    tops = [top for part in parts if part for top in part.top_logprobs]
    expected = ToySession(server.model.vocab_size).prefill(np.array([ids]), len(ids))[0]
    rows = log_probabilities(expected)
    assert len(logprobs) == len(tops) == len(ids) + 2
    assert logprobs[0] is None and tops[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx(rows[range(len(ids) - 1), ids[1:]], abs=1e-5)
    best = np.sort(rows[:-1], axis=1)[:, :-4:-1]
    for top, values in zip(tops[1 : len(ids)], best, strict=True):
        assert max(top.values()) == pytest.approx(values[0], abs=1e-5) and len(top) <= 3


def test_lm_eval_scores_over_http(server: Served, json_folder: Path, tmp_path: Path) -> None:
    """lm_eval's `local-completions` gets the log likelihoods that the model itself gives."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    shutil.copy(json_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
    client = completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", tokenizer=str(tmp_path), model="toy"
    )
    pair = "hello the", " model said"
    request = Instance("loglikelihood", {}, pair, 0)
    ((likelihood, is_greedy),) = client.loglikelihood([request])
    context, whole = client.tok_encode(pair[0]), client.tok_encode("".join(pair))
    logits = ToySession(server.model.vocab_size).prefill(np.array([whole]), len(whole))[0]
    rows = log_probabilities(logits)[len(context) - 1 : -1]
    expected = rows[range(len(rows)), whole[len(context) :]]
    assert likelihood == pytest.approx(expected.sum(), abs=1e-5) and likelihood < -1
    assert is_greedy == bool((rows.argmax(1) == whole[len(context) :]).all())


def test_null_counts_as_left_out(server: Served) -> None:
    names = [*ChatRequest.model_fields, "user"]
    asked = {name: None for name in names} | {"messages": HELLO, "max_tokens": 3, "seed": 1}
    asked["stream_options"] = {"include_usage": None}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=asked).status_code == 200
    asked = {name: None for name in CompletionRequest.model_fields} | {"prompt": "hello"}
    assert httpx.post(f"{server.url}/v1/completions", json=asked).status_code == 200
    schema = httpx.get(f"{server.url}/openapi.json").json()
    jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/CompletionRequest", **schema}
    ).validate(asked)
    asked["prompt"] = None
    answer = httpx.post(f"{server.url}/v1/completions", json=asked)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


def test_the_schema_has_the_statuses_of_answers(server: Served) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    for routes in paths.values():
        for operation in routes.values():
            assert "422" not in operation["responses"] and "4XX" in operation["responses"]


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


def test_requests_that_find_a_row_do_not_count_as_waiting(serve: Serve) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 2}
    with serve(rows=8, max_waiting=0) as server:
        url = f"{server.url}/v1/chat/completions"
        assert httpx.post(url, json=asked).status_code == 200
        assert httpx.post(url, json=asked | {"n": 8}).status_code == 200
    with serve(rows=8, max_waiting=4) as server:
        url = f"{server.url}/v1/chat/completions"
        assert len(httpx.post(url, json=asked | {"n": 8}).json()["choices"]) == 8


def test_more_replies_than_can_ever_wait_are_refused(serve: Serve) -> None:
    with serve(rows=2, max_waiting=30) as server:
        asked = {"prompt": ["hello"] * 64, "n": 16, "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked)
        assert answer.status_code == 400
        assert "asks for 1024 replies; this server takes up to 32" in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_has_any_case(serve: Serve, scheme: str) -> None:
    with serve(Settings(api_key="secret", log=False)) as server:
        for key, status in (("secret", 200), ("Secret", 401), ("secret2", 401)):
            headers = {"Authorization": f"{scheme} {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
        headers = {"Authorization": "Basic secret"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
