"""Runs an ONNX artifact in onnxruntime-genai and in plain ONNX Runtime, and compares them.

It needs nothing but those two and numpy, so it runs in an environment of any of their versions:

    python bench/in_genai.py ARTIFACT [--kernels LIBRARY] [--chat MESSAGE MESSAGE …]

The loop is that of docs/genai.md: nobody asks for logits between two tokens, and replies are cut.
It prints JSON: the largest difference of any logit after each prompt; whether the same tokens were
chosen; the replies to the messages; and the seconds of both engines, measured in turns.
"""

import argparse
import json
import os
import time
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as genai

PROMPT, STEPS = 700, 600
REPLY, LATER = 40, (50, 1, 20)
"""Most tokens of a reply, and the lengths of later prompts in turns."""
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
        """Returns the logits after these tokens."""
        self._generator.append_tokens(np.array(ids, np.int32))
        logits: np.ndarray = self._generator.get_logits().reshape(-1)
        return logits

    def choose(self) -> int:
        """Returns the next token, which the model takes when it chooses another one."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def cut(self) -> None:
        """Ends a reply that did not end by itself: the model takes the last token."""
        self._generator.get_logits()


class Comparison:
    """Both engines over the same conversation.

    Attributes:
        chosen: tokens of all replies so far.
        same: whether both engines chose the same ones.
        worst: the largest difference of any logit after a prompt.
        seconds: of each engine, for the first prompt and for the steps.
    """

    def __init__(self, folder: Path, kernels: str | None):
        self._theirs, self._plain = Genai(folder), Plain(folder, kernels)
        self._ends = ends(folder)
        self.chosen, self.same, self.worst = 0, True, 0.0
        self.seconds = {"genai": [0.0, 0.0], "onnxruntime": [0.0, 0.0]}

    def turn(self, prompt: list[int]) -> list[int]:
        """Takes a prompt and a reply; returns the token that ended it, if it was not cut."""
        part = 0 if self.chosen == 0 else None
        logits = self._timed("onnxruntime", part, self._plain.take, prompt)
        difference = self._timed("genai", part, self._theirs.take, prompt) - logits
        self.worst = max(self.worst, float(np.abs(difference).max()))
        for _ in range(REPLY):
            token = self._timed("genai", 1, self._theirs.choose)
            self.chosen += 1
            self.same = self.same and token == int(logits.argmax())
            if token in self._ends:
                return [token]
            logits = self._timed("onnxruntime", 1, self._plain.take, [token])
        self._timed("genai", 1, self._theirs.cut)
        return []

    def _timed(self, engine: str, part: int | None, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        if part is not None:
            self.seconds[engine][part] += time.perf_counter() - start
        return result


def compare(folder: Path, kernels: str | None) -> dict[str, Any]:
    """Runs turns of random prompts through both engines."""
    manifest = json.loads((folder / "rgexport.json").read_text("utf-8"))
    rng = np.random.default_rng(5)
    comparison, lengths = Comparison(folder, kernels), cycle(LATER)
    unread: list[int] = []
    length = PROMPT
    while comparison.chosen < STEPS:
        prompt = [int(i) for i in rng.integers(0, manifest["config"]["vocab_size"], length)]
        unread = comparison.turn(unread + prompt)  # what ends a reply was not taken
        length = next(lengths)
    return {
        "genai": genai.__version__,
        "onnxruntime": ort.__version__,
        "chosen_tokens": comparison.chosen,
        "same_tokens": comparison.same,
        "largest_difference": comparison.worst,
        "seconds": comparison.seconds,
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
        if len(said) == most:
            engine.cut()
        replies.append(tokenizer.decode(np.array(said, np.int32)))
        before = END  # it was not taken
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
