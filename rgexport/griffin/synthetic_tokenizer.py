"""A usable tokenizer of any vocabulary size, for random checkpoints."""

import json
import shutil
from pathlib import Path

from rgexport.errors import RequestError

_COPIED = ("special_tokens_map.json", "generation_config.json")


def write_tokenizer(folder: Path, vocab_size: int, *, chat: bool) -> None:
    """Writes the demo's tokenizer, grown to `vocab_size`, if the demo is there and can serve.

    The demo's pieces keep their ids, which are Gemma's. The vocabulary is filled up with pieces
    that no text is ever encoded to, because no merge leads to them. Without `chat` there is no
    chat template.
    """
    demo = _demo_folder()
    if demo is None:
        return
    # slow to import, and generated without type information
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString((demo / "tokenizer.model").read_bytes())
    if len(model.pieces) > vocab_size:
        return
    last = min(piece.score for piece in model.pieces)
    for index in range(len(model.pieces), vocab_size):
        model.pieces.add(piece=f"▁w{index}", score=last - index)
    model.trainer_spec.vocab_size = vocab_size
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = json.loads((demo / "tokenizer_config.json").read_bytes())
    if not chat:
        settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in _COPIED:
        shutil.copyfile(demo / name, folder / name)


def _demo_folder() -> Path | None:
    from rgexport.griffin.checkpoint import demo_folder

    try:
        return demo_folder()
    except RequestError:
        return None
