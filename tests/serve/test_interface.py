"""Unchanged clients talk with a server; what is not OpenAI's; and fuzzed requests."""

import json
from functools import partial

import httpx
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.sampling import log_probabilities
from rgexport.serve.bodies import ChatRequest, CompletionRequest
from rgexport.serve.endpoints import AFFINITY
from rgexport.serve.server import ServerSettings
from tests.serve.conftest import CHAT, COMPLETE, JSON, cached, error_of, messages_of, said
from tests.toy_session import ToySession

HELLO = messages_of("hello")


def asked_chat(server, **fields):
    return server.post(CHAT, {"messages": HELLO, "max_tokens": 12} | fields)


def text_of(choice):
    return choice["message"]["content"]


def events_of(answer):
    """Returns the chunks of a stream."""
    *events, last = answer.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def streamed(events, index=0):
    """Returns the text of a choice."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)


def rows_of(server, ids):
    """Log probabilities of what follows each token, by the toy alone."""
    logits = ToySession(server.model.vocab_size).prefill(np.array([ids]), len(ids))[0]
    return log_probabilities(logits)


def test_any_name_is_the_only_models(serve, capsys):
    with serve(ServerSettings()) as server:
        assert [server.chat("hi", model="gpt")["model"] for _ in range(2)] == ["toy"] * 2
    assert capsys.readouterr().err.count("for the model 'gpt' are answered by toy") == 1


def test_openais_client_gets_what_the_model_says(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    expected = server.model.chat(HELLO, max_new_tokens=9)
    asked = {"model": "toy", "messages": HELLO, "temperature": 0, "max_completion_tokens": 9}
    create = partial(client.chat.completions.create, **asked, extra_body={"mirostat": 2})
    answer = create(logprobs=True, top_logprobs=4)
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.finish_reason == "length"
    prompt = server.model.conversation_prompt(HELLO).ids
    ids = [token.id for token in choice.logprobs.content]
    rows = rows_of(server, prompt + ids)[len(prompt) - 1 : -1]
    for token, row in zip(choice.logprobs.content, rows, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        order = np.argsort(-row, kind="stable")[:4]
        assert [top.id for top in token.top_logprobs] == order.tolist()
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0, "it was no client that knew it"
    chunks = [*create(stream=True, stream_options={"include_usage": True})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == expected.text and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 9 and len({chunk.id for chunk in chunks}) == 1
    assert [model.id for model in client.models.list()] == [client.models.retrieve("toy").id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be greater"):
        create(temperature=-1)


def test_choices_have_seeds_of_their_own(server):
    """A prediction changes no reply, and a stop string ends it."""
    choices = asked_chat(server, seed=7, n=3).json()["choices"]
    texts = [text_of(choice) for choice in choices]
    assert [choice["index"] for choice in choices] == [0, 1, 2] and len({*texts}) == 3
    singles = [asked_chat(server, seed=seed).json()["choices"][0] for seed in (7, 8, 9)]
    assert texts == [text_of(single) for single in singles]
    prediction = {"type": "content", "content": [{"type": "text", "text": texts[0]}]}
    events = events_of(asked_chat(server, seed=7, n=3, stream=True, prediction=prediction))
    assert [streamed(events, index) for index in range(3)] == texts
    (choice,) = asked_chat(server, seed=7, stop=["never", texts[0][3:6]]).json()["choices"]
    assert (text_of(choice), choice["finish_reason"]) == (texts[0][:3], "stop")


PROPERTIES = {
    "age": {"type": "integer", "minimum": 0, "maximum": 99},
    "name": {"type": "string", "maxLength": 6},
    "colors": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": [*PROPERTIES]}


def test_a_schema_always_parses(server):
    schema = SCHEMA | {"additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(5):
        asked = {"temperature": 1.5, "seed": seed, "max_tokens": 400, "response_format": named}
        (choice,) = asked_chat(server, **asked).json()["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text_of(choice)), schema)


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(is_stream, server):
    """Also where the server knows the state after the prompt, and over several chunks."""
    text = "hello the model " * 30
    ids = server.model.text_ids(text)
    alone = server.model.complete(text, max_new_tokens=2).reply().text
    server.model.scheduler._scored_chunk = 50
    asked = {"prompt": ids, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 3}
    answer = server.post(COMPLETE, asked | {"stream": is_stream})
    events = events_of(answer) if is_stream else [answer.json()]
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == text + alone
    parts = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    logprobs = [value for part in parts for value in part["token_logprobs"]]
    tops = [top for part in parts for top in part["top_logprobs"]]
    rows = rows_of(server, ids)
    assert len(logprobs) == len(tops) == len(ids) + 2
    assert logprobs[0] is None and tops[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx(rows[range(len(ids) - 1), ids[1:]], abs=1e-5)
    for top, best in zip(tops[1 : len(ids)], rows[:-1].max(axis=1), strict=True):
        assert max(top.values()) == pytest.approx(best, abs=1e-5) and len(top) <= 3


def test_null_counts_as_left_out_and_the_schema_says_so(server):
    nulls = dict.fromkeys({*ChatRequest.model_fields} - {"messages"})
    assert asked_chat(server, **(nulls | {"max_tokens": 3})).status_code == 200
    asked = dict.fromkeys(CompletionRequest.model_fields) | {"prompt": "hello"}
    assert server.post(COMPLETE, asked).status_code == 200
    schema = server.get("/openapi.json").json()
    named = {"$ref": "#/components/schemas/CompletionRequest", **schema}
    jsonschema.Draft202012Validator(named).validate(asked)
    for path in schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"] and "4XX" in operation["responses"]
    answer = server.post(COMPLETE, asked | {"prompt": None})
    assert error_of(answer) and answer.json()["error"]["param"] == "prompt"


IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1"),
        ({"messages": IMAGE}, "messages.0.content.0.type: Input should be 'text'"),
        ({"tools": [{"type": "function"}]}, "tools: the chat template of this model has none"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "chat template"),
        ({"logit_bias": {"x": 1}}, "logit_bias: its keys are not token ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: "),
        ({"response_format": {"type": "json_schema"}}, "its json_schema is missing"),
        ({"grammar": "start: ("}, "the grammar cannot be used"),
        ({"regex": "[", "grammar": "x"}, "grammar and regex: give only one"),
        ({"n": 99}, "n: Input should be less than or equal to 16"),
    ],
)
def test_errors_are_openais(fields, message, server):
    answer = asked_chat(server, **fields)
    assert message in error_of(answer)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_tokens_there_and_back(server):
    text = "hello 🐢 <end_of_turn> é"
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert ids == server.model.tokenizer.encode_text(text) and 107 not in ids
    with_bos = server.post("/tokenize", {"content": text, "add_special": True}).json()["tokens"]
    assert with_bos == [2, *ids]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text}


def test_a_template_is_applied_and_markup_in_a_message_stays_text(server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi<end_of_turn>"}]}]
    applied = server.post("/apply-template", {"messages": messages}).json()
    prompt = "<bos><start_of_turn>user\nhi<end_of_turn><end_of_turn>\n<start_of_turn>model\n"
    assert applied["prompt"] == prompt and applied["tokens"].count(107) == 1
    assert server.chat("hi<end_of_turn>")["usage"]["prompt_tokens"] == len(applied["tokens"])


def test_a_state_is_saved_restored_and_erased(server):
    talk, reply = {"filename": "talk"}, said(server.chat("hello there", id_slot=3))
    saved = server.post("/slots/3?action=save", talk).json()
    assert saved["n_saved"] > 5 and saved["filename"] == "talk"
    slots = {slot["id"]: slot for slot in server.get("/slots").json()}
    assert 10 < slots[3]["n_prompt_tokens"] <= saved["n_saved"] + 1
    server.model.scheduler.store.clear()
    restored = server.post("/slots/5?action=restore", talk).json()
    assert restored["n_restored"] == saved["n_saved"]
    again = server.chat("hello there", reply, "and now")
    assert cached(again) == restored["n_restored"], "the reply is part of what was saved"
    server.model.scheduler.store.clear()
    assert said(again) == said(server.chat("hello there", reply, "and now"))
    assert server.post("/slots/5?action=erase", talk).status_code == 200
    gone = server.post("/slots/5?action=restore", talk)
    assert "no saved state 'talk'" in error_of(gone, 404)
    assert "/v1/chat/completions" in error_of(server.post("/v2/chat", talk), 404)
    assert httpx.post(f"{server.url}/slots/5?action=erase").json()["n_erased"] > 0, "without a body"


@pytest.mark.parametrize("name", ["../talk", "/etc/passwd", "a/b", "..", ".a", "a\0b", "", "ä"])
def test_a_path_in_a_name_goes_nowhere(name, server):
    for action in ("save", "restore", "erase"):
        answer = server.post(f"/slots/0?action={action}", {"filename": name})
        assert error_of(answer) and answer.json()["error"]["param"] == "filename"


def test_the_affinity_of_a_conversation(server):
    first, same, other = (
        server.post(CHAT, {"messages": messages_of(*texts), "max_tokens": 1}).headers[AFFINITY]
        for texts in (["hello"], ["hello", "it is", "and"], ["goodbye"])
    )
    assert first == same != other


def test_a_key(serve):
    with serve(ServerSettings(log=False, api_key="open")) as server:
        assert server.get("/health").status_code == 200
        for key in ("", "Bearer ope", "Bearer Open", "Bearer open2", "open", "Basic open"):
            for path in ("/v1/models", "/metrics", "/slots", "/none"):
                answer = server.get(path, **({"Authorization": key} if key else {}))
                assert error_of(answer, 401)
                assert answer.json()["error"]["type"] == "authentication_error"
        for scheme in ("Bearer", "bearer"):
            assert server.get("/v1/models", Authorization=f"{scheme} open").status_code == 200


@pytest.mark.parametrize("is_honest", [True, False])
def test_a_body_that_is_too_large(is_honest, serve):
    data = b'{"content": "' + b"x" * 5000 + b'"}'
    with serve(ServerSettings(log=False, body_bytes=1000)) as server:
        content = data if is_honest else iter([data])
        answer = httpx.post(f"{server.url}/tokenize", content=content, headers=JSON)
        assert error_of(answer, 413) == "the request is larger than 1000 bytes"
        assert server.post("/tokenize", {"content": "x"}).status_code == 200


SINGLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY = st.recursive(
    SINGLE | st.just("\ud800"),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3),
    max_leaves=5,
)
FIELDS = """messages prompt stream max_tokens temperature top_p top_k min_p stop seed n logprobs
top_logprobs logit_bias response_format grammar regex presence_penalty repetition_penalty echo
id_slot tools content tokens filename user stream_options prediction""".split()
GOOD = {"messages": HELLO, "prompt": "hello", "content": "hello", "tokens": [5, 6]}
SLOTS = ["/slots/0?action=save", "/slots/1?action=erase"]
PATHS = st.sampled_from([CHAT, COMPLETE, "/tokenize", "/detokenize", "/apply-template", *SLOTS])
CHANGES = st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=3)


@settings(max_examples=200)
@given(path=PATHS, sent=CHANGES | st.binary(max_size=200))
def test_no_body_is_a_500(path, sent, server):
    if isinstance(sent, dict):
        sent = GOOD | sent
        sent["max_tokens"] = sent["max_tokens"] if isinstance(sent.get("max_tokens"), str) else 2
    answer = server.post(path, sent)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"] and "Traceback" not in answer.text
