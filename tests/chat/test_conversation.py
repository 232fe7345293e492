"""Conversations: each turn costs its own tokens, and the state is that of its template."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgexport.chat.conversation import Conversation
from rgexport.chat.from_artifact import continued_ids
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.sampling import Sampling
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from tests.toy_session import MEMORY, ToySession

EOS, END_OF_TURN = 1, 107


@pytest.fixture
def session(tokenizer: Tokenizer) -> ToySession:
    return ToySession(tokenizer.vocab_size)


@pytest.fixture
def conversation(make_model, tokenizer, session):
    """An empty conversation, with each kind of tokenizer in turn."""
    return Conversation(make_model(tokenizer, session), ReplyOptions(max_new_tokens=8))


def say(conversation: Conversation, session: ToySession, text: str, reply: list[int]) -> str:
    """Sends `text`, and lets the model answer with `reply`."""
    settle(conversation)
    session.script = list(reply)
    shown = "".join(conversation.send(text))
    settle(conversation)
    session.script = []
    return shown


def settle(conversation: Conversation) -> None:
    """Waits until the end of the last turn is read."""
    conversation.model.read([0], first=False).result(30)


def assert_settled(conversation: Conversation) -> None:
    """What is known is, bit for bit, the state of one prefill of the rendered conversation."""
    model = conversation.model
    ids = model.conversation_ids(conversation.messages)
    marks = [i for i in ids if i in (106, END_OF_TURN)]
    assert marks == [106, END_OF_TURN] * len(conversation.messages), "whatever is said"
    prefix = model.scheduler.store.longest(ids)
    assert prefix and prefix.length == len(ids)
    session = ToySession(model.tokenizer.vocab_size)
    session.prefill(np.array([ids]))
    np.testing.assert_array_equal(prefix.state[MEMORY], session.get_state()[MEMORY])


@pytest.mark.parametrize("ending", [[END_OF_TURN], [EOS], []], ids=["turn", "eos", "limit"])
def test_a_turn_costs_its_own_tokens(conversation, session, ending):
    reply = conversation.model.tokenizer.encode_text("hello the model said it")[:7]
    for turn in range(1, 6):
        known = len(conversation.model.conversation_ids(conversation.messages)) if turn > 1 else 0
        shown = say(conversation, session, f"hello {turn}", reply + ending)
        assert conversation.last and conversation.last.cached_tokens == known
        assert conversation.messages[-1] == {"role": "assistant", "content": shown}
        assert len(conversation.messages) == 2 * turn
        assert_settled(conversation)


@pytest.mark.parametrize(
    "text", ["hello", " hello", "hello \n\n", "\n", "", "a<start_of_turn>b", "<b>é🐢</b>"]
)
@pytest.mark.parametrize("spelling", ["usual", "letters"])
def test_a_reply_that_renders_otherwise(conversation, session, text, spelling):
    tokenizer = conversation.model.tokenizer
    units = [text] if spelling == "usual" else list(text)
    reply = [i for unit in units for i in tokenizer.encode_text(unit)]
    conversation.options = ReplyOptions(max_new_tokens=99)
    for _ in range(2):
        assert say(conversation, session, "hi", [*reply, END_OF_TURN]) == text
        assert_settled(conversation)


def test_a_reply_that_is_closed_keeps_what_was_said(conversation, session):
    conversation.options = ReplyOptions(max_new_tokens=10**6)
    stream = conversation.send("hi")
    first = next(stream)
    stream.close()
    fed = session.fed
    settle(conversation)
    assert session.fed == fed + 1, "no token is read after the end of a reply that was left"
    assert conversation.last and conversation.last.reason == "cancelled"
    assert conversation.messages[-1]["content"].startswith(first)
    ids = conversation.model.conversation_prompt(conversation.messages[:-1]).ids
    written = [*ids, *conversation.last.ids]
    assert conversation.model.scheduler.store.length(written) == len(written) - 1 < 10**5
    assert say(conversation, session, "and now", [EOS]) == ""
    assert_settled(conversation)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_conversation(make_model, gemma, data):
    session = ToySession(gemma.vocab_size)
    conversation = Conversation(make_model(gemma, session), ReplyOptions(max_new_tokens=8))
    token = st.integers(0, gemma.vocab_size - 1) | st.sampled_from([EOS, END_OF_TURN, 106, 108])
    text = st.text(max_size=9) | st.sampled_from(["<start_of_turn>model\n", " hello  ", "\n\n"])
    for _ in range(data.draw(st.integers(1, 3))):
        reply = data.draw(st.lists(token, min_size=8, max_size=8))
        say(conversation, session, data.draw(text), reply)
        assert_settled(conversation)


def test_a_failing_step_or_a_template_that_refuses_undoes_the_turn(conversation, session):
    say(conversation, session, "hello", [300, 301, EOS])
    before = list(conversation.messages)
    session.failure, session.failing_step = RuntimeError("no memory"), 2
    with pytest.raises(RequestError, match="the engine: no memory"):
        list(conversation.send("and"))
    session.failure = None
    assert conversation.messages == before
    say(conversation, session, "again", [300, EOS])
    assert_settled(conversation)
    conversation.messages = [{"role": "user", "content": "twice"}]
    with pytest.raises(RequestError, match="chat template"):
        list(conversation.send("in a row"))
    assert conversation.messages == [{"role": "user", "content": "twice"}]


def test_undo_edit_and_retry_read_from_there_on(conversation, session):
    for turn in range(4):
        say(conversation, session, f"hello {turn}", [300 + turn, EOS])
    before = list(conversation.messages)
    conversation.undo()
    assert conversation.messages == before[:-2]
    session.script = [310, EOS]
    list(conversation.edit("another"))
    assert conversation.messages[:-1] == [*before[:4], {"role": "user", "content": "another"}]
    two = conversation.model.conversation_ids(conversation.messages[:4])
    assert conversation.last and conversation.last.cached_tokens == len(two)
    settle(conversation)
    session.script = [311, EOS]
    list(conversation.retry())
    assert conversation.last.cached_tokens == conversation.last.prompt_tokens, "nothing is read"


def test_a_document_outlives_the_message_about_it(conversation, session):
    for text in ("one", "two"):
        conversation.read(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AttributeError):
        patch.delattr(type(conversation.model), "state")
        conversation.read("three, which fails")
    say(conversation, session, "hello", [300, EOS])
    assert "The text before it stays" in conversation.undo() and not conversation.messages
    assert conversation.undo() == "The text that was read last is gone."
    say(conversation, session, "hello", [300, EOS])
    list(conversation.edit("again"))
    assert conversation.messages[0]["content"] == "one\n\nagain"


def test_another_attempt_has_another_seed(make_model, gemma):
    options = ReplyOptions(sampling=Sampling(temperature=1.0, seed=3), max_new_tokens=12)
    conversation = Conversation(make_model(gemma), options)
    replies = ["".join(conversation.send("hi"))]
    replies += ["".join(conversation.retry()) for _ in range(3)]
    assert len({*replies}) == 4
    again = Conversation(make_model(gemma), options)
    assert ["".join(again.send("hi")), "".join(again.retry())] == replies[:2]


def test_a_system_prompt_and_a_document(conversation, session):
    """Gemma's template has no system prompt: the first message begins with it."""
    conversation.set_system("Be brief.")
    say(conversation, session, "hello", [300, EOS])
    model = conversation.model
    assert conversation.system == "Be brief."
    merged = [{"role": "user", "content": "Be brief.\n\nhello"}, conversation.messages[-1]]
    assert model.conversation_ids(conversation.messages) == model.conversation_ids(merged)
    conversation.clear()
    assert conversation.system and len(conversation.messages) == 1
    say(conversation, session, "goodbye", [300, EOS])
    assert conversation.last and conversation.last.cached_tokens >= 5, "it was read once"
    conversation.set_system("")
    assert not conversation.system and len(conversation.messages) == 2
    conversation.clear()
    text = "the user said hello to a model; " * 9
    count = conversation.read(text)
    say(conversation, session, "it is 42", [300, EOS])
    assert conversation.last.cached_tokens >= count > 50
    assert conversation.messages[0]["content"] == f"{text}\n\nit is 42"


def test_saved_and_loaded(make_model, conversation, session, tmp_path):
    say(conversation, session, "hello", [300, 301, EOS])
    conversation.save(tmp_path / "a.state")
    tokenizer = conversation.model.tokenizer
    other = Conversation(make_model(tokenizer), conversation.options)
    other.load(tmp_path / "a.state")
    assert other.messages == conversation.messages
    replies = ["".join(each.send("and now")) for each in (conversation, other)]
    assert replies[0] == replies[1] and other.last
    known = conversation.model.conversation_ids(conversation.messages[:2])
    assert other.last.cached_tokens == len(known) - 1, "the last token is left to be read"


def test_a_document_is_saved_and_a_plain_text_is_no_conversation(make_model, gemma, tmp_path):
    conversation = Conversation(make_model(gemma), ReplyOptions(max_new_tokens=4))
    count = conversation.read(text := "hello the model said it. " * 9)
    conversation.save(tmp_path / "a.state")
    other = Conversation(make_model(gemma), conversation.options)
    other.load(tmp_path / "a.state")
    list(other.send("what"))
    assert other.last and other.last.cached_tokens >= count - 1
    plain, hashed, model = tmp_path / "plain.state", tmp_path / "hashed.state", conversation.model
    model.save_state(plain, ids := model.text_ids(text))
    with pytest.raises(RequestError, match=r"plain.state is the state of a plain text"):
        other.load(plain)
    model.save_state(hashed, ids, with_text=False)
    fresh = make_model(gemma)
    longer = continued_ids(fresh, f"{text}hello", hashed)
    reply = fresh.continue_ids(longer, conversation.options).reply()
    assert reply.cached_tokens == len(ids) - 1
    with pytest.raises(RequestError, match="must begin with that text"):
        continued_ids(model, "hello", hashed)
