"""Tokenizers in Gemma's layout, made here."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers

from rgexport.artifacts.manifest import Identity
from rgexport.chat.masks import MaskThreads
from rgexport.chat.model import Model
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import ChatTemplate
from rgexport.chat.scheduler import Scheduler
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.griffin.control_tokens import GEMMA_TEMPLATE
from tests.toy_session import ToySession
from tests.vocabularies import write_vocabulary

DEMO = Path(__file__).parents[2] / "demo" / "model"
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
MARKERS = ("<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)))
TURNS = ("<start_of_turn>", "<end_of_turn>")  # 106 and 107
TEXTUAL = (*("\n" * n for n in range(1, 8)), *("▁" * n for n in range(2, 8)), "<table>", "</b>")


def until(condition: Callable[[], Any]) -> None:
    """Waits; a busy machine takes its time."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="session", autouse=True)
def patient_masks() -> Iterator[None]:
    """Gives each mask a minute, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MaskThreads.__init__.__kwdefaults__, "seconds", 60.0)
        yield


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece model whose special ids are Gemma's."""
    control: dict[str, Any] = {f"{piece[1:-1]}_id": i for i, piece in enumerate(CONTROL)}
    control |= {f"{piece[1:-1]}_piece": piece for piece in CONTROL}
    symbols, folder = [*MARKERS, *TURNS, *TEXTUAL], tmp_path_factory.mktemp("sentencepiece")
    return write_vocabulary(folder, vocab_size=520, user_defined_symbols=symbols, **control)


@pytest.fixture(scope="session")
def json_folder(sentencepiece_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as a tokenizer.json, converted as Hugging Face does."""
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    vocab = {model.IdToPiece(i): i for i in range(model.GetPieceSize())}
    merges = [
        (-model.GetScore(i), piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if i >= model.PieceToId("<0xFF>") and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    pairs = [(a, b) for _, a, b in sorted(merges)]
    bpe = tokenizers.models.BPE(vocab, pairs, byte_fallback=True, unk_token="<unk>")
    engine = tokenizers.Tokenizer(bpe)
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    engine.add_special_tokens([*CONTROL, *TURNS])
    engine.add_tokens([tokenizers.AddedToken(p, normalized=False) for p in (*MARKERS, *TEXTUAL)])
    folder = tmp_path_factory.mktemp("json")
    engine.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session", params=["sentencepiece", "json", "demo"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each kind of tokenizer folder in turn."""
    return DEMO if request.param == "demo" else request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def gemma(sentencepiece_folder: Path) -> Tokenizer:
    """The SentencePiece tokenizer, where the kind makes no difference."""
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return ChatTemplate(GEMMA_TEMPLATE, "built-in")


@pytest.fixture
def make_scheduler() -> Iterator[Callable[..., Scheduler]]:
    """Makes schedulers of toy sessions, which are closed at the end."""
    made: list[Scheduler] = []

    def make(session: ToySession, rows: int = 3, cache_bytes: int = 1 << 20) -> Scheduler:
        made.append(Scheduler(session, PrefixStore(cache_bytes), rows=rows))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


IDENTITY = Identity("toy", "ab" * 32, 8, "cd" * 32)


@pytest.fixture
def make_model(template: ChatTemplate) -> Iterator[Callable[..., Model]]:
    """Makes models of a toy session: `session` and other arguments of `Model` may be given."""
    made: list[Model] = []

    def make(tokenizer: Tokenizer, session: ToySession | None = None, **options: Any) -> Model:
        session = session or ToySession(tokenizer.vocab_size)
        made.append(Model(session, tokenizer, template, IDENTITY, **options))
        return made[-1]

    yield make
    for model in made:
        model.close()
