"""The texts that artifacts read, and the prompts of reference files."""

import json

import numpy as np
import pytest

from rgexport.chat.sample_text import built_in_text
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import demo_folder
from rgexport.griffin.control_tokens import END_OF_TURN, START_OF_TURN
from rgexport.validate import text as module
from rgexport.validate.text import PROMPTS, choose_prompts, choose_text, random_text
from tests.validate.toys import VOCAB, character_tokenizer


def test_the_built_in_text_goes_past_a_long_window():
    """It has as many tokens as are asked for."""
    for limit, count in ((None, 7000 + module.PAST_WINDOW), (300, 300), (32_768, 32_768)):
        text = choose_text(character_tokenizer(), vocab_size=VOCAB, window=7000, limit=limit)
        assert len(text.tokens) == count
    once = len(built_in_text())
    assert np.array_equal(text.tokens[1:501], text.tokens[1 + once : 501 + once])


def test_a_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("déjà vu" * 100, "utf-8")
    whole, cut = (
        choose_text(character_tokenizer(), vocab_size=VOCAB, window=8, file=file, limit=limit)
        for limit in (None, 8)
    )
    assert len(whole.tokens) == 701 and whole.bytes == 900 and not whole.truncated
    assert len(cut.tokens) == 8 and cut.bytes == 9 and cut.truncated
    assert np.array_equal(cut.tokens, whole.tokens[:8])


def test_without_a_tokenizer_ids_are_random_and_repeatable():
    text = choose_text(None, vocab_size=50, window=100)
    assert len(text.tokens) == 401 and set(text.tokens.tolist()) == set(range(50))
    assert np.array_equal(text.tokens, random_text(50, 401).tokens)
    once, again = (choose_prompts(None, vocab_size=50, window=16) for _ in range(2))
    assert min(len(p.tokens) for p in once) == 1 and max(len(p.tokens) for p in once) > 2 * 16
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    ("content", "asked", "complaint"),
    [
        (b"\xff\xfe\x00", {}, "cannot read"),
        (b" \n", {}, "has no text in it"),
        (b"text", {"limit": 1}, "too few"),
        (b"text", {"vocab_size": 5}, "the model has 5 tokens"),
    ],
)
def test_texts_that_are_refused(tmp_path, content, asked, complaint):
    file = tmp_path / "t"
    file.write_bytes(content)
    options = {"vocab_size": VOCAB, "window": 8, "file": file} | asked
    with pytest.raises(RequestError, match=complaint):
        choose_text(character_tokenizer(), **options)


def test_the_built_in_prompts():
    """Turn tokens count in chat turns only."""
    tokenizer = load_tokenizer(demo_folder())
    prompts = {p.name: p for p in choose_prompts(tokenizer, vocab_size=8192, window=256)}
    assert set(prompts) == {"empty", "one token", "several windows", *PROMPTS}
    assert all(prompt.tokens[0] == tokenizer.bos_id for prompt in prompts.values())
    assert [len(prompts[name].tokens) for name in ("empty", "one token")] == [1, 2]
    assert 2 * 256 < len(prompts["several windows"].tokens) <= 3 * 256
    turns = {tokenizer.special[START_OF_TURN], tokenizer.special[END_OF_TURN]}
    assert turns <= set(prompts["chat turns"].tokens.tolist())
    typed = prompts["turn tokens typed by the user"].tokens.tolist()
    assert turns.isdisjoint(typed) and END_OF_TURN in tokenizer.decode(typed)


def test_prompts_of_a_user(tmp_path):
    text, file = tmp_path / "p.txt", tmp_path / "p.json"
    text.write_text("one\n\n two words\n")
    first, second = choose_prompts(character_tokenizer(), vocab_size=VOCAB, window=4, file=text)
    assert (first.name, first.bytes, len(first.tokens), second.bytes) == ("p.txt 1", 3, 4, 10)
    file.write_text(json.dumps(["one", [1, 2, 3], {"name": "mine", "text": "x"}]))
    prompts = choose_prompts(character_tokenizer(), vocab_size=VOCAB, window=4, file=file)
    assert [prompt.name for prompt in prompts] == ["p.json 1", "p.json 2", "mine"]
    assert prompts[1].tokens.tolist() == [1, 2, 3] and prompts[1].bytes is None


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("no prompts", ["[]"]),
        ("prompt 1 is neither", ['[{"text": "nameless"}]', "[[-1]]", f"[[{10**30}]]"]),
        ("has the id 99", ["[[99]]"]),
        ("no tokenizer", ['["words"]']),
        ("is not JSON", ["['x'", "[" * 100_000]),
    ],
)
def test_a_file_that_is_no_list_of_prompts(tmp_path, line, texts):
    for text in texts:
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(RequestError, match=line):
            choose_prompts(None, vocab_size=VOCAB, window=4, file=tmp_path / "p.json")
