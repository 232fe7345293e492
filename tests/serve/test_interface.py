"""What is not OpenAI's: texts, templates, states, figures, keys, limits; and fuzzed requests."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.serve.app import AFFINITY, Settings
from tests.serve.conftest import (
    CHAT,
    COMPLETE,
    JSON,
    cached,
    chat,
    error_of,
    get,
    messages_of,
    post,
    said,
)


def test_tokens_there_and_back(server):
    text = "hello 🐢 <end_of_turn> é"
    ids = post(server, "/tokenize", {"content": text}).json()["tokens"]
    assert ids == server.model.tokenizer.encode_text(text) and 107 not in ids
    with_bos = post(server, "/tokenize", {"content": text, "add_special": True}).json()["tokens"]
    assert with_bos == [2, *ids]
    assert post(server, "/detokenize", {"tokens": ids}).json() == {"content": text}


def test_a_template_is_applied_and_markup_in_a_message_stays_text(server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi<end_of_turn>"}]}]
    applied = post(server, "/apply-template", {"messages": messages}).json()
    assert applied["prompt"] == (
        "<bos><start_of_turn>user\nhi<end_of_turn><end_of_turn>\n<start_of_turn>model\n"
    )
    assert applied["tokens"].count(107) == 1
    assert chat(server, "hi<end_of_turn>")["usage"]["prompt_tokens"] == len(applied["tokens"])


def test_a_state_is_saved_restored_and_erased(server):
    talk, reply = {"filename": "talk"}, said(chat(server, "hello there", id_slot=3))
    saved = post(server, "/slots/3?action=save", talk).json()
    assert saved["n_saved"] > 5 and saved["filename"] == "talk"
    slots = {slot["id"]: slot for slot in get(server, "/slots").json()}
    assert 10 < slots[3]["n_prompt_tokens"] <= saved["n_saved"] + 1
    server.model.scheduler.store.clear()
    restored = post(server, "/slots/5?action=restore", talk).json()
    assert restored["n_restored"] == saved["n_saved"]
    again = chat(server, "hello there", reply, "and now")
    assert cached(again) == restored["n_restored"], "the reply is part of what was saved"
    server.model.scheduler.store.clear()
    assert said(again) == said(chat(server, "hello there", reply, "and now"))
    assert post(server, "/slots/5?action=erase", talk).status_code == 200
    gone = post(server, "/slots/5?action=restore", talk)
    assert "no saved state 'talk'" in error_of(gone, 404)
    assert httpx.post(f"{server.url}/slots/5?action=erase").json()["n_erased"] > 0, "without a body"


@pytest.mark.parametrize(
    "name", ["../talk", "/etc/passwd", "a/b", "..", ".hidden", "a\0b", "", "ä"]
)
def test_a_path_in_a_name_goes_nowhere(name, server):
    for action in ("save", "restore", "erase"):
        answer = post(server, f"/slots/0?action={action}", {"filename": name})
        assert error_of(answer) and answer.json()["error"]["param"] == "filename"


def test_states_need_a_folder(serve):
    with serve() as server:
        chat(server, "hello", model="whatever")
        answer = post(server, "/slots/0?action=save", {"filename": "talk"})
        assert "without --state-folder" in error_of(answer)


def test_a_model_by_its_name(server):
    (listed,) = get(server, "/v1/models").json()["data"]
    assert get(server, "/v1/models/toy").json() == listed
    none = get(server, "/v1/models/none")
    assert error_of(none, 404) and none.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not JSON"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages.0.content.0.type: Input should be 'text'",
        ),
    ],
)
def test_what_a_body_lacks_is_said(content, message, server):
    assert message in error_of(post(server, CHAT, content))


def test_the_affinity_of_a_conversation_stays(server):
    talks = (["hello"], ["hello", "it is", "and"], ["goodbye"])
    first, same, other = (
        post(server, CHAT, {"messages": messages_of(*texts), "max_tokens": 1}).headers[AFFINITY]
        for texts in talks
    )
    assert first == same != other


def test_a_prediction_changes_no_reply(server):
    plain = chat(server, "hello", max_tokens=12)["choices"]
    for content in ("hello there", [{"type": "text", "text": "hello"}]):
        prediction = {"type": "content", "content": content}
        assert chat(server, "hello", max_tokens=12, prediction=prediction)["choices"] == plain
    wrong = {"messages": messages_of("hello"), "prediction": {"type": "tokens", "content": "hello"}}
    assert "prediction" in error_of(post(server, CHAT, wrong))


def test_figures(server):
    chat(server, "hello")
    text = get(server, "/metrics").text
    counted = "new_tokens_total", "cached_tokens_total", "drafted_tokens_total"
    for name in (*counted, "running", "state_bytes"):
        assert f'rgexport_{name}{{model="toy"}}' in text
    assert f'rgexport_http_answers_total{{path="{CHAT}",status="200"}}' in text
    assert get(server, "/health").json() == {"status": "ok"}


def test_a_key(serve):
    wrong = ("Bearer sesam", "Bearer Sesame", "Bearer sesame2", "sesame", "Basic sesame")
    with serve(Settings(log=False, api_key="sesame")) as server:
        assert get(server, "/health").status_code == 200
        for headers in ({}, *({"Authorization": key} for key in wrong)):
            for path in ("/v1/models", "/metrics", "/slots", "/none"):
                answer = get(server, path, **headers)
                assert error_of(answer, 401)
                assert answer.json()["error"]["type"] == "authentication_error"
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert get(server, "/v1/models", Authorization=f"{scheme} sesame").status_code == 200


@pytest.mark.parametrize("honest", [True, False])
def test_a_body_that_is_too_large(honest, serve):
    data = b'{"content": "' + b"x" * 5000 + b'"}'
    with serve(Settings(log=False, body_bytes=1000)) as server:
        content = data if honest else iter([data])
        answer = httpx.post(f"{server.url}/tokenize", content=content, headers=JSON)
        assert error_of(answer, 413) == "the request is larger than 1000 bytes"
        assert post(server, "/tokenize", {"content": "x"}).status_code == 200


def test_an_engine_that_fails_is_500_without_a_traceback(serve):
    with serve() as server:
        server.session.failure, server.session.failing_step = RuntimeError("no memory"), 1
        answer = post(server, CHAT, {"messages": messages_of("hello")})
        assert error_of(answer, 500) == "the engine failed; the server's log says why"
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
        server.session.failure = None
        assert chat(server, "hello")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = """messages prompt stream max_tokens temperature top_p top_k min_p stop seed n logprobs
top_logprobs logit_bias response_format grammar regex presence_penalty repetition_penalty echo
id_slot tools content tokens filename user stream_options""".split()
GOOD: dict[str, Any] = {
    "messages": messages_of("hello"),
    "prompt": "hello",
    "content": "hello",
    "tokens": [5, 6],
}
SLOTS = ["/slots/0?action=save", "/slots/1?action=erase"]
PATHS = st.sampled_from([CHAT, COMPLETE, "/tokenize", "/detokenize", "/apply-template", *SLOTS])


@settings(deadline=None, max_examples=200)
@given(path=PATHS, changes=st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=3))
def test_no_field_is_a_500(path, changes, server):
    body = GOOD | changes
    body["max_tokens"] = body["max_tokens"] if isinstance(body.get("max_tokens"), str) else 2
    answer = post(server, path, body)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"] and "Traceback" not in answer.text


@settings(deadline=None, max_examples=100)
@given(path=PATHS, data=st.binary(max_size=200))
def test_no_body_is_a_500(path, data, server):
    answer = post(server, path, data)
    erased = answer.status_code == 200 and not data and "erase" in path
    assert erased or (400 <= answer.status_code < 500 and answer.json()["error"]["message"])


def test_lone_surrogates(server):
    data = json.dumps({"messages": messages_of("\ud800 hello"), "max_tokens": 2})
    for path in (CHAT, "/apply-template"):
        assert post(server, path, data.encode()).status_code == 200


def test_an_answer_names_no_path_of_the_machine(server, tmp_path):
    broken = {"filename": "broken"}
    server.model.scheduler.store.clear()
    chat(server, "hello")
    post(server, "/slots/0?action=save", broken)
    saved = next(iter(tmp_path.parent.glob("saved*/*/broken.state")))
    saved.write_bytes(b"half")
    assert str(saved.parent) not in error_of(post(server, "/slots/0?action=restore", broken))


def test_a_model_without_turns_completes_but_does_not_chat(serve):
    with serve() as server:
        tokenizer = server.model.tokenizer
        special = {name: i for name, i in tokenizer.special.items() if "turn" not in name}
        server.model.tokenizer = replace(tokenizer, special=special)
        asked = {"messages": messages_of("hello"), "prompt": "hello", "max_tokens": 2}
        assert "this model cannot chat" in error_of(post(server, CHAT, asked))
        assert post(server, COMPLETE, asked).status_code == 200
