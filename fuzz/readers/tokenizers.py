"""Vocabularies: `tokenizer.model`, `tokenizer.json`, and both as llama.cpp is to get them."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from fuzz.readers import folders, json_mutator, proto_mutator
from fuzz.readers.target import Target, oracle, require
from rgexport.artifacts.gguf.vocabulary import Vocabulary, read_vocabulary
from rgexport.chat.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from rgexport.griffin.tokenizer_files import find_tokenizer_files

TEXTS = (
    "",
    "ab ba",
    "<bos>a<end_of_turn>",
    "  é🎒\ud800",
    "<a>\n<unused1>",
    "▁▁ ab",
    "<0x41><eos>",
)
MODEL, JSON, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ROWS = 400
"""Of the embedding that a vocabulary must fit."""


def small_model() -> bytes:
    """A BPE model with byte fallback, as Gemma's is, of a few pieces."""
    model = ModelProto()
    pieces = [("<pad>", 0.0, 3), ("<eos>", 0.0, 3), ("<bos>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces += [("<start_of_turn>", 0.0, 4), ("<end_of_turn>", 0.0, 4), ("<b>", 0.0, 4)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] + [("▁▁", 0.0, 4)]
    learned = ["ab", "▁a", "ba", "a", "b", "▁", "é"]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate(learned)]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 3, 2, 1, 0
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.name = "identity"
    return bytes(model.SerializeToString())


def small_json() -> bytes:
    """The same as Hugging Face's conversion has it."""
    pieces = [piece.piece for piece in ModelProto.FromString(small_model()).pieces]
    special = pieces[:6]
    fields = {
        "version": "1.0",
        "added_tokens": [
            {
                **{"id": index, "content": piece, "single_word": False, "lstrip": False},
                **{"rstrip": False, "normalized": False, "special": True},
            }
            for index, piece in enumerate(special)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            **{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
            "invert": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                *({"type": "ByteFallback"}, {"type": "Fuse"}),
            ],
        },
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True},
            **{"byte_fallback": True, "vocab": {p: i for i, p in enumerate(pieces)}},
            "merges": [["a", "b"], ["▁", "a"], ["b", "a"]],
        },
    }
    return json.dumps(fields, ensure_ascii=False).encode()


_CONFIG = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}


def _model_seeds(folder: Path) -> Iterable[bytes]:
    yield folders.pack({MODEL: folders.Entry(small_model())})


def _json_seeds(folder: Path) -> Iterable[bytes]:
    settings = folders.Entry(json.dumps(_CONFIG).encode())
    yield folders.pack({JSON: folders.Entry(small_json()), SETTINGS: settings})


def _both_seeds(folder: Path) -> Iterable[bytes]:
    yield from _model_seeds(folder)
    yield from _json_seeds(folder)


def _mutate(data: bytes, random: Random) -> bytes:
    files = folders.unpack(data)
    name = random.choice(list(files))
    content = files[name].content
    if name == MODEL:
        files[name] = folders.Entry(_mutate_model(content, random))
    else:
        files[name] = folders.Entry(json_mutator.mutate(content, random))
    return folders.pack(files)


def _mutate_model(content: bytes, random: Random) -> bytes:
    """Pieces are many and alike: what stands beside them is changed as often as they are."""
    if random.randrange(2):
        return proto_mutator.mutate(content, random)
    try:
        fields = proto_mutator.parse(content)
    except ValueError:
        return proto_mutator.mutate(content, random)
    other = proto_mutator.write([field for field in fields if field.number != 1])
    pieces = proto_mutator.write([field for field in fields if field.number == 1])
    return pieces + proto_mutator.mutate(other, random)


def _read(data: bytes, folder: Path) -> tuple[Tokenizer, list[list[int]]]:
    folders.place(data, folder)
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode_text(text) for text in TEXTS]
    for found in ids:
        stream = StreamDecoder(tokenizer)
        streamed = "".join(map(stream.add, found)) + stream.finish()
        assert streamed == tokenizer.decode(found)
    tokenizer.encode_markup("<bos><start_of_turn>user\nab<end_of_turn>")
    return tokenizer, ids


def _agree(data: bytes, folder: Path, answer: tuple[Tokenizer, list[list[int]]]) -> None:
    """No text becomes markup, ids lie in the vocabulary, and the engine's own pieces are meant."""
    tokenizer, encoded = answer
    pieces = _engine_pieces(folder)
    special = set(tokenizer.special.values()) - _unknown(folder)
    require(len(pieces) == tokenizer.vocab_size, "a vocabulary of another size than the engine's")
    for ids in encoded:
        require(special.isdisjoint(ids), "text that became markup", ids)
        require(all(0 <= i < len(pieces) for i in ids), "an id outside of the vocabulary", ids)
    for literal, token in tokenizer.special.items():
        require(pieces.get(token) == literal, "a special piece that the engine has not", literal)
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        require(token is None or token in pieces, "a control id outside of the vocabulary", token)


def _engine_pieces(folder: Path) -> dict[int, str]:
    """Id → piece, by another way than the reader's."""
    if (folder / MODEL).is_file():
        model = ModelProto.FromString((folder / MODEL).read_bytes())
        return {index: piece.piece for index, piece in enumerate(model.pieces)}
    import tokenizers

    engine = oracle(
        lambda: tokenizers.Tokenizer.from_file(str(folder / JSON)), "tokenizers refuses"
    )
    return {index: piece for piece, index in engine.get_vocab(with_added_tokens=True).items()}


def _unknown(folder: Path) -> set[int]:
    """Ids that text without a piece gets."""
    if (folder / MODEL).is_file():
        pieces = ModelProto.FromString((folder / MODEL).read_bytes()).pieces
        return {index for index, piece in enumerate(pieces) if piece.type == 2}
    literal = json.loads((folder / JSON).read_bytes())["model"].get("unk_token")
    return {index for index, piece in _engine_pieces(folder).items() if piece == literal}


def _read_vocabulary(data: bytes, folder: Path) -> Vocabulary:
    folders.place(data, folder)
    found = read_vocabulary(find_tokenizer_files(folder), ROWS)
    if found is None and not data:  # libFuzzer begins with an input of no bytes
        raise folders.NotAnInput
    assert found, "no mutator takes a vocabulary away"
    return found


def _agree_on_vocabulary(data: bytes, folder: Path, found: Vocabulary) -> None:
    """One entry per row; texts are those of the engine, but for runs of spaces."""
    require(len(found.tokens) == len(found.scores) == len(found.types) == ROWS, "no entry per row")
    require(len(set(found.tokens)) == ROWS, "a token twice")
    control = found.control
    tokens = control.bos, control.eos, control.unk, control.pad
    ids = [token and token.id for token in tokens]
    require(all(i is None or 0 <= i < ROWS for i in ids), "an id outside of the vocabulary", ids)
    pieces: Any = _engine_pieces(folder)
    for index, piece in pieces.items():
        same = found.tokens[index].replace(" ", "▁") == piece.replace(" ", "▁")
        require(same, "another piece than the engine has", piece)
    require(bool((found.types >= 1).all() and (found.types <= 6).all()), "a type that is none")
    require(bool((found.scores == found.scores).all()), "a score that is no number")


def _target(name: str, seeds: Any) -> Target:
    return Target(name, seeds, _mutate, _read, _agree, 1 << 15)


TARGETS = {
    "tokenizer_model": _target("tokenizer_model", _model_seeds),
    "tokenizer_json": _target("tokenizer_json", _json_seeds),
    "vocabulary": Target(
        "vocabulary", partial(_both_seeds), _mutate, _read_vocabulary, _agree_on_vocabulary, 1 << 15
    ),
}
