"""What prompt lookup gains: replies that repeat a text, and one that does not, beside plain steps.

    python -m bench.lookup [ARTIFACT …] [--tokens 200] [--rounds 3]

Without an artifact, the random 2B of `bench.onnx` in each storage. What it would write says
nothing, so the replies are given: each of their tokens is the only one that may be written, at the
cost of any other. Lookup does not know them. With and without it take turns. Then the model writes
by itself, greedily and by chance, and both must be the same. `RGEXPORT_CPU` chooses the kernels.
"""

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from bench.onnx_models import STORAGES, make_missing
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.jobs import End, GenerationRequest
from rgexport.chat.masks import Mask
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.sampling import Sampling
from rgexport.chat.scheduler import Scheduler
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.griffin.checkpoint import demo_folder
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import environment

PROSE, CODE = Path("rgexport/chat/sample.txt"), Path("rgexport/griffin/ops.py")
OWN = {
    "greedily": Sampling(),
    "at temperature 0.7": Sampling(temperature=0.7, top_p=0.9, seed=1),
}
OWN_TOKENS = 64
"""Tokens that the model writes by itself."""


def main() -> None:
    """Prints a table for each artifact."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", type=Path, nargs="*")
    parser.add_argument("--tokens", type=int, default=200, help="of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if not asked.artifacts:
        make_missing(list(STORAGES.values()), transformer=False)
    facts = environment()
    print(f"{facts['cpu']}, {facts['cores']} cores")
    for path in asked.artifacts or [storage.artifact for storage in STORAGES.values()]:
        measure(path, asked.tokens, asked.rounds)


def measure(path: Path, tokens: int, rounds: int) -> None:
    """Prints what each case takes with and without lookup."""
    writers = {lookup: Writer(path, lookup) for lookup in (False, True)}
    print(f"\n{path.name}, {writers[True].title}\n")
    print("| reply | plain, tokens/s | with lookup | times | drafted | right |")
    print("|---|---|---|---|---|---|")
    for name, (prompt, reply) in cases(tokens).items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for lookup, writer in writers.items():
                rates[lookup].append(writer.rate(prompt, reply))
        plain, fast = (median(rates[lookup]) for lookup in (False, True))
        drafted, right = writers[True].drafted()
        print(f"| {name} | {plain:.1f} | {fast:.1f} | {fast / plain:.2f} | {drafted} | {right} |")
    for name, sampling in OWN.items():
        prompt = cases(tokens)["an edit"][0]
        plain, same = (writers[lookup].write(prompt, sampling) for lookup in (False, True))
        drafted, right = writers[True].drafted()
        verdict = "the same tokens" if plain == same else "OTHER TOKENS"
        print(f"\nBy itself, {name}: {verdict} ({right} of {drafted} drafted ones were right).")
    for writer in writers.values():
        writer.close()


def cases(tokens: int) -> dict[str, tuple[list[int], list[int]]]:
    """Name → prompt and reply."""
    encode = load_tokenizer(demo_folder()).encode_text
    prose, code = PROSE.read_text(), CODE.read_text()
    words = prose.split(" ")
    edited = " ".join(f"really {word}" if i % 30 == 20 else word for i, word in enumerate(words))
    changed = code.replace("RecurrentBlock", "TemporalBlock").replace("hidden", "memory")
    half = len(prose) // 2
    return {
        "an edit": (encode(prose), encode(edited)[:tokens]),
        "changed code": (encode(code), encode(changed)[:tokens]),
        "prose": (encode(prose[:half]), encode(prose[half:])[:tokens]),
    }


class Script(Mask):
    """Allows one reply alone."""

    def __init__(self, vocabulary: int, reply: Sequence[int]) -> None:
        self._reply, self._written = reply, 0
        self._allowed = np.zeros(vocabulary, bool)

    def allowed(self) -> np.ndarray:
        """The next token of the reply."""
        self._allowed[:] = False
        self._allowed[self._reply[self._written]] = True
        return self._allowed

    def accept(self, token: int) -> None:
        """Goes on."""
        self._written += 1


class Heard:
    """Remembers a reply."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end_: End | None = None
        self._ended = threading.Event()

    def token(self, token: int, logits: np.ndarray) -> bool:
        """Takes a token."""
        self.tokens.append(token)
        return True

    def end(self, end: End) -> None:
        """Takes the end."""
        self.end_ = end
        self._ended.set()

    def wait(self) -> End:
        """The end."""
        self._ended.wait()
        assert self.end_ is not None and self.end_.error is None, self.end_
        return self.end_


class Writer:
    """A scheduler over an artifact."""

    def __init__(self, path: Path, lookup: bool) -> None:
        session = open_session(open_artifact(path))
        self.title, self._vocabulary = session.info.title, session.vocab_size
        self._scheduler = Scheduler(session, PrefixStore(1 << 28), lookup=lookup)
        self._counted = 0, 0

    def rate(self, prompt: list[int], reply: list[int]) -> float:
        """Tokens per second of a reply that is given."""
        heard = Heard()
        mask, count = Script(self._vocabulary, reply), len(reply)
        asked = GenerationRequest(ids=prompt, listener=heard, mask=mask, max_new_tokens=count)
        self._scheduler.submit(asked)
        seconds = heard.wait().write_seconds
        assert heard.tokens == reply
        return (count - 1) / seconds

    def write(self, prompt: list[int], sampling: Sampling) -> list[int]:
        """What the model writes."""
        heard = Heard()
        asked = GenerationRequest(
            ids=prompt, listener=heard, sampling=sampling, max_new_tokens=OWN_TOKENS
        )
        self._scheduler.submit(asked)
        heard.wait()
        return heard.tokens

    def drafted(self) -> tuple[int, int]:
        """Tokens that were drafted since this was asked last, and those that were right."""
        counters = self._scheduler.counters
        before, now = self._counted, (counters.drafted_tokens, counters.accepted_tokens)
        self._counted = now
        return now[0] - before[0], now[1] - before[1]

    def close(self) -> None:
        """Ends it."""
        self._scheduler.close()


if __name__ == "__main__":
    main()
