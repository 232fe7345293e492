"""Held-out figures in bits per byte of the UTF-8 text that is predicted."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from data import Documents
from tokenizer import BOS, PAD
from torch import Tensor

CONTEXT = 2048
_BATCH = 8


def bits_per_byte(
    logits: Callable[[Tensor], Tensor], documents: Documents, texts: dict[str, list[str]]
) -> dict[str, float]:
    """One figure a source; in chat the turn markup counts as text and as bytes."""
    return {
        source: nats(logits, tokens) / math.log(2) / sum(len(t.encode()) for t in texts[source])
        for source, tokens in documents.items()
    }


def pieces(document: np.ndarray, context: int = CONTEXT) -> list[np.ndarray]:
    """Cuts a document into pieces of `context` tokens after a `<bos>`, which is not scored."""
    text = document[1:]
    return [np.concatenate(([BOS], text[at : at + context])) for at in range(0, len(text), context)]


def nats(logits: Callable[[Tensor], Tensor], documents: list[np.ndarray]) -> float:
    """Summed cross entropy of the documents; as many batches at a time as there are cores."""
    rows = sorted((p for document in documents for p in pieces(document)), key=len)
    batches = [rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH)]

    @torch.inference_mode()
    def loss(batch: list[np.ndarray]) -> float:
        tokens = torch.full((len(batch), len(batch[-1])), PAD)
        for i, row in enumerate(batch):
            tokens[i, : len(row)] = torch.from_numpy(row)
        scores, targets = logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        return F.cross_entropy(scores, targets, ignore_index=PAD, reduction="sum").item()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(loss, batches))
