"""Reference files, which travel without the model that they speak of."""

import hashlib
import json
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from safetensors.numpy import load

from fuzz.readers import bytes_mutator as raw
from fuzz.readers import json_mutator, small
from fuzz.readers.target import Target, covers, oracle, require
from fuzz.readers.weights import mutate_safetensors
from rgexport.files.safetensors import DTYPES
from rgexport.files.typed_json import to_json
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import METADATA, ReferenceFile, read_reference


def _seeds(folder: Path) -> Iterable[bytes]:
    checkpoint = open_checkpoint(small.write_model(folder / "model"))
    for number, prompts in enumerate(([[1, 2, 3]], [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]])):
        (folder / "prompts.json").write_text(json.dumps(prompts))
        target = folder / str(number)
        capture(checkpoint, target, prompts=folder / "prompts.json")
        yield target.read_bytes()


def mutate_hashed(data: bytes, random: Random, metadata: str, digest: str) -> bytes:
    """The header of the file, the JSON in it, or values; mostly with a hash that fits.

    The JSON is the text `metadata` of the file's metadata, and has the hash as `digest`.
    """
    length = int.from_bytes(data[:8], "little")
    header, content = data[8 : 8 + length], data[8 + length :]
    choice = random.randrange(6)
    if choice == 0:
        return mutate_safetensors(data, random)
    try:
        value = json_mutator.parse(header)
    except ValueError:
        return mutate_safetensors(data, random)
    if choice == 1:
        content = raw.flip(content, random)
    if choice == 2:
        value = json_mutator.change(value, random)
    fitting = {digest: hashlib.sha256(content).hexdigest()}
    _change_inner(value, random, choice > 2, metadata, fitting)
    text = json_mutator.write(value)
    return struct.pack("<Q", len(text)) + text + content


def _change_inner(
    value: object, random: Random, change: bool, metadata: str, fitting: dict[str, str]
) -> None:
    """The JSON that is a text in the file's metadata."""
    for key, entry in value if isinstance(value, json_mutator.Pairs) else ():
        if key != "__metadata__" or not isinstance(entry, json_mutator.Pairs):
            continue
        for at, (name, text) in enumerate(entry):
            if name == metadata and isinstance(text, str):
                try:
                    inner = json_mutator.parse(text.encode("utf-8", "surrogatepass"))
                except ValueError:
                    continue
                inner = json_mutator.change(inner, random) if change else inner
                if isinstance(inner, json_mutator.Pairs):
                    fitted = [(k, fitting.get(k, v)) for k, v in inner]
                    inner = json_mutator.Pairs(fitted)
                entry[at] = name, json_mutator.write(inner).decode("utf-8", "surrogatepass")


def _read(data: bytes, folder: Path) -> ReferenceFile:
    """As `validate` does: everything that is in it."""
    folder.mkdir(exist_ok=True)
    path = folder / "a.reference"
    path.write_bytes(data)
    found = read_reference(path)
    for index, prompt, _ in found.spans():
        found.state(index), found.checkpoints(index), found.greedy(index)
        found.logits(index, 0, len(prompt.positions))
    return found


def _agree(data: bytes, folder: Path, found: ReferenceFile) -> None:
    """The arrays that safetensors reads, and a header that says the same when written again."""
    theirs = oracle(lambda: load(data), "safetensors refuses the file")
    require(theirs.keys() == found.arrays.keys(), "other arrays than safetensors has")
    for name, rows in found.arrays.items():
        same = rows.dtype == theirs[name].dtype and rows.whole().tobytes() == theirs[name].tobytes()
        require(
            same and rows.shape == theirs[name].shape, "another array than safetensors has", name
        )
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"][METADATA]
    stated, again = json.loads(text), to_json(found.header)
    for key, value in again.items():
        require(key not in stated or covers(stated[key], value), "a header of other fields", key)
    total = sum(prompt["tokens"] for prompt in again["prompts"])
    require(total == len(found.tokens), "more or fewer tokens than there are")
    require(bool((found.tokens < again["config"]["vocab_size"]).all()), "a token that is none")
    for index, prompt in enumerate(again["prompts"]):
        logits = found.logits(index, 0, len(prompt["positions"]))
        require(bool(np.isfinite(logits).all()), "logits that are no numbers")
    require(set(DTYPES.values()) >= {rows.dtype for rows in found.arrays.values()}, "a dtype")


_MUTATE = partial(mutate_hashed, metadata=METADATA, digest="data_sha256")
TARGETS = {"reference": Target("reference", _seeds, _MUTATE, _read, _agree)}
