"""A random model with the demo's tokenizer."""

import shutil

import numpy as np
import torch

from rgexport.griffin.checkpoint import demo_folder
from tests.deepmind import deepmind_logits
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=64, heads=4, vocab_size=8192, window=40)
_TOKENIZER = "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"


def small_model(folder, config=CONFIG, seed=0):
    """Its folder, its shape and its weights."""
    weights = random_weights(config, seed)
    model = write_hugging_face(config, weights, folder / "model")
    for name in _TOKENIZER:
        shutil.copy(demo_folder() / name, model)
    return model, config, weights


def losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods in nats of each id by the logits in front of it."""
    odds = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    return -odds.numpy()[np.arange(len(ids)), ids]


def deepmind_losses(model, ids: np.ndarray) -> np.ndarray:
    """Losses by DeepMind's model of all ids but the first."""
    return losses(deepmind_logits(model, ids[None])[0, :-1], ids[1:])
