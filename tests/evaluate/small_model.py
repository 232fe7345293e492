"""A random model with the demo's tokenizer."""

import shutil
from pathlib import Path

from rgexport.griffin.checkpoint import demo_folder
from rgexport.griffin.config import GriffinConfig
from tests.models import Weights, make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=64, heads=4, vocab_size=8192, window=40)
_TOKENIZER = "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"


def small_model(
    folder: Path, config: GriffinConfig = CONFIG, seed: int = 0
) -> tuple[Path, GriffinConfig, Weights]:
    """Its folder, its shape and its weights."""
    weights = random_weights(config, seed)
    model = write_hugging_face(config, weights, folder / "model")
    for name in _TOKENIZER:
        shutil.copy(demo_folder() / name, model)
    return model, config, weights
