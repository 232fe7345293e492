"""Runs an ONNX artifact in onnxruntime-genai and in plain ONNX Runtime, and compares them.

It needs nothing but those two and numpy, so it runs in an environment of any of their versions:

    python bench/in_genai.py ARTIFACT [--kernels LIBRARY] [--chat MESSAGE MESSAGE …]

It prints JSON: the largest difference of any logit over a prompt, single steps and later chunks;
whether the same tokens were chosen; the replies to the messages; and the seconds of both engines,
measured in turns.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as genai

PROMPT, STEPS, LATER = 700, 600, (50, 1, 50)
END = "<end_of_turn>\n"
TURN = "<start_of_turn>user\n{}" + END + "<start_of_turn>model\n"


class Plain:
    """ONNX Runtime with a loop over the states."""

    def __init__(self, folder: Path, kernels: str | None):
        options = ort.SessionOptions()
        if kernels:
            options.register_custom_ops_library(kernels)
        self._session = ort.InferenceSession(str(folder / "model.onnx"), options)
        self._states = {
            value.name: np.zeros([1 if isinstance(d, str) else d for d in value.shape], kind)
            for value in self._session.get_inputs()
            for kind in [np.float16 if "float16" in value.type else np.float32]
            if value.name.startswith("past_")
        }
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._position = 0

    def take(self, ids: list[int]) -> np.ndarray:
        """The logits after these tokens."""
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.arange(self._position, self._position + len(ids))[None],
        }
        found = dict(zip(self._outputs, self._session.run(None, feeds | self._states), strict=True))
        self._position += len(ids)
        for name in self._states:
            self._states[name] = found[name.replace("past_key_values", "present")]
        logits: np.ndarray = found["logits"][0, -1]
        return logits


class Genai:
    """onnxruntime-genai's generator, greedy."""

    def __init__(self, folder: Path):
        self.model = genai.Model(str(folder))
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=1 << 16, do_sample=False)
        self._generator = genai.Generator(self.model, parameters)

    def take(self, ids: list[int]) -> np.ndarray:
        """The logits after these tokens."""
        self._generator.append_tokens(np.array(ids, np.int32))
        return self.logits()

    def choose(self) -> int:
        """The next token; it is taken when the logits after it are asked for."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def logits(self) -> np.ndarray:
        """The logits after the last token."""
        logits: np.ndarray = self._generator.get_logits().reshape(-1)
        return logits


def compare(folder: Path, kernels: str | None) -> dict[str, Any]:
    """Both engines over the same tokens."""
    manifest = json.loads((folder / "rgexport.json").read_text("utf-8"))
    rng = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        return [int(i) for i in rng.integers(0, manifest["config"]["vocab_size"], count)]

    theirs, plain = Genai(folder), Plain(folder, kernels)
    seconds = {"genai": [0.0, 0.0], "onnxruntime": [0.0, 0.0]}

    def timed(engine: str, place: int, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = call(*arguments)
        seconds[engine][place] += time.perf_counter() - start
        return found

    def both(ids: list[int]) -> float:
        found = timed("genai", 0, theirs.take, ids)
        nonlocal logits
        logits = timed("onnxruntime", 0, plain.take, ids)
        return float(np.abs(found - logits).max())

    logits = np.zeros(0)
    worst, same, chosen = both(tokens(PROMPT)), True, 0
    token, last = -1, ends(folder)
    for _ in range(STEPS):
        if token not in last:
            token = timed("genai", 1, theirs.choose)
            same, chosen = same and token == int(logits.argmax()), chosen + 1
        if token in last:  # it is not taken, and no other one is chosen after it
            worst = max(worst, both([int(logits.argmax())]))
            continue
        logits = timed("onnxruntime", 1, plain.take, [token])
        worst = max(worst, float(np.abs(timed("genai", 1, theirs.logits) - logits).max()))
    for count in LATER:
        worst = max(worst, both(tokens(count)))
    return {
        "genai": genai.__version__,
        "onnxruntime": ort.__version__,
        "chosen_tokens": chosen,
        "same_tokens": same,
        "largest_difference": worst,
        "seconds": seconds,
    }


def ends(folder: Path) -> list[int]:
    """The tokens that end a reply."""
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    return list(config["model"]["eos_token_id"])


def chat(folder: Path, messages: list[str], most: int = 64) -> list[str]:
    """The replies to the messages of one conversation; each takes the tokens of its turn alone."""
    engine, replies = Genai(folder), []
    tokenizer = genai.Tokenizer(engine.model)
    before = "<bos>"
    for message in messages:
        engine.take([int(i) for i in tokenizer.encode(before + TURN.format(message))])
        said: list[int] = []
        while len(said) < most and (token := engine.choose()) not in ends(folder):
            said.append(token)
        replies.append(tokenizer.decode(np.array(said, np.int32)))
        engine.take([int(i) for i in tokenizer.encode(END.strip())])  # what ends it was not taken
        before = "\n"
    return replies


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--kernels", help="our library of kernels, for plain ONNX Runtime")
    parser.add_argument("--chat", nargs="*", default=[])
    asked = parser.parse_args()
    found = compare(asked.artifact, asked.kernels)
    replies = chat(asked.artifact, asked.chat) if asked.chat else []
    print(json.dumps(found | {"replies": replies}))


if __name__ == "__main__":
    main()
