"""The unchanged openai client, and the command line of `llm`, talk with a server."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import jsonschema
import numpy as np
import pytest

from rgexport.chat.sampling import log_probabilities
from rgexport.serve.requests import ChatRequest, CompletionRequest
from tests.chat.conftest import json_folder
from tests.serve.conftest import CHAT, COMPLETE, error_of, get, messages_of, post
from tests.toy_session import ToySession

__all__ = ["json_folder"]  # a fixture
openai = pytest.importorskip("openai")
HELLO: list[Any] = messages_of("hello")


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def client(server):
    return client_of(server)


@pytest.fixture
def create(client):
    """Asks for the completion of a chat."""
    return partial(client.chat.completions.create, model="toy", messages=HELLO)


def rows_of(server, ids):
    """Log probabilities of what follows each token, by the toy alone."""
    logits = ToySession(server.model.vocab_size).prefill(np.array([ids]), len(ids))[0]
    return log_probabilities(logits)


def text_of(chunks) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_chat_is_what_the_model_says(client, create, server):
    expected = server.model.chat(HELLO, max_new_tokens=9)
    answer = create(temperature=0, max_completion_tokens=9)
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0, "it was no client that knew it"
    assert [model.id for model in client.models.list()] == ["toy"]
    ignored = {"mirostat": 2, "metadata": {"a": 1}}
    assert create(max_tokens=1, extra_body=ignored).choices[0].finish_reason == "length"


def test_a_stream_has_the_same_text(create):
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 30}
    whole = create(**asked)
    chunks = [*create(**asked, stream=True, stream_options={"include_usage": True})]
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_have_seeds_of_their_own(create):
    asked = {"max_tokens": 12, "temperature": 1.0}
    three = create(**asked, seed=7, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len({*texts}) == 3
    singles = [create(**asked, seed=seed).choices[0].message.content for seed in (7, 8, 9)]
    assert texts == singles
    streamed = {0: "", 1: "", 2: ""}
    for chunk in create(**asked, seed=7, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert [*streamed.values()] == texts


def test_log_probabilities(create, server):
    answer = create(max_tokens=5, temperature=0, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    prompt, ids = server.model.conversation_prompt(HELLO).ids, [token.id for token in content]
    for token, row in zip(content, rows_of(server, prompt + ids)[-6:-1], strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        order = np.argsort(-row, kind="stable")[:4]
        assert [top.id for top in token.top_logprobs] == order.tolist()
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token


@pytest.mark.parametrize("streaming", [False, True])
def test_stop_strings_across_tokens(streaming, serve, gemma):
    with serve() as server:
        server.session.script = [i for c in "hello the model" for i in gemma.encode_text(c)]
        answer = client_of(server).chat.completions.create(
            model="toy", messages=HELLO, stop=["o the", "never"], temperature=0, stream=streaming
        )
        chunks = [*answer] if streaming else []
    text = text_of(chunks) if streaming else answer.choices[0].message.content
    reason = (chunks[-1] if streaming else answer).choices[0].finish_reason
    assert (text, reason) == ("hell", "stop")


def object_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    closed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties} | closed


SCHEMAS: dict[str, dict[str, Any]] = {
    "integer": object_schema(age={"type": "integer", "minimum": 0, "maximum": 99}),
    "array": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
    "nested": object_schema(
        name={"type": "string", "maxLength": 6}, inner=object_schema(ok={"type": "boolean"})
    ),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_always_parses(schema, create):
    named = {"name": "x", "schema": SCHEMAS[schema]}
    asked = {"response_format": {"type": "json_schema", "json_schema": named}}
    for seed in range(3):
        (choice,) = create(temperature=1.5, seed=seed, max_tokens=200, **asked).choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMAS[schema])


@pytest.mark.parametrize(
    ("field", "source", "pattern"),
    [
        ("regex", "[0-9]{3}-[a-f]{2}", r"[0-9]{3}-[a-f]{2}"),
        ("grammar", 'start: "yes" | "no"', "yes|no"),
        ("grammar", 'root ::= "a" [0-9] [0-9]', "a[0-9]{2}"),
    ],
)
def test_grammars(field, source, pattern, create):
    answer = create(temperature=1.0, max_tokens=30, extra_body={field: source})
    assert re.fullmatch(pattern, answer.choices[0].message.content)


def test_completions(client, server):
    """Texts and ids, several at once, with an echo and log probabilities."""
    ids = server.model.text_ids("hello the model")
    alone = server.model.complete("hello the model", max_new_tokens=4).reply().text
    create = partial(client.completions.create, model="toy", max_tokens=4, temperature=0)
    answer = create(prompt=["hello the model", "it is 42"], echo=True, logprobs=2)
    assert answer.choices[0].text == "hello the model" + alone
    assert answer.choices[1].text.startswith("it is 42") and answer.choices[1].index == 1
    assert len(answer.choices[0].logprobs.tokens) == len(ids) + 4
    assert answer.usage.prompt_tokens == len(ids) + len(server.model.text_ids("it is 42"))
    assert create(prompt=ids).choices[0].text == alone


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(stream, client, server):
    """Also where the server knows the state after the prompt, and over several chunks."""
    ids = server.model.text_ids("hello the model " * 30)
    server.model.read(ids).result()
    server.model.scheduler._scored_chunk = 50
    asked = {"prompt": ids, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 3}
    answer = client.completions.create(model="toy", stream=stream, **asked)
    parts = [c.choices[0].logprobs for c in (answer if stream else [answer]) if c.choices]
    logprobs = [value for part in parts if part for value in part.token_logprobs]
    tops = [top for part in parts if part for top in part.top_logprobs]
    rows = rows_of(server, ids)
    assert len(logprobs) == len(tops) == len(ids) + 2
    assert logprobs[0] is None and tops[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx(rows[range(len(ids) - 1), ids[1:]], abs=1e-5)
    for top, best in zip(tops[1 : len(ids)], rows[:-1].max(axis=1), strict=True):
        assert max(top.values()) == pytest.approx(best, abs=1e-5) and len(top) <= 3


def test_lm_eval_scores_over_http(server, json_folder, tmp_path):
    """lm_eval's `local-completions` gets the log likelihoods that the model itself gives."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    shutil.copy(json_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
    client = completions.LocalCompletionsAPI(
        base_url=server.url + COMPLETE, tokenizer=str(tmp_path), model="toy"
    )
    pair = "hello the", " model said"
    ((likelihood, is_greedy),) = client.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    context, whole = client.tok_encode(pair[0]), client.tok_encode("".join(pair))
    rows, answer = rows_of(server, whole)[len(context) - 1 : -1], whole[len(context) :]
    expected = rows[range(len(rows)), answer].sum()
    assert likelihood == pytest.approx(expected, abs=1e-5) and likelihood < -1
    assert is_greedy == bool((rows.argmax(1) == answer).all())


def test_null_counts_as_left_out_and_the_schema_says_so(server):
    asked: dict[str, Any] = dict.fromkeys([*ChatRequest.model_fields, "user"])
    asked |= {"messages": HELLO, "max_tokens": 3, "seed": 1}
    asked["stream_options"] = {"include_usage": None}
    assert post(server, CHAT, asked).status_code == 200
    asked = dict.fromkeys(CompletionRequest.model_fields) | {"prompt": "hello"}
    assert post(server, COMPLETE, asked).status_code == 200
    schema = get(server, "/openapi.json").json()
    named = {"$ref": "#/components/schemas/CompletionRequest", **schema}
    jsonschema.Draft202012Validator(named).validate(asked)
    for path in schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"] and "4XX" in operation["responses"]
    body = schema["paths"]["/tokenize"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/TokenizeRequest"}
    answer = post(server, COMPLETE, asked | {"prompt": None})
    assert error_of(answer) and answer.json()["error"]["param"] == "prompt"


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
        ({"n": 99}, "n: Input should be less than or equal to 16"),
    ],
)
def test_errors_are_openais(fields, message, create):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        create(**fields)
    assert caught.value.body["type"] == "invalid_request_error"


def test_llm_talks_with_it(server, tmp_path):
    """Simon Willison's `llm`, as its documentation sets up a server of this kind."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: toy\n  model_name: toy\n  api_base: {server.url}/v1\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
    command = "-m llm -m toy -o max_tokens 8 -o temperature 0 hello".split()
    run = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == server.model.chat(HELLO, max_new_tokens=8).text.strip()


def test_hugging_faces_client_talks_with_it(server):
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=f"{server.url}/v1")
    expected = server.model.chat(HELLO, max_new_tokens=8, stop=["x"]).text
    asked = {"model": "toy", "max_tokens": 8, "temperature": 0.0, "stop": ["x"]}
    whole = client.chat_completion(HELLO, **asked)
    assert whole.choices[0].message.content == expected
    assert text_of(client.chat_completion(HELLO, stream=True, **asked)) == expected
