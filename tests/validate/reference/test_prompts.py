import json

import numpy as np
import pytest

from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import demo_folder
from rgexport.griffin.markup import END_OF_TURN, START_OF_TURN
from rgexport.validate.reference.prompts import TEXTS, choose_prompts
from tests.validate.toys import VOCAB, character_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(demo_folder())


def test_the_built_in_ones(tokenizer):
    prompts = {p.name: p for p in choose_prompts(tokenizer, vocab_size=8192, window=256)}
    assert set(prompts) == {"empty", "one token", "chat turns", "several windows", *TEXTS}
    assert all(prompt.tokens[0] == tokenizer.bos_id for prompt in prompts.values())
    assert prompts["empty"].tokens.tolist() == [tokenizer.bos_id]
    assert len(prompts["one token"].tokens) == 2
    assert 2 * 256 < len(prompts["several windows"].tokens) <= 3 * 256
    assert all(prompts[name].bytes == len(text.encode()) for name, text in TEXTS.items())


def test_turn_tokens_count_in_chat_turns_only(tokenizer):
    prompts = {p.name: p for p in choose_prompts(tokenizer, vocab_size=8192, window=16)}
    turns = {tokenizer.special[START_OF_TURN], tokenizer.special[END_OF_TURN]}
    assert turns <= set(prompts["chat turns"].tokens.tolist())
    typed = prompts["turn tokens typed by the user"].tokens.tolist()
    assert turns.isdisjoint(typed) and END_OF_TURN in tokenizer.decode(typed)


def test_without_a_bos_or_a_tokenizer_there_is_no_empty_prompt():
    prompts = choose_prompts(character_tokenizer(None), vocab_size=VOCAB, window=64)
    assert "empty" not in {prompt.name for prompt in prompts}
    assert min(len(prompt.tokens) for prompt in prompts) == 1
    once, again = (choose_prompts(None, vocab_size=50, window=16) for _ in range(2))
    assert min(len(p.tokens) for p in once) == 1 and max(len(p.tokens) for p in once) > 2 * 16
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(once, again, strict=True))


def test_lines_of_text(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n two words\n")
    first, second = choose_prompts(character_tokenizer(), vocab_size=VOCAB, window=4, file=file)
    assert (first.name, first.bytes, len(first.tokens)) == ("p.txt 1", 3, 4)
    assert second.bytes == 10


def test_a_json_list(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(["one", [1, 2, 3], {"name": "mine", "text": "x"}]))
    prompts = choose_prompts(character_tokenizer(), vocab_size=VOCAB, window=4, file=file)
    assert [prompt.name for prompt in prompts] == ["p.json 1", "p.json 2", "mine"]
    assert prompts[1].tokens.tolist() == [1, 2, 3] and prompts[1].bytes is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no prompts"),
        ("[]", "no prompts"),
        ("[1, 2]", "prompt 1 is neither"),
        ('[{"text": "nameless"}]', "prompt 1 is neither"),
        ("[[-1]]", "prompt 1 is neither"),
        (f"[[{10**30}]]", "prompt 1 is neither"),
        ("[[99]]", "has the id 99"),
        ("['x'", "is not one"),
        ("[" * 100_000, "is not one"),
    ],
)
def test_a_file_that_is_no_list_of_prompts(tmp_path, text, line):
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(RequestError, match=line):
        choose_prompts(character_tokenizer(), vocab_size=VOCAB, window=4, file=file)


def test_text_without_a_tokenizer(tmp_path):
    file = tmp_path / "p.txt"
    with pytest.raises(RequestError, match="cannot read"):
        choose_prompts(None, vocab_size=VOCAB, window=4, file=file)
    file.write_text("words\n")
    with pytest.raises(RequestError, match="no tokenizer"):
        choose_prompts(None, vocab_size=VOCAB, window=4, file=file)
